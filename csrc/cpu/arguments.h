// What the CPU operators ask of their arguments before they take a pointer, beside what ../checks.h has for all devices.
#pragma once

#include <vector>

#include "../checks.h"
#include "simd/rows.h"

namespace seda {

// Refuses a tensor that is not on the CPU, not strided, of another shape (-1: any size) or misaligned for its dtype.
void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape);

// float32 or bfloat16; anything else is refused.
Storage storage_of(const Tensor& tensor, const char* name);

// A (rows, columns) matrix of the given storage whose rows are contiguous.
Matrix matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, Storage storage);
Matrix new_matrix(const Tensor& tensor);

const float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape);
// A (rows, columns) float32 table with contiguous rows.
Table table(const Tensor& tensor, const char* name, int64_t rows, int64_t columns);

const int64_t* integers(const Tensor& tensor, const char* name, int64_t size);
int64_t counter(const Tensor& tensor, const char* name);

// Indices (int32 or int64, any stride) that were checked to lie in 0 .. limit - 1, apart from `ignored`, which becomes -1.
std::vector<int64_t> indices(const Tensor& tensor, const char* name, int64_t size, int64_t limit,
                             const int64_t* ignored = nullptr);

Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype);

// The row kernels of the best instruction set that this CPU has, or of the one that SEDA_FAST_CPU_ISA names.
const RowKernels& kernels();

// Calls f(begin, end) over PyTorch's own threads, for ranges of rows that are worth a thread.
template <class Function>
void parallel_rows(int64_t rows, int64_t per_row, const Function& f) {
  constexpr int64_t kWork = 16384;  // elements below which a second thread does not pay
  kernels();  // may refuse, and an exception must not leave a thread of PyTorch's
  const int64_t grain = per_row >= kWork ? 1 : kWork / (per_row > 0 ? per_row : 1);
  torch::stable::parallel_for(0, rows, grain, f);
}

}  // namespace seda
