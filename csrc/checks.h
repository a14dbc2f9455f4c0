// What the operators of both devices ask of a tensor before they take a pointer. A refusal is one sentence that names
// the argument; it reaches Python as a RuntimeError. (seda_fast.ops refuses most of it earlier, with a ValueError.)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace seda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string dtype_name(ScalarType dtype) {
  std::ostringstream name;
  name << dtype;
  return name.str();
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool shape_fits(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t want : shape) {
    if (want >= 0 && tensor.size(i) != want) return false;
    ++i;
  }
  return true;
}

// Tensor::layout came with PyTorch 2.11.
inline bool is_strided(const Tensor& tensor) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// Refuses a tensor whose memory was freed, by `storage.resize_(0)` say, or that is misaligned for its dtype.
inline void check_start(const Tensor& tensor, const std::string& name) {
  if (tensor.numel() == 0) return;
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (start == 0) refuse(name, " has no memory");
  if (start % tensor.element_size() != 0) refuse(name, " does not start at a multiple of its element size");
}

// Refuses a tensor that is not strided, of another shape (-1: any size) or misaligned for its dtype.
inline void check_form(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape) {
  if (!is_strided(tensor)) refuse(name, " must be a strided tensor");
  if (!shape_fits(tensor, shape)) {
    std::ostringstream wanted;
    for (const int64_t size : shape)
      wanted << (wanted.str().empty() ? "" : ", ") << (size < 0 ? "any" : std::to_string(size));
    refuse(name, " must have shape (", wanted.str(), "), not ", shape_text(tensor));
  }
  check_start(tensor, name);
}

inline void check_dtype(const Tensor& tensor, const std::string& name, ScalarType want) {
  if (tensor.scalar_type() != want)
    refuse(name, " must be ", dtype_name(want), ", not ", dtype_name(tensor.scalar_type()));
}

inline void check_contiguous(const Tensor& tensor, const std::string& name) {
  if (!tensor.is_contiguous()) refuse(name, " must be contiguous");
}

inline void check_rows_contiguous(const Tensor& tensor, const std::string& name) {
  // Where there are no elements no stride is used, and PyTorch calls any of them contiguous.
  if (tensor.numel() > 0 && tensor.size(1) > 1 && tensor.stride(1) != 1) refuse(name, " must have contiguous rows");
}

inline int64_t check_stream(int64_t stream) {
  if (stream < 0 || stream > 255) refuse("stream must be in 0 .. 255, not ", stream);
  return stream;
}

}  // namespace seda
