// The reverse chain on CUDA: argument checks and memory; the kernel is in reverse_chain.h.
#include <vector>

#include "arguments.h"
#include "reverse_chain_launch.h"

namespace seda {
namespace {

using TensorList = std::vector<Tensor>;

// Fills a launch from tensors that it checks.
class Preparation {
 public:
  explicit Preparation(const Tensor& initial) : given_(initial, "initial") {}

  const Arguments& given() const { return given_; }
  ChainLaunch launch{};

  const Bits16* rows(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, int64_t& stride) const {
    given_.rows(tensor, name, rows, columns, ScalarType::BFloat16);
    const auto* data = static_cast<const Bits16*>(tensor.const_data_ptr());
    stride = tensor.stride(0);
    // Rows are read two elements at a time.
    if (reinterpret_cast<uintptr_t>(data) % 4 != 0 || (rows > 1 && columns > 0 && stride % 2 != 0))
      refuse(name, " must have rows that start at a multiple of 4 bytes");
    return data;
  }

  void weight(int number, const Tensor& tensor, const std::string& name, int64_t rows, int64_t columns) {
    const void* data = given_.whole(tensor, name, {rows, columns}, ScalarType::BFloat16);
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) refuse(name, " must start at a multiple of 16 bytes");
    launch.weights[number] = {static_cast<const Bits16*>(data), static_cast<int>(rows), static_cast<int>(columns)};
  }

  const Bits16* bias(const Tensor& tensor, const std::string& name, int64_t size) const {
    const void* data = given_.whole(tensor, name, {size}, ScalarType::BFloat16);
    if (reinterpret_cast<uintptr_t>(data) % 4 != 0) refuse(name, " must start at a multiple of 4 bytes");
    return static_cast<const Bits16*>(data);
  }

  void blocks(const TensorList& w_h, const TensorList& b_h, const TensorList& w_o, const TensorList& b_o) {
    const ChainShape& s = launch.shape;
    for (int i = 0; i < s.blocks; ++i) {
      const auto n = static_cast<size_t>(i);
      const auto name = [i](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
      weight(kBlockWeights + 2 * i, w_h[n], name("w_h"), s.hidden, s.width);
      weight(kBlockWeights + 2 * i + 1, w_o[n], name("w_o"), s.width, s.hidden);
      launch.b_h[i] = bias(b_h[n], name("b_h"), s.hidden);
      launch.b_o[i] = bias(b_o[n], name("b_o"), s.width);
    }
  }

 private:
  Arguments given_;
};

int size_of(const Tensor& tensor, const char* name, int64_t dimensions, int64_t which) {
  if (!tensor.defined() || tensor.dim() != dimensions) refuse(name, " must have ", dimensions, " dimensions");
  if (tensor.size(which) > 1 << 20) refuse(name, " is too large: ", tensor.size(which));
  return static_cast<int>(tensor.size(which));
}

ChainShape shape_of(const Tensor& initial, const Tensor& condition, const Tensor& coefficients, const Tensor& w_x,
                    const TensorList& w_h, const TensorList& b_h, const TensorList& w_o, const TensorList& b_o) {
  const size_t blocks = w_h.size();
  if (blocks == 0 || b_h.size() != blocks || w_o.size() != blocks || b_o.size() != blocks)
    refuse("w_h, b_h, w_o and b_o must hold one tensor for each block, and at least one");
  if (blocks > kMostBlocks) refuse("w_h must hold at most ", kMostBlocks, " tensors");
  return {size_of(initial, "initial", 2, 1), size_of(condition, "condition", 2, 1), size_of(w_x, "w_x", 2, 0),
          size_of(w_h[0], "w_h[0]", 2, 0),   static_cast<int>(blocks),              size_of(coefficients, "coefficients", 2, 0)};
}

// Names the argument for whose size choose_plan has no kernel.
[[noreturn]] void refuse_sizes(const ChainShape& s) {
  const auto check = [](const char* name, int size, int unit, const char* what) {
    if (size == 0 || size % unit != 0) refuse(name, " must have a positive multiple of ", unit, " ", what, ", not ", size);
  };
  check("initial", s.dim, 8, "columns"), check("condition", s.condition_dim, 8, "columns");
  check("w_x", s.width, kSlice, "rows"), check("w_h[0]", s.hidden, kSlice, "rows");
  if (s.steps == 0) refuse("coefficients must have at least one row");
  if (s.width > kMostWidth) refuse("w_x must have at most ", kMostWidth, " rows, not ", s.width);
  refuse("w_x has ", s.width, " rows, for which this device has too little shared memory");
}

Tensor reverse_chain(const Tensor& initial, const Tensor& source, const Tensor& condition, const Tensor& coefficients,
                     const Tensor& modulation, const Tensor& w_x, const Tensor& b_x, const Tensor& w_c,
                     const Tensor& b_c, const Tensor& w_g, const Tensor& b_g, TensorList w_h, TensorList b_h,
                     TensorList w_o, TensorList b_o, const Tensor& w_y, const Tensor& b_y, const Tensor& seed,
                     const Tensor& step, const Tensor& sample_ids, int64_t stream, bool noisy) {
  Preparation prepared(initial);
  const Arguments& given = prepared.given();
  ChainLaunch& launch = prepared.launch;
  launch.shape = shape_of(initial, condition, coefficients, w_x, w_h, b_h, w_o, b_o);
  const ChainShape& s = launch.shape;
  launch.rows = initial.size(0);
  launch.initial = prepared.rows(initial, "initial", launch.rows, s.dim, launch.initial_stride);
  launch.source = prepared.rows(source, "source", launch.rows, s.dim, launch.source_stride);
  launch.condition = prepared.rows(condition, "condition", launch.rows, s.condition_dim, launch.condition_stride);
  launch.coefficients = given.floats(coefficients, "coefficients", {s.steps, 5});
  launch.modulation = given.floats(modulation, "modulation", {s.steps, s.blocks, 3, s.width});
  // The kernel for a few rows reads four numbers at a time.
  if (reinterpret_cast<uintptr_t>(launch.modulation) % 16 != 0)
    refuse("modulation must start at a multiple of 16 bytes");
  prepared.weight(kInputWeight, w_x, "w_x", s.width, s.dim);
  prepared.weight(kConditionWeight, w_c, "w_c", s.width, s.condition_dim);
  prepared.weight(kGateWeight, w_g, "w_g", int64_t{s.blocks} * s.hidden, s.width);
  prepared.weight(kOutputWeight, w_y, "w_y", s.dim, s.width);
  prepared.blocks(w_h, b_h, w_o, b_o);
  launch.b_x = prepared.bias(b_x, "b_x", s.width), launch.b_c = prepared.bias(b_c, "b_c", s.width);
  launch.b_g = prepared.bias(b_g, "b_g", int64_t{s.blocks} * s.hidden), launch.b_y = prepared.bias(b_y, "b_y", s.dim);
  launch.seed = given.integers(seed, "seed", {}), launch.step = given.integers(step, "step", {});
  launch.sample_ids = given.integers(sample_ids, "sample_ids", {launch.rows});
  launch.stream = check_stream(stream), launch.noisy = noisy;

  const torch::stable::accelerator::DeviceGuard guard(given.device());
  ChainPlan plan{};
  check_launch("the reverse chain", plan_chain(s, launch.rows, given.device(), plan));
  if (plan.kernel == ChainKernel::none) refuse_sizes(s);
  Tensor result = torch::stable::new_empty(initial, {launch.rows, s.dim});
  if (launch.rows == 0) return result;
  const int64_t bytes = complete(launch, plan);
  Tensor scratch = torch::stable::new_empty(initial, {bytes / 4}, ScalarType::Float);
  launch.scratch = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  launch.result = static_cast<Bits16*>(result.mutable_data_ptr());
  check_launch("the reverse chain", launch_chain(launch, plan, given.device(), given.stream()));
  return result;
}

// The kernel that a call of these sizes gets on a device.
ChainKernel kernel_for(std::initializer_list<int64_t> sizes, int64_t rows, int64_t device) {
  int shape[6], *next = shape;
  for (const int64_t size : sizes) {
    if (size <= 0 || size > 1 << 20) return ChainKernel::none;
    *next++ = static_cast<int>(size);
  }
  ChainPlan plan{};
  const ChainShape narrow{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  check_launch("the reverse chain", plan_chain(narrow, rows, static_cast<int>(device), plan));
  return plan.kernel;
}

// Whether there is a kernel for these sizes on a device, for any number of rows.
bool chain_fits(int64_t dim, int64_t condition_dim, int64_t width, int64_t hidden, int64_t blocks, int64_t steps,
                int64_t device) {
  const int64_t many = int64_t{1} << 32;
  return kernel_for({dim, condition_dim, width, hidden, blocks, steps}, many, device) != ChainKernel::none;
}

// Whether so many rows are given to the kernel that splits columns over the processors.
bool chain_splits(int64_t dim, int64_t condition_dim, int64_t width, int64_t hidden, int64_t blocks, int64_t steps,
                  int64_t rows, int64_t device) {
  if (rows < 0) refuse("rows must not be negative, not ", rows);
  return kernel_for({dim, condition_dim, width, hidden, blocks, steps}, rows, device) == ChainKernel::split;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cuda, m) {
  m.def(
      "reverse_chain(Tensor initial, Tensor source, Tensor condition, Tensor coefficients, Tensor modulation, "
      "Tensor w_x, Tensor b_x, Tensor w_c, Tensor b_c, Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, "
      "Tensor[] w_o, Tensor[] b_o, Tensor w_y, Tensor b_y, Tensor seed, Tensor step, Tensor sample_ids, int stream, "
      "bool noisy) -> Tensor");
  m.def(
      "chain_fits(int dim, int condition_dim, int width, int hidden, int blocks, int steps, int device) -> bool");
  m.def(
      "chain_splits(int dim, int condition_dim, int width, int hidden, int blocks, int steps, int rows, int device) "
      "-> bool");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cuda, CUDA, m) { m.impl("reverse_chain", TORCH_BOX(&reverse_chain)); }
STABLE_TORCH_LIBRARY_IMPL(seda_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("chain_fits", TORCH_BOX(&chain_fits));
  m.impl("chain_splits", TORCH_BOX(&chain_splits));
}

}  // namespace seda
