// The CUDA operators' host side without a GPU: tensors on the CPU pass for CUDA's, and a launch reads and writes all that
// it was given, so that a sanitizer sees a pointer, size or stride that the checks should have refused.
// Linked with -Bsymbolic: the functions of PyTorch's shim that are defined here win over its own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "reverse_chain_launch.h"

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

namespace seda {
namespace {

volatile unsigned char seen;

// Reads memory that the kernels take some bytes at a time, for which a GPU wants it to begin at a multiple of these.
void read(const void* data, int64_t bytes, uintptr_t at_once) {
  if (bytes > 0 && reinterpret_cast<uintptr_t>(data) % at_once != 0) {
    std::fprintf(stderr, "%lld bytes are misaligned for accesses of %lld\n", static_cast<long long>(bytes),
                 static_cast<long long>(at_once));
    std::abort();
  }
  const auto* from = static_cast<const unsigned char*>(data);
  for (int64_t i = 0; i < bytes; ++i) seen = from[i];
}

void read_rows(const void* data, int64_t rows, int64_t columns, int64_t stride, int64_t size) {
  for (int64_t i = 0; columns > 0 && i < rows; ++i)
    read(static_cast<const unsigned char*>(data) + i * stride * size, columns * size, 4);
}

// A GPU like H100's.
constexpr int kProcessors = 132, kRoom = 227 * 1024;

}  // namespace

const char* plan_chain(const ChainShape& shape, int64_t rows, int, ChainPlan& plan) {
  plan = choose_plan(shape, rows, kProcessors, kRoom, true);
  return nullptr;
}

const char* launch_chain(const ChainLaunch& a, const ChainPlan& plan, int, void*) {
  const ChainShape& s = a.shape;
  read_rows(a.initial, a.rows, s.dim, a.initial_stride, 2);
  read_rows(a.source, a.rows, s.dim, a.source_stride, 2);
  read_rows(a.condition, a.rows, s.condition_dim, a.condition_stride, 2);
  read(a.coefficients, int64_t{s.steps} * 5 * 4, 4);
  read(a.modulation, int64_t{s.steps} * s.blocks * 3 * s.width * 4, 16);
  read(a.b_x, int64_t{s.width} * 2, 4), read(a.b_c, int64_t{s.width} * 2, 4);
  read(a.b_g, int64_t{s.blocks} * s.hidden * 2, 4), read(a.b_y, int64_t{s.dim} * 2, 4);
  for (int i = 0; i < s.blocks; ++i) read(a.b_h[i], int64_t{s.hidden} * 2, 4), read(a.b_o[i], int64_t{s.width} * 2, 4);
  for (int i = 0; i < kBlockWeights + 2 * s.blocks; ++i)
    read(a.weights[i].data, int64_t{a.weights[i].rows} * a.weights[i].columns * 2, 16);
  read(a.seed, 8, 8), read(a.step, 8, 8), read(a.sample_ids, a.rows * 8, 8);
  std::memset(a.result, 0, static_cast<size_t>(a.rows * s.dim * 2));
  const int64_t groups = (a.rows + kSplitRows - 1) / kSplitRows;
  const bool split = plan.kernel == ChainKernel::split;
  const int64_t bytes = split ? 4 * a.split.exchange * groups : a.saved.bytes * plan.blocks;
  std::memset(a.scratch, 0, static_cast<size_t>(bytes / 4 * 4));
  return nullptr;
}

}  // namespace seda
