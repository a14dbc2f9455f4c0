// Interaction's element-wise parts: argument checks, threads and the sums over rows. seda_fast.ops.interaction puts the
// matrix products between them; the rows' arithmetic is in simd/interaction.h.
#include <cmath>
#include <tuple>

#include "sums.h"

namespace seda {
namespace {

Tensor modulated_norm(const Tensor& h, const Tensor& timesteps, const Tensor& shift, const Tensor& scale) {
  NormArguments a{};
  a.storage = storage_of(h, "h");
  a.h = matrix(h, "h", -1, -1, a.storage);
  a.columns = h.size(1);
  a.shift = table(shift, "shift", -1, a.columns);
  a.scale = table(scale, "scale", shift.size(0), a.columns);
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", h.size(0), shift.size(0));
  a.timesteps = tau.data();
  Tensor z = empty({h.size(0), a.columns}, h.scalar_type());
  a.z = new_matrix(z);
  parallel_rows(h.size(0), a.columns, [&](int64_t begin, int64_t end) { kernels().modulated_norm(a, begin, end); });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward(const Tensor& grad, const Tensor& grad_z, const Tensor& h,
                                                           const Tensor& timesteps, const Tensor& scale) {
  NormArguments a{};
  a.storage = storage_of(h, "h");
  a.h = matrix(h, "h", -1, -1, a.storage);
  const int64_t rows = h.size(0);
  a.columns = h.size(1);
  a.grad = matrix(grad, "grad", rows, a.columns, a.storage);
  a.z = matrix(grad_z, "grad_z", rows, a.columns, a.storage);
  a.scale = table(scale, "scale", -1, a.columns);
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", rows, scale.size(0));
  a.timesteps = tau.data();
  Tensor grad_h = empty({rows, a.columns}, h.scalar_type());
  a.grad_h = new_matrix(grad_h);
  Sums sums(0, a.columns);
  sums.add_tables(tau, scale.size(0), 2);
  parallel_chunks(rows, a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels().modulated_norm_backward(a, sums.view, chunk, begin, end);
  });
  sums.finish(tau);
  return {grad_h, sums.tables[0], sums.tables[1]};
}

SiluArguments silu_arguments(const Tensor& pre, const Tensor& gate, double dropout, const Tensor& seed,
                             const Tensor& step, const Tensor& sample_ids, int64_t stream) {
  SiluArguments a{};
  a.storage = storage_of(pre, "pre");
  a.pre = matrix(pre, "pre", -1, -1, a.storage);
  a.columns = pre.size(1);
  a.gate = matrix(gate, "gate", pre.size(0), a.columns, a.storage);
  if (!(dropout >= 0.0 && dropout < 1.0)) refuse("dropout must be in [0, 1), not ", dropout);
  a.threshold = static_cast<int32_t>(std::ceil(dropout * 0x1p24 - 0.5));
  a.kept = static_cast<float>(1.0 / (1.0 - dropout));
  a.seed = counter(seed, "seed");
  a.step = counter(step, "step");
  a.sample_ids = integers(sample_ids, "sample_ids", pre.size(0));
  a.stream = check_stream(stream);
  return a;
}

Tensor gated_silu(const Tensor& pre, const Tensor& gate, double dropout, const Tensor& seed, const Tensor& step,
                  const Tensor& sample_ids, int64_t stream) {
  SiluArguments a = silu_arguments(pre, gate, dropout, seed, step, sample_ids, stream);
  Tensor hidden = empty({pre.size(0), a.columns}, pre.scalar_type());
  a.hidden = new_matrix(hidden);
  parallel_rows(pre.size(0), 4 * a.columns, [&](int64_t begin, int64_t end) { kernels().gated_silu(a, begin, end); });
  return hidden;
}

std::tuple<Tensor, Tensor> gated_silu_backward(Tensor grad_hidden, const Tensor& pre, const Tensor& gate,
                                               double dropout, const Tensor& seed, const Tensor& step,
                                               const Tensor& sample_ids, int64_t stream) {
  SiluArguments a = silu_arguments(pre, gate, dropout, seed, step, sample_ids, stream);
  const int64_t rows = pre.size(0);
  matrix(grad_hidden, "grad_hidden", rows, a.columns, a.storage);
  if (!grad_hidden.is_contiguous()) refuse("grad_hidden must be contiguous");
  a.hidden = new_matrix(grad_hidden);
  Tensor grad_gate = empty({rows, a.columns}, pre.scalar_type());
  a.grad_gate = new_matrix(grad_gate);
  Sums sums(rows, a.columns);
  parallel_chunks(rows, 4 * a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels().gated_silu_backward(a, sums.view, chunk, begin, end);
  });
  return {grad_gate, sums.sum_columns(rows)};
}

ResidualArguments residual_arguments(const Tensor& h, const char* name, const Tensor& residual, const Tensor& alpha) {
  ResidualArguments a{};
  a.storage = storage_of(h, name);
  a.h = matrix(h, name, -1, -1, a.storage);
  a.columns = h.size(1);
  a.residual = matrix(residual, "residual", h.size(0), a.columns, a.storage);
  a.alpha = table(alpha, "alpha", -1, a.columns);
  return a;
}

Tensor gated_residual(const Tensor& h, const Tensor& residual, const Tensor& timesteps, const Tensor& alpha) {
  ResidualArguments a = residual_arguments(h, "h", residual, alpha);
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", h.size(0), alpha.size(0));
  a.timesteps = tau.data();
  Tensor h_next = empty({h.size(0), a.columns}, h.scalar_type());
  a.result = new_matrix(h_next);
  parallel_rows(h.size(0), a.columns, [&](int64_t begin, int64_t end) { kernels().gated_residual(a, begin, end); });
  return h_next;
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& residual,
                                                           const Tensor& timesteps, const Tensor& alpha) {
  ResidualArguments a = residual_arguments(grad, "grad", residual, alpha);
  const int64_t rows = grad.size(0);
  const std::vector<int64_t> tau = indices(timesteps, "timesteps", rows, alpha.size(0));
  a.timesteps = tau.data();
  Tensor grad_residual = empty({rows, a.columns}, grad.scalar_type());
  a.result = new_matrix(grad_residual);
  Sums sums(rows, a.columns);
  sums.add_tables(tau, alpha.size(0), 1);
  parallel_chunks(rows, a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels().gated_residual_backward(a, sums.view, chunk, begin, end);
  });
  sums.finish(tau);
  return {grad_residual, sums.tables[0], sums.sum_columns(rows)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def("modulated_norm(Tensor h, Tensor timesteps, Tensor shift, Tensor scale) -> Tensor");
  m.def(
      "modulated_norm_backward(Tensor grad, Tensor grad_z, Tensor h, Tensor timesteps, Tensor scale) "
      "-> (Tensor h, Tensor shift, Tensor scale)");
  m.def(
      "gated_silu(Tensor pre, Tensor gate, float dropout, Tensor seed, Tensor step, Tensor sample_ids, int stream) "
      "-> Tensor");
  // grad_hidden becomes the gradient of pre.
  m.def(
      "gated_silu_backward(Tensor(a!) grad_hidden, Tensor pre, Tensor gate, float dropout, Tensor seed, Tensor step, "
      "Tensor sample_ids, int stream) -> (Tensor gate, Tensor bias)");
  m.def("gated_residual(Tensor h, Tensor residual, Tensor timesteps, Tensor alpha) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor residual, Tensor timesteps, Tensor alpha) "
      "-> (Tensor residual, Tensor alpha, Tensor bias)");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("modulated_norm", TORCH_BOX(&modulated_norm));
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
  m.impl("gated_silu", TORCH_BOX(&gated_silu));
  m.impl("gated_silu_backward", TORCH_BOX(&gated_silu_backward));
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
}

}  // namespace seda
