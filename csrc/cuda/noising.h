// Noising on CUDA: what noising.cpp hands to noising.cu after its checks.
#pragma once

#include <stdint.h>

namespace seda {

struct NoisingLaunch {
  const void* x0;  // (rows, columns), its rows' elements side by side
  void* x;         // the same, without gaps
  const void* timesteps;
  const int64_t *seed, *step, *sample_ids;
  const float *signal, *noise;  // (steps,); noise and all of the line above are null in the backward
  int64_t rows, columns, stride, steps, stream;
  bool bfloat16, long_timesteps;
};

// Null, or what CUDA says went wrong.
const char* launch_noising(const NoisingLaunch& launch, int device, void* stream);

}  // namespace seda
