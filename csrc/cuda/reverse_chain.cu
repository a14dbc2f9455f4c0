// The reverse chain on CUDA: one launch for a whole stage. The kernel's text is in reverse_chain.h.
#include "launch.h"
#include "machine.h"
// The machine above.
#include "reverse_chain.h"
#include "split_chain.h"

namespace seda {
namespace {

template <class Thread>
__global__ void __launch_bounds__(Thread::kThreads, 1) reverse_chain_kernel(const __grid_constant__ ChainLaunch launch) {
  Thread thread(launch);
  thread.run();
}

// Cooperative: all blocks of threads must be there at once, as they wait for each other.
template <class Thread>
cudaError_t start(const ChainLaunch& launch, int blocks, int device, cudaStream_t stream, bool cooperative = false) {
  const cudaError_t error = allow_shared_memory(reverse_chain_kernel<Thread>, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(Thread::kThreads);
  config.dynamicSmemBytes = launch.shared.bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, reverse_chain_kernel<Thread>, launch);
}

cudaError_t start_split(const ChainLaunch& launch, int blocks, int device, cudaStream_t stream) {
  // Every byte of kNothing.
  const int64_t words = launch.split.exchange * (blocks / launch.split.blocks);
  const cudaError_t error = cudaMemsetAsync(launch.scratch, 0xFF, static_cast<size_t>(4 * words), stream);
  return error == cudaSuccess ? start<SplitThread>(launch, blocks, device, stream, true) : error;
}

}  // namespace

const char* plan_chain(const ChainShape& shape, int64_t rows, int device, ChainPlan& plan) {
  const CaptureMayLoad loading;
  int processors = 0, room = 0, major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return explain(error);
#if defined(SEDA_CODE_FOR_90A)
  const bool hopper = major == 9 && minor == 0;
#else
  const bool hopper = false;
#endif
  plan = choose_plan(shape, rows, processors, room, hopper);
  return nullptr;
}

const char* launch_chain(const ChainLaunch& launch, const ChainPlan& plan, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const CaptureMayLoad loading;
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return explain(error);
  if (plan.kernel == ChainKernel::tall) error = start<TallChain>(launch, plan.blocks, device, on);
  else if (plan.kernel == ChainKernel::hopper) return launch_hopper(launch, plan.blocks, device, stream);
  else if (plan.kernel == ChainKernel::wide) error = start<WideChain>(launch, plan.blocks, device, on);
  else error = start_split(launch, plan.blocks, device, on);
  return explain(error);
}

}  // namespace seda
