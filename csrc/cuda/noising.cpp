// Noising on CUDA: argument checks; the kernel is in noising.cu.
#include "noising.h"

#include "arguments.h"

namespace seda {
namespace {

ScalarType storage_of(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) refuse(name, " must be float32 or bfloat16");
  return dtype;
}

NoisingLaunch prepare(const Arguments& given, const Tensor& x0, const char* name, const Tensor& timesteps,
                      const Tensor& signal) {
  const ScalarType dtype = storage_of(x0, name);
  given.rows(x0, name, -1, -1, dtype);
  NoisingLaunch launch{};
  launch.x0 = x0.const_data_ptr();
  launch.rows = x0.size(0), launch.columns = x0.size(1), launch.stride = x0.stride(0);
  launch.bfloat16 = dtype == ScalarType::BFloat16;
  launch.long_timesteps = timesteps.scalar_type() == ScalarType::Long;
  launch.timesteps =
      given.whole(timesteps, "timesteps", {launch.rows}, launch.long_timesteps ? ScalarType::Long : ScalarType::Int);
  launch.signal = given.floats(signal, "signal", {-1});
  launch.steps = signal.size(0);
  return launch;
}

Tensor run(NoisingLaunch launch, const Arguments& given, const Tensor& x0) {
  Tensor x = torch::stable::new_empty(x0, {launch.rows, launch.columns});
  launch.x = x.mutable_data_ptr();
  check_launch("noising", launch_noising(launch, given.device(), given.stream()));
  return x;
}

Tensor q_sample(const Tensor& x0, const Tensor& timesteps, const Tensor& signal, const Tensor& noise,
                const Tensor& seed, const Tensor& step, const Tensor& sample_ids, int64_t stream) {
  const Arguments given(x0, "x0");
  NoisingLaunch launch = prepare(given, x0, "x0", timesteps, signal);
  launch.noise = given.floats(noise, "noise", {launch.steps});
  launch.seed = given.integers(seed, "seed", {});
  launch.step = given.integers(step, "step", {});
  launch.sample_ids = given.integers(sample_ids, "sample_ids", {launch.rows});
  launch.stream = check_stream(stream);
  const torch::stable::accelerator::DeviceGuard guard(given.device());
  return run(launch, given, x0);
}

Tensor q_sample_backward(const Tensor& grad, const Tensor& timesteps, const Tensor& signal) {
  const Arguments given(grad, "grad");
  const NoisingLaunch launch = prepare(given, grad, "grad", timesteps, signal);
  const torch::stable::accelerator::DeviceGuard guard(given.device());
  return run(launch, given, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cuda, m) {
  m.def(
      "q_sample(Tensor x0, Tensor timesteps, Tensor signal, Tensor noise, Tensor seed, Tensor step, "
      "Tensor sample_ids, int stream) -> Tensor");
  m.def("q_sample_backward(Tensor grad, Tensor timesteps, Tensor signal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cuda, CUDA, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("q_sample_backward", TORCH_BOX(&q_sample_backward));
}

}  // namespace seda
