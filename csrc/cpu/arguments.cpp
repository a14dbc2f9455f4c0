#include "arguments.h"

#include "features.h"

#include <cstdlib>
#include <cstring>

namespace seda {

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.defined()) refuse(name, " is undefined");
  if (!tensor.is_cpu()) refuse(name, " must be on the CPU");
  check_form(tensor, name, shape);
}

Storage storage_of(const Tensor& tensor, const char* name) {
  if (!tensor.defined()) refuse(name, " is undefined");
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Storage::float32;
  if (dtype == ScalarType::BFloat16) return Storage::bfloat16;
  refuse(name, " must be float32 or bfloat16, not ", dtype_name(dtype));
}

Matrix matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, Storage storage) {
  check(tensor, name, {rows, columns});
  check_dtype(tensor, name, storage == Storage::float32 ? ScalarType::Float : ScalarType::BFloat16);
  check_rows_contiguous(tensor, name);
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0)};
}

Matrix new_matrix(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0)}; }

const float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, shape);
  check_dtype(tensor, name, ScalarType::Float);
  check_contiguous(tensor, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

Table table(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  const Matrix m = matrix(tensor, name, rows, columns, Storage::float32);
  return {static_cast<const float*>(m.data), m.stride};
}

const int64_t* integers(const Tensor& tensor, const char* name, int64_t size) {
  check(tensor, name, {size});
  check_dtype(tensor, name, ScalarType::Long);
  check_contiguous(tensor, name);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

int64_t counter(const Tensor& tensor, const char* name) {
  check(tensor, name, {});
  check_dtype(tensor, name, ScalarType::Long);
  return *static_cast<const int64_t*>(tensor.const_data_ptr());
}

std::vector<int64_t> indices(const Tensor& tensor, const char* name, int64_t size, int64_t limit,
                             const int64_t* ignored) {
  check(tensor, name, {size});
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Int && dtype != ScalarType::Long)
    refuse(name, " must be int32 or int64, not ", dtype_name(dtype));
  std::vector<int64_t> values(static_cast<size_t>(size));
  const int64_t stride = size > 0 ? tensor.stride(0) : 0;
  const void* data = tensor.const_data_ptr();
  for (int64_t i = 0; i < size; ++i) {
    const int64_t value = dtype == ScalarType::Int ? static_cast<const int32_t*>(data)[i * stride]
                                                   : static_cast<const int64_t*>(data)[i * stride];
    const bool skipped = ignored != nullptr && value == *ignored;
    if ((value < 0 || value >= limit) && !skipped)
      refuse(name, "[", i, "] is ", value, ", outside 0 .. ", limit - 1);
    values[static_cast<size_t>(i)] = skipped ? -1 : value;
  }
  return values;
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty({shape.begin(), shape.size()}, dtype);
}

namespace {

const RowKernels& pick_kernels() {
  const char* named = std::getenv("SEDA_FAST_CPU_ISA");
  const auto wanted = [named](const char* isa) {
    return (named == nullptr || *named == '\0' || std::strcmp(named, isa) == 0) && cpu_has(isa);
  };
#if defined(__x86_64__)
  if (wanted("avx512")) return avx512_kernels();
  if (wanted("avx2")) return avx2_kernels();
#endif
  if (wanted("baseline")) return baseline_kernels();
  refuse("SEDA_FAST_CPU_ISA=", named, " is not one of baseline, avx2 and avx512 that this CPU has");
}

}  // namespace

const RowKernels& kernels() {
  static const RowKernels& chosen = pick_kernels();
  return chosen;
}

}  // namespace seda
