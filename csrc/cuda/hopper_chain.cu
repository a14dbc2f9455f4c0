// The reverse chain on compute capability 9.0: its launch and what the driver must tell the copy engine of the weights.
// The kernel's text is in hopper_chain.h.
#include <cuda.h>

#include "launch.h"
#include "machine.h"
// The machine above.
#include "reverse_chain_launch.h"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "hopper_chain.h"
#endif

namespace seda {
namespace {

constexpr int kThreads = 384, kRanks = 2;

// Code for this one capability; the host launches it nowhere else.
__global__ void __launch_bounds__(kThreads, 1)
    hopper_chain_kernel(const __grid_constant__ ChainLaunch launch, const __grid_constant__ TensorMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(kThreads == kHopperThreads && kRanks == kHopperRanks);
  run_hopper(launch, maps.of);
#else
  __trap();
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver: the library must load where there is none.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return explain(error) == nullptr && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// Boxes of half a weight tile in the 128-byte swizzle; zeros beyond the weight's ends.
bool describe(Encode encode, const WeightMatrix& weight, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(weight.columns), static_cast<cuuint64_t>(weight.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(weight.columns) * sizeof(Bits16)};
  const cuuint32_t box[] = {kSlice, kTileRows / kRanks}, steps[] = {1, 1};
  return encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                const_cast<Bits16*>(weight.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

const char* launch_hopper(const ChainLaunch& launch, int blocks, int device, void* stream) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  TensorMaps maps{};
  for (int i = 0; i < kBlockWeights + 2 * launch.shape.blocks; ++i)
    if (!describe(encode, launch.weights[i], maps.of[i])) return "the driver refuses a weight's tensor map";
  const cudaError_t error = allow_shared_memory(hopper_chain_kernel, device);
  if (error != cudaSuccess) return explain(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kRanks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = launch.shared.bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  return explain(cudaLaunchKernelEx(&config, hopper_chain_kernel, launch, maps));
}

}  // namespace seda
