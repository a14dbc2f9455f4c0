// Interaction's element-wise parts, row by row; the products between them are the vendor's GEMM. Formulas and names as
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
  F squares{};
  over_row(n, [&](int64_t j, auto part) {
    const F centred = zero_outside(load(h + j, part) - mean, part);
    squares += centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + kNormEps)};
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
      const F x = load(pre + j, part) + (a.bias != nullptr ? load(a.bias + j, part) : F{});
      return x * sigmoid(x) * load(gate + j, part);
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
      const F added = load(residual + j, part) + (a.bias != nullptr ? load(a.bias + j, part) : F{});
      store(h_next + j, load(h + j, part) + (1.0f + load(alpha + j, part)) * added, part);
    });
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
      grad_alpha.add(j, g * load(residual + j, part), part);
      store(bias + j, load(bias + j, part) + scaled, part);
    });
  }
}

template <class T>
static void gated_silu_backward_rows(const SiluArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                                     int64_t end) {
  float* bias = s.columns_sum + chunk * s.columns;
  for (int64_t i = begin; i < end; ++i) {
    const T *pre = row_of<T>(a.pre, i), *gate = row_of<T>(a.gate, i);
    T *grad = new_row_of<T>(a.hidden, i), *grad_gate = new_row_of<T>(a.grad_gate, i);
    const auto finish = [&](int64_t j, F g, auto part) {
      const F x = load(pre + j, part), y = sigmoid(x);
      store(grad_gate + j, g * x * y, part);
      const F grad_pre = g * load(gate + j, part) * y * (1.0f + x * (1.0f - y));
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
  for (int64_t place = begin; place < end; ++place) {
    const int64_t i = s.order[place];
    const T *h = row_of<T>(a.h, i), *grad = row_of<T>(a.grad, i), *grad_z = row_of<T>(a.z, i);
    T* grad_h = new_row_of<T>(a.grad_h, i);
    const float* scale = row_of(a.scale, a.timesteps[i]);
    const TableRow grad_shift = table_row(s, 0, place, chunk, begin, a.timesteps);
    const TableRow grad_scale = table_row(s, 1, place, chunk, begin, a.timesteps);
    const RowMoments moments = row_moments(h, a.columns);
    F first{}, second{};
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h + j, part) - moments.mean) * moments.rstd, g = load(grad_z + j, part);
      const F grad_normed = g * (1.0f + load(scale + j, part));
      first += grad_normed;
      second += grad_normed * normed;
      grad_shift.add(j, g, part);
      grad_scale.add(j, g * normed, part);
    });
    const float mean = sum(first) / static_cast<float>(a.columns);
    const float slope = sum(second) / static_cast<float>(a.columns);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F normed = (load(h + j, part) - moments.mean) * moments.rstd;
      const F grad_normed = load(grad_z + j, part) * (1.0f + load(scale + j, part));
      store(grad_h + j, load(grad + j, part) + moments.rstd * (grad_normed - mean - normed * slope), part);
    });
  }
}

SEDA_BY_STORAGE(modulated_norm, NormArguments)
SEDA_BY_STORAGE(gated_silu, SiluArguments)
SEDA_BY_STORAGE(gated_residual, ResidualArguments)
SEDA_BACKWARD_BY_STORAGE(gated_residual_backward, ResidualArguments)
SEDA_BACKWARD_BY_STORAGE(gated_silu_backward, SiluArguments)
SEDA_BACKWARD_BY_STORAGE(modulated_norm_backward, NormArguments)

}  // namespace seda::SEDA_ISA
