// The vendor's matrix product, written into memory that is there already.
#pragma once

#include <array>

#include "arguments.h"

namespace seda {

// out = a @ b, all of one dtype; each may be strided or turned.
inline void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the handle that the call returned
}

inline Tensor turned(const Tensor& m) { return torch::stable::transpose(m, 0, 1); }

}  // namespace seda
