// Which instruction sets this CPU has, of those that the row kernels are compiled for.
#pragma once

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

}  // namespace seda
