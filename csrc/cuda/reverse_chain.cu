// The reverse chain on CUDA: one launch for a whole stage. The kernel's text is in reverse_chain.h.
#include "machine.h"
// The machine above.
#include "reverse_chain.h"
#include "reverse_chain_launch.h"

namespace seda {
namespace {

template <class Thread>
__global__ void __launch_bounds__(Thread::kThreads, 1) reverse_chain_kernel(const __grid_constant__ ChainLaunch launch) {
  Thread thread(launch);
  thread.run();
}

template <class Thread>
cudaError_t start(const ChainLaunch& launch, int blocks, cudaStream_t stream) {
  const uint32_t bytes = launch.shared.bytes;
  const cudaError_t error = cudaFuncSetAttribute(reverse_chain_kernel<Thread>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  reverse_chain_kernel<Thread><<<static_cast<unsigned>(blocks), Thread::kThreads, bytes, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace

const char* plan_chain(const ChainShape& shape, int64_t rows, int device, ChainPlan& plan) {
  int processors = 0, room = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  plan = choose_plan(shape, rows, processors, room);
  return nullptr;
}

const char* launch_chain(const ChainLaunch& launch, const ChainPlan& plan, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = plan.tall ? start<TallChain>(launch, plan.blocks, static_cast<cudaStream_t>(stream))
                      : start<WideChain>(launch, plan.blocks, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace seda
