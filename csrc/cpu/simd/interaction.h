// Interaction's element-wise parts, row by row; the products between them are ../product.h's. Formulas and names as
// in reference.interaction_block_forward and _backward.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace seda::SEDA_ISA {

constexpr float kNormEps = 1e-5f;

struct RowMoments {
  float mean, rstd;
};

template <class T>
SEDA_INLINE RowMoments row_moments(const T* h, int64_t n) {
  F total{};
  over_row(n, [&](int64_t j, auto part) { total += load(h + j, part); });
  const float mean = sum(total) / static_cast<float>(n);
  F squares{}, rest{};
  over_row(n, [&](int64_t j, auto part) {
    const F centred = zero_outside(load(h + j, part) - mean, part);
    squares += centred * centred;
    rest += centred;
  });
  // How far rounding has left the mean: of a row of one large value nothing else remains.
  const float off = sum(rest) / static_cast<float>(n);
  const float variance = __builtin_fmaxf(sum(squares) / static_cast<float>(n) - off * off, 0.0f);
  return {mean + off, 1.0f / __builtin_sqrtf(variance + kNormEps)};
}
template <class T>
static void modulated_norm_rows(const NormArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* h = row_of<T>(a.h, i);
    T* z = new_row_of<T>(a.z, i);
    const float* shift = row_of(a.shift, a.timesteps[i]);
    const float* scale = row_of(a.scale, a.timesteps[i]);
    const RowMoments moments = row_moments(h, a.columns);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h + j, part) - moments.mean) * moments.rstd;
      store(z + j, normed * (1.0f + load(scale + j, part)) + load(shift + j, part), part);
    });
  }
}

template <class T>
static void gated_silu_rows(const SiluArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *pre = row_of<T>(a.pre, i), *gate = row_of<T>(a.gate, i);
    T* hidden = new_row_of<T>(a.hidden, i);
    const auto gated = [&](int64_t j, auto part) {
      const F x = load(pre + j, part) + load_any(a.bias, j, part);
      return x * sigmoid(x) * (load(gate + j, part) + load_any(a.gate_bias, j, part));
    };
    if (a.threshold == 0) {
      over_row(a.columns, [&](int64_t j, auto part) { store(hidden + j, gated(j, part), part); });
      continue;
    }
    over_random_row(PhiloxRow(a.seed, a.step, a.sample_ids[i], a.stream), a.columns,
                    [&](int64_t j, U words, auto part) {
                      const I keep = bits<I>(words >> 8) >= a.threshold;
                      store(hidden + j, choose(keep, gated(j, part) * a.kept, F{}), part);
                    });
  }
}

template <class T>
static void gated_residual_rows(const ResidualArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *h = row_of<T>(a.h, i), *residual = row_of<T>(a.residual, i);
    T* h_next = new_row_of<T>(a.result, i);
    const float* alpha = row_of(a.alpha, a.timesteps[i]);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F added = load(residual + j, part) + load_any(a.bias, j, part);
      store(h_next + j, load(h + j, part) + (1.0f + load(alpha + j, part)) * added, part);
    });
  }
}

template <class T>
static void residual_norm_rows(const ResidualNormArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *h = row_of<T>(a.h, i), *residual = row_of<T>(a.residual, i);
    T *h_next = new_row_of<T>(a.h_next, i), *z = new_row_of<T>(a.z, i);
    const int64_t tau = a.timesteps[i];
    const float* alpha = a.alpha.data == nullptr ? nullptr : row_of(a.alpha, tau);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F added = load(residual + j, part) + load(a.bias + j, part);
      store(h_next + j, load(h + j, part) + (1.0f + load_any(alpha, j, part)) * added, part);
    });
    const RowMoments moments = row_moments(h_next, a.columns);
    const float* shift = a.shift.data == nullptr ? nullptr : row_of(a.shift, tau);
    const float* scale = a.scale.data == nullptr ? nullptr : row_of(a.scale, tau);
    float* total = a.total == nullptr ? nullptr : a.total + i * a.columns;
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h_next + j, part) - moments.mean) * moments.rstd;
      const F modulated = normed * (1.0f + load_any(scale, j, part)) + load_any(shift, j, part);
      store(z + j, modulated, part);
      if (total != nullptr) store(total + j, load(total + j, part) + a.weight * modulated, part);
    });
  }
}

template <class T>
static void column_sums_rows(const AddArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                             int64_t end) {
  float* sums = s.columns_sum + chunk * s.columns;
  for (int64_t i = begin; i < end; ++i) {
    const T* m = row_of<T>(a.m, i);
    over_row(a.columns, [&](int64_t j, auto part) { store(sums + j, load(sums + j, part) + load(m + j, part), part); });
  }
}

template <class T>
static void gated_residual_backward_rows(const ResidualArguments& a, const SegmentedSums& s, int64_t chunk,
                                         int64_t begin, int64_t end) {
  float* bias = s.columns_sum + chunk * s.columns;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t i = s.order[place];
    const T *grad = row_of<T>(a.h, i), *residual = row_of<T>(a.residual, i);
    T* grad_residual = new_row_of<T>(a.result, i);
    const float* alpha = row_of(a.alpha, a.timesteps[i]);
    const TableRow grad_alpha = table_row(s, 0, place, chunk, begin, a.timesteps);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F g = load(grad + j, part);
      const F scaled = g * (1.0f + load(alpha + j, part));
      store(grad_residual + j, scaled, part);
      grad_alpha.add(j, g * (load(residual + j, part) + load_any(a.bias, j, part)), part);
      store(bias + j, load(bias + j, part) + scaled, part);
    });
  }
}

template <class T>
static void gated_silu_backward_rows(const SiluArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                                     int64_t end) {
  float* bias = s.columns_sum + chunk * s.columns;
  float* gates_sum = s.gates_sum == nullptr ? nullptr : s.gates_sum + chunk * s.columns;
  for (int64_t i = begin; i < end; ++i) {
    const T *pre = row_of<T>(a.pre, i), *gate = row_of<T>(a.gate, i);
    T *grad = new_row_of<T>(a.hidden, i), *grad_gate = new_row_of<T>(a.grad_gate, i);
    const auto finish = [&](int64_t j, F g, auto part) {
      const F x = load(pre + j, part) + load_any(a.bias, j, part), y = sigmoid(x), of_gate = g * x * y;
      store(grad_gate + j, of_gate, part);
      if (gates_sum != nullptr) store(gates_sum + j, load(gates_sum + j, part) + of_gate, part);
      const F gate_value = load(gate + j, part) + load_any(a.gate_bias, j, part);
      const F grad_pre = g * gate_value * y * (1.0f + x * (1.0f - y));
      store(grad + j, grad_pre, part);
      store(bias + j, load(bias + j, part) + grad_pre, part);
    };
    if (a.threshold == 0) {
      over_row(a.columns, [&](int64_t j, auto part) { finish(j, load(grad + j, part), part); });
      continue;
    }
    over_random_row(PhiloxRow(a.seed, a.step, a.sample_ids[i], a.stream), a.columns,
                    [&](int64_t j, U words, auto part) {
                      const I keep = bits<I>(words >> 8) >= a.threshold;
                      finish(j, choose(keep, load(grad + j, part) * a.kept, F{}), part);
                    });
  }
}

template <class T>
static void modulated_norm_backward_rows(const NormArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                                         int64_t end) {
  float* bias = a.sums_result ? s.columns_sum + chunk * s.columns : nullptr;
  const bool tables = s.table[0] != nullptr;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t i = s.order == nullptr ? place : s.order[place];
    const T *h = row_of<T>(a.h, i), *grad_z = row_of<T>(a.z, i);
    const T* grad = a.grad.data == nullptr ? nullptr : row_of<T>(a.grad, i);
    T* grad_h = new_row_of<T>(a.grad_h, i);
    const float* scale = a.scale.data == nullptr ? nullptr : row_of(a.scale, a.timesteps[i]);
    const TableRow none{nullptr, false};
    const TableRow grad_shift = tables ? table_row(s, 0, place, chunk, begin, a.timesteps) : none;
    const TableRow grad_scale = tables ? table_row(s, 1, place, chunk, begin, a.timesteps) : none;
    const RowMoments moments = row_moments(h, a.columns);
    F first{}, second{};
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h + j, part) - moments.mean) * moments.rstd, g = load(grad_z + j, part);
      const F grad_normed = g * (1.0f + load_any(scale, j, part));
      first += grad_normed;
      second += grad_normed * normed;
      if (!tables) return;
      grad_shift.add(j, g, part);
      grad_scale.add(j, g * normed, part);
    });
    const float mean = sum(first) / static_cast<float>(a.columns);
    const float slope = sum(second) / static_cast<float>(a.columns);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h + j, part) - moments.mean) * moments.rstd;
      const F grad_normed = load(grad_z + j, part) * (1.0f + load_any(scale, j, part));
      const F result = load_any(grad, j, part) + moments.rstd * (grad_normed - mean - normed * slope);
      store(grad_h + j, result, part);
      if (bias != nullptr) store(bias + j, load(bias + j, part) + result, part);
    });
  }
}

SEDA_BY_STORAGE(modulated_norm, NormArguments)
SEDA_BY_STORAGE(gated_silu, SiluArguments)
SEDA_BY_STORAGE(gated_residual, ResidualArguments)
SEDA_BY_STORAGE(residual_norm, ResidualNormArguments)
SEDA_BACKWARD_BY_STORAGE(column_sums, AddArguments)
SEDA_BACKWARD_BY_STORAGE(gated_residual_backward, ResidualArguments)
SEDA_BACKWARD_BY_STORAGE(gated_silu_backward, SiluArguments)
SEDA_BACKWARD_BY_STORAGE(modulated_norm_backward, NormArguments)

}  // namespace seda::SEDA_ISA
