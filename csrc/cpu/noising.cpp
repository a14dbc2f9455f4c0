// Noising: argument checks and threads; the rows' arithmetic is in simd/noising.h.
#include "arguments.h"

namespace seda {
namespace {

Tensor q_sample(const Tensor& x0, const Tensor& timesteps, const Tensor& signal, const Tensor& noise,
                const Tensor& seed, const Tensor& step, const Tensor& sample_ids, int64_t stream) {
  NoisingArguments a{};
  a.storage = storage_of(x0, "x0");
  a.x0 = matrix(x0, "x0", -1, -1, a.storage);
  const int64_t rows = x0.size(0);
  a.columns = x0.size(1);
  a.signal = floats(signal, "signal", {-1});
  a.noise = floats(noise, "noise", {signal.size(0)});
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", rows, signal.size(0));
  a.timesteps = tau.data();
  a.seed = counter(seed, "seed");
  a.step = counter(step, "step");
  a.sample_ids = integers(sample_ids, "sample_ids", rows);
  a.stream = check_stream(stream);
  Tensor x = empty({rows, a.columns}, x0.scalar_type());
  a.x = new_matrix(x);
  // A normal costs about as much as 8 plain elements.
  parallel_rows(rows, 8 * a.columns, [&a](int64_t begin, int64_t end) { kernels().noising(a, begin, end); });
  return x;
}

Tensor q_sample_backward(const Tensor& grad, const Tensor& timesteps, const Tensor& signal) {
  NoisingArguments a{};
  a.storage = storage_of(grad, "grad");
  a.x0 = matrix(grad, "grad", -1, -1, a.storage);
  a.columns = grad.size(1);
  a.signal = floats(signal, "signal", {-1});
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", grad.size(0), signal.size(0));
  a.timesteps = tau.data();
  Tensor x = empty({grad.size(0), a.columns}, grad.scalar_type());
  a.x = new_matrix(x);
  parallel_rows(grad.size(0), a.columns,
                [&a](int64_t begin, int64_t end) { kernels().noising_backward(a, begin, end); });
  return x;
}

Tensor box_muller(const Tensor& words) {
  check(words, "words", {-1, 2});
  if (words.scalar_type() != ScalarType::Int || !words.is_contiguous()) refuse("words must be contiguous int32");
  const int32_t* data = static_cast<const int32_t*>(words.const_data_ptr());
  for (int64_t i = 0; i < words.numel(); ++i)
    if (data[i] < 0 || data[i] >= 1 << 24) refuse("words[", i / 2, ", ", i % 2, "] is not in 0 .. 2**24 - 1");
  Tensor normals = empty({words.size(0), 2}, ScalarType::Float);
  kernels().box_muller(data, static_cast<float*>(normals.mutable_data_ptr()), 0, words.size(0));
  return normals;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def(
      "q_sample(Tensor x0, Tensor timesteps, Tensor signal, Tensor noise, Tensor seed, Tensor step, "
      "Tensor sample_ids, int stream) -> Tensor");
  // The transform alone: words (N, 2) of 24 bits, as the uniforms use them. For tests of its corners.
  m.def("box_muller(Tensor words) -> Tensor");
  m.def("q_sample_backward(Tensor grad, Tensor timesteps, Tensor signal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("box_muller", TORCH_BOX(&box_muller));
  m.impl("q_sample_backward", TORCH_BOX(&q_sample_backward));
}

}  // namespace seda
