#include "arguments.h"

namespace seda {
namespace {

std::string text(ScalarType dtype) {
  std::ostringstream name;
  name << dtype;
  return name.str();
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream shape;
  shape << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape << (i ? ", " : "") << tensor.size(i);
  shape << (tensor.dim() == 1 ? ",)" : ")");
  return shape.str();
}

bool shape_fits(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t want : shape) {
    if (want >= 0 && tensor.size(i) != want) return false;
    ++i;
  }
  return true;
}

}  // namespace

Arguments::Arguments(const Tensor& first, const char* name) {
  if (!first.defined()) refuse(name, " is undefined");
  if (!first.is_cuda()) refuse(name, " must be on a CUDA device");
  device_ = first.get_device();
}

void* Arguments::stream() const {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  return stream;
}

void Arguments::check(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape,
                      ScalarType dtype) const {
  if (!tensor.defined()) refuse(name, " is undefined");
  if (!tensor.is_cuda() || tensor.get_device() != device_) refuse(name, " must be on CUDA device ", device_);
  if (tensor.layout() != torch::headeronly::Layout::Strided) refuse(name, " must be a strided tensor");
  if (!shape_fits(tensor, shape)) {
    std::ostringstream wanted;
    for (const int64_t size : shape) wanted << (wanted.str().empty() ? "" : ", ") << (size < 0 ? "any" : std::to_string(size));
    refuse(name, " must have shape (", wanted.str(), "), not ", shape_text(tensor));
  }
  if (tensor.scalar_type() != dtype) refuse(name, " must be ", text(dtype), ", not ", text(tensor.scalar_type()));
  if (tensor.numel() > 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() != 0)
    refuse(name, " does not start at a multiple of its element size");
}

void Arguments::rows(const Tensor& tensor, const std::string& name, int64_t rows, int64_t columns,
                     ScalarType dtype) const {
  check(tensor, name, {rows, columns}, dtype);
  if (tensor.size(1) > 1 && tensor.stride(1) != 1) refuse(name, " must have contiguous rows");
}

const void* Arguments::whole(const Tensor& tensor, const std::string& name, std::initializer_list<int64_t> shape,
                             ScalarType dtype) const {
  check(tensor, name, shape, dtype);
  if (!tensor.is_contiguous()) refuse(name, " must be contiguous");
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

int64_t check_stream(int64_t stream) {
  if (stream < 0 || stream > 255) refuse("stream must be in 0 .. 255, not ", stream);
  return stream;
}

void check_launch(const char* operation, const char* error) {
  if (error != nullptr) refuse(operation, " cannot be launched: ", error);
}

}  // namespace seda
