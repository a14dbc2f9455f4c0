// What the CUDA operators ask of their arguments before they take a pointer. A refusal is one sentence that names the
// argument (../checks.h). Values on the device are not read: a captured graph must not wait.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

namespace seda {

// Checks tensors against the device of the first one.
class Arguments {
 public:
  explicit Arguments(const Tensor& first, const char* name);

  int device() const { return device_; }
  // The current stream of the device.
  void* stream() const;

  // Refuses a tensor on another device, not strided, of another shape (-1: any size), of another dtype or misaligned.
  void check(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape, ScalarType dtype) const;
  // The same, and its rows' elements must lie side by side.
  void rows(const Tensor& tensor, const std::string& name, int64_t rows, int64_t columns, ScalarType dtype) const;
  // The same, and no gaps at all.
  const void* whole(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape,
                    ScalarType dtype) const;
  const float* floats(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape) const;
  const int64_t* integers(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape) const;

 private:
  int device_;
};

// Throws what a launch says went wrong.
void check_launch(const char* operation, const char* error);

}  // namespace seda
