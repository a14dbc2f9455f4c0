// Which instruction sets this CPU has, of those that the row kernels are compiled for.
#pragma once

#include <stdlib.h>

namespace seda {

inline bool cpu_has(const char* isa) {
  const auto is = [isa](const char* other) { return __builtin_strcmp(isa, other) == 0; };
#if defined(__x86_64__)
  if (is("avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return is("baseline");
}

// Whether products of float32 matrices are our own. On AMD's processors ours were measured to take less time than
// PyTorch's, which are MKL's; elsewhere that was not measured. The baseline's instructions have no fused multiply-add.
// SEDA_FAST_CPU_PRODUCTS=own or pytorch decides otherwise.
inline bool own_products() {
  const char *named = getenv("SEDA_FAST_CPU_PRODUCTS"), *isa = getenv("SEDA_FAST_CPU_ISA");
  if (named != nullptr && *named != '\0') return __builtin_strcmp(named, "own") == 0;
#if defined(__x86_64__)
  const bool limited = isa != nullptr && __builtin_strcmp(isa, "baseline") == 0;
  return __builtin_cpu_is("amd") && cpu_has("avx2") && !limited;
#else
  return false;
#endif
}

}  // namespace seda
