#include "arguments.h"

namespace seda {

Arguments::Arguments(const Tensor& first, const char* name) {
  if (!first.defined()) refuse(name, " is undefined");
  if (!first.is_cuda()) refuse(name, " must be on a CUDA device");
  device_ = first.get_device();
}

void* Arguments::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  return stream;
}

void Arguments::check(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape,
                      ScalarType dtype) const {
  if (!tensor.defined()) refuse(name, " is undefined");
  if (!tensor.is_cuda() || tensor.get_device() != device_) refuse(name, " must be on CUDA device ", device_);
  check_form(tensor, name, shape);
  check_dtype(tensor, name, dtype);
}

void Arguments::rows(const Tensor& tensor, const std::string& name, int64_t rows, int64_t columns,
                     ScalarType dtype) const {
  check(tensor, name, {rows, columns}, dtype);
  check_rows_contiguous(tensor, name);
}

const void* Arguments::whole(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape,
                             ScalarType dtype) const {
  check(tensor, name, shape, dtype);
  check_contiguous(tensor, name);
  return tensor.const_data_ptr();
}

const float* Arguments::floats(const Tensor& tensor, const std::string& name,
                               std::initializer_list<int64_t> shape) const {
  return static_cast<const float*>(whole(tensor, name, shape, ScalarType::Float));
}

const int64_t* Arguments::integers(const Tensor& tensor, const std::string& name,
                                   std::initializer_list<int64_t> shape) const {
  return static_cast<const int64_t*>(whole(tensor, name, shape, ScalarType::Long));
}

void check_launch(const char* operation, const char* error) {
  if (error != nullptr) refuse(operation, " cannot be launched: ", error);
}

}  // namespace seda
