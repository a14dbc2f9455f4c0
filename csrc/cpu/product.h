// Matrix products, written into memory that is there already: by the vendor's GEMM, or by tiles of our own where those
// are faster (see `own_products`).
#pragma once

#include "arguments.h"

namespace seda {

// What a product is added to: a bias for each column, unless it is null, and what is there already.
struct Addends {
  const float* bias = nullptr;
  bool adds = false;
};

// out = a @ b, all of one dtype; each may be strided or turned.
void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out, Addends addends = {});

inline Tensor turned(const Tensor& m) { return torch::stable::transpose(m, 0, 1); }

// A second factor of many products, packed once where that is what they read.
class RightFactor {
 public:
  RightFactor() = default;
  // For products with about `rows` rows.
  RightFactor(const Tensor& b, int64_t rows);
  void multiply(const Tensor& a, const Tensor& out, Addends addends = {}) const;

 private:
  Tensor b_, packed_;
};

}  // namespace seda
