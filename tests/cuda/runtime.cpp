// CUDA's runtime and driver as far as the launches call them, without a GPU: what they were asked is written down and held
// against their documented rules. Linked in place of the runtime's archive with the objects that nvcc makes.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <string>

#include "reverse_chain_launch.h"

namespace {

constexpr int kProcessors = 132, kRoom = 227 * 1024;

std::ostringstream said;
// Made at its first use: kernels are registered before this file is begun.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}
std::map<const void*, int> limits;
std::set<const void*> loaded;
cudaError_t last = cudaSuccess, next_launch = cudaSuccess;
bool capturing = false;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// Loads a kernel's code at its first use, which takes memory.
cudaError_t load(const void* kernel) {
  if (capturing && mode != cudaStreamCaptureModeRelaxed && !loaded.count(kernel))
    return cudaErrorStreamCaptureUnsupported;
  loaded.insert(kernel);
  return cudaSuccess;
}

std::string name_of(const void* kernel) {
  for (const char* name : {"hopper_chain_kernel", "SplitThread"})
    if (names()[kernel].find(name) != std::string::npos) return name;
  return names()[kernel].find("Li64E") != std::string::npos ? "TallChain" : "WideChain";
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  const cudaError_t error = next_launch == cudaSuccess ? load(kernel) : next_launch;
  next_launch = cudaSuccess;
  if (error != cudaSuccess) return result(error);
  if (shared > static_cast<size_t>(limits.count(kernel) ? limits[kernel] : 48 * 1024)) return result(cudaErrorInvalidValue);
  said << name_of(kernel) << " grid " << grid.x << " block " << block.x << " shared " << shared << " stream "
       << reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

// The driver's rules for a map of rows in the 128-byte swizzle.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const bool sound = reinterpret_cast<uintptr_t>(map) % alignof(CUtensorMap) == 0 && at % 16 == 0 && rank == 2 &&
                     sizes[0] > 0 && sizes[1] > 0 && strides[0] % 16 == 0 && strides[0] >= 2 * sizes[0] &&
                     box[0] * 2 <= 128 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!sound || type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      swizzle != CU_TENSOR_MAP_SWIZZLE_128B || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  said << "map " << sizes[1] << "x" << sizes[0] << " box " << box[1] << "x" << box[0] << "\n";
  return CUDA_SUCCESS;
}

dim3 pushed_grid, pushed_block;
size_t pushed_shared;
cudaStream_t pushed_stream;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&said); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = device;
}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed_grid = grid, pushed_block = block, pushed_shared = shared, pushed_stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed_grid, *block = pushed_block, *shared = pushed_shared;
  *static_cast<cudaStream_t*>(stream) = pushed_stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, nullptr, shared, stream);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  const cudaError_t error = launch(kernel, grid, block, shared, stream);
  if (error == cudaSuccess) said << "\n";
  return error;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void**) {
  const cudaError_t error = launch(kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
  if (error != cudaSuccess) return error;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = c->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) said << " cooperative";
    if (attribute.id == cudaLaunchAttributeClusterDimension) said << " cluster " << attribute.val.clusterDim.x;
  }
  said << "\n";
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const cudaError_t error = load(kernel);
  if (error != cudaSuccess) return result(error);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kRoom) return result(cudaErrorInvalidValue);
  limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  said << "set " << reinterpret_cast<uintptr_t>(to) << " to " << value << ", bytes " << bytes << " stream "
       << reinterpret_cast<uintptr_t>(stream) << "\n";
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount             ? kProcessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kRoom
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
                                                                   : 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  said << "device " << device << "\n";
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "error " + std::to_string(static_cast<int>(error));
  return text.c_str();
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* answer) {
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *found = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *answer = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- for Python ------------------------------------------------------------------------------------------------------

// What was asked since the last call; the capture mode is global again after every launch, as it was.
const char* heard() {
  static std::string text;
  text = said.str() + (mode == cudaStreamCaptureModeGlobal ? "" : "the capture mode is left changed\n");
  said.str("");
  return text.c_str();
}

// A stream is being captured and no kernel was used before; the next launch fails with an error of CUDA's.
void begin(bool capture, int error) {
  capturing = capture, next_launch = static_cast<cudaError_t>(error), last = cudaSuccess;
  loaded.clear(), limits.clear();
}

// How much shared memory a kernel may have now.
int shared_limit(const char* name) {
  for (const auto& [kernel, limit] : limits)
    if (name_of(kernel) == name) return limit;
  return 0;
}

// sizes: rows, dim, condition_dim, width, hidden, blocks, steps.
const char* start_chain(const int64_t* sizes) {
  using namespace seda;
  const auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  ChainLaunch a{};
  a.rows = sizes[0], a.shape = {at(1), at(2), at(3), at(4), at(5), at(6)};
  const ChainShape& s = a.shape;
  ChainPlan plan{};
  if (const char* error = plan_chain(s, a.rows, 1, plan)) return error;
  complete(a, plan);
  a.scratch = reinterpret_cast<unsigned char*>(uintptr_t{4096});
  const auto weight = [&a](int number, int rows, int columns) {
    a.weights[number] = {reinterpret_cast<const Bits16*>(uintptr_t{16} * static_cast<uintptr_t>(number + 1)), rows, columns};
  };
  weight(kInputWeight, s.width, s.dim), weight(kConditionWeight, s.width, s.condition_dim);
  weight(kGateWeight, s.blocks * s.hidden, s.width), weight(kOutputWeight, s.dim, s.width);
  for (int l = 0; l < s.blocks; ++l) {
    weight(kBlockWeights + 2 * l, s.hidden, s.width);
    weight(kBlockWeights + 2 * l + 1, s.width, s.hidden);
  }
  return launch_chain(a, plan, 1, reinterpret_cast<void*>(uintptr_t{77}));
}

}  // extern "C"
