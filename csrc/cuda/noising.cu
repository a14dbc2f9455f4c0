// Noising: x0 is read, x is written, the normal noise lives in registers only. A thread serves the four features of one
// Philox counter, in a loop over the counters of its rows.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "launch.h"
#include "noising.h"
#include "normals.h"

namespace seda {
namespace {

constexpr int kThreads = 256;
// Blocks that fill every GPU of today several times over; the loop takes the rest.
constexpr int64_t kMostBlocks = 4096;

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void store(float* p, float x) { *p = x; }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Four elements in one access.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

__device__ int64_t timestep(const NoisingLaunch& a, int64_t row) {
  return a.long_timesteps ? static_cast<const int64_t*>(a.timesteps)[row] : static_cast<const int32_t*>(a.timesteps)[row];
}

__device__ void advance(int64_t& row, int64_t& quad, int64_t more_rows, int64_t more_quads, int64_t quads) {
  row += more_rows, quad += more_quads;
  if (quad >= quads) quad -= quads, ++row;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) noising_kernel(const __grid_constant__ NoisingLaunch a) {
  const int64_t quads = (a.columns + 3) / 4;
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x, stride = gridDim.x * int64_t{kThreads};
  // Divided once a thread: a division of 64 bits takes as many instructions as the four normals.
  const int64_t more_rows = stride / quads, more_quads = stride % quads;
  const bool noisy = a.noise != nullptr;
  const int64_t seed = noisy ? *a.seed : 0, step = noisy ? *a.step : 0;
  int64_t row = first / quads, quad = first % quads;
  for (; row < a.rows; advance(row, quad, more_rows, more_quads, quads)) {
    const int64_t tau = timestep(a, row);
    // A timestep outside the tables reads nothing and makes its row NaN.
    const bool known = tau >= 0 && tau < a.steps;
    const float signal = known ? a.signal[tau] : nanf("");
    float noise = 0.0f, eps[4] = {};
    if (noisy) {
      noise = known ? a.noise[tau] : nanf("");
      four_normals(PhiloxRow(seed, step, a.sample_ids[row], a.stream), static_cast<uint32_t>(quad), eps);
    }
    const T* from = static_cast<const T*>(a.x0) + row * a.stride + 4 * quad;
    T* to = static_cast<T*>(a.x) + row * a.columns + 4 * quad;
    Four<T> values{};
    if constexpr (kWide) {
      values = *reinterpret_cast<const Four<T>*>(from);
    } else {
      for (int k = 0; k < 4; ++k)
        if (4 * quad + k < a.columns) values.at[k] = from[k];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) store(&values.at[k], fmaf(signal, load(&values.at[k]), noise * eps[k]));
    if constexpr (kWide) {
      *reinterpret_cast<Four<T>*>(to) = values;
    } else {
      for (int k = 0; k < 4; ++k)
        if (4 * quad + k < a.columns) to[k] = values.at[k];
    }
  }
}

template <class T>
void run(const NoisingLaunch& a, unsigned blocks, cudaStream_t stream) {
  const auto fits = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
  if (a.columns % 4 == 0 && a.stride % 4 == 0 && fits(a.x0) && fits(a.x))
    noising_kernel<T, true><<<blocks, kThreads, 0, stream>>>(a);
  else
    noising_kernel<T, false><<<blocks, kThreads, 0, stream>>>(a);
}

}  // namespace

const char* launch_noising(const NoisingLaunch& a, int device, void* stream) {
  const int64_t quads = (a.columns + 3) / 4 * a.rows;
  if (quads == 0) return nullptr;
  const CaptureMayLoad loading;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    const int64_t wanted = (quads + kThreads - 1) / kThreads;
    const auto blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
    a.bfloat16 ? run<__nv_bfloat16>(a, blocks, static_cast<cudaStream_t>(stream))
               : run<float>(a, blocks, static_cast<cudaStream_t>(stream));
    error = cudaGetLastError();
  }
  return explain(error);
}

}  // namespace seda
