// What the launches of all kernels share.
#pragma once

#include <cuda_runtime.h>

namespace seda {

// A thread whose stream is being captured may load code: a kernel's first use does, and takes memory for it, which a
// capture forbids to a thread that does not say that it is meant. Nothing here waits for the device.
class CaptureMayLoad {
 public:
  CaptureMayLoad() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureMayLoad() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureMayLoad(const CaptureMayLoad&) = delete;
  CaptureMayLoad& operator=(const CaptureMayLoad&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Null, or what CUDA says of an error. It is told once: kept, the next launch would be blamed for it.
inline const char* explain(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Lets a kernel have all the shared memory that a block can: with the size of one launch, two threads that launch it for
// different sizes would take each other's limit away.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int device) {
  int room = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
}

}  // namespace seda
