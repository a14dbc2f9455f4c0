// Projection's element-wise parts on one block of logits, row by row (see reference.semantic_projection_forward and
// _backward).
#pragma once

#include "matrix.h"
#include "simd.h"

namespace seda::SEDA_ISA {

SEDA_INLINE float largest(F x) {
  float top = x[0];
  for (int k = 1; k < kLanes; ++k) top = x[k] > top ? x[k] : top;
  return top;
}

template <class T>
static void logits_rows(const LogitsArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = row_of<T>(a.logits, i);
    const auto logit = [&](int64_t j, auto part) { return load(logits + j, part) * a.scale; };
    F top = broadcast(-__builtin_inff()), total{};
    over_row(a.columns, [&](int64_t j, auto part) {
      const F x = logit(j, part), seen = fill_outside(x, part, -__builtin_inff());
      top = seen > top ? seen : top;
      total += zero_outside(x, part);
    });
    float* state = a.state + 4 * i;
    const float before = state[0], block = largest(top), now = block > before ? block : before;
    // Where a bias of minus infinity leaves out all classes so far, the difference of two infinities is no number.
    const float base = now == -__builtin_inff() ? 0.0f : now;
    F exponentials{};
    over_row(a.columns, [&](int64_t j, auto part) {
      exponentials += zero_outside(exponential(logit(j, part) - base), part);
    });
    const float carried = before == now ? state[1] : state[1] * __builtin_expf(before - now);
    state[0] = now;
    state[1] = carried + sum(exponentials);
    const int64_t label = a.labels[i] - a.first_class;
    if (label >= 0 && label < a.columns) state[2] = to_scalar(logits[label]) * a.scale;
    state[3] += sum(total);
  }
}

template <class T>
static void logits_backward_rows(const LogitsArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                                 int64_t end) {
  float* bias = s.columns_sum + chunk * s.columns;
  for (int64_t i = begin; i < end; ++i) {
    T* logits = new_row_of<T>(a.logits, i);
    const float grad = a.labels[i] < 0 ? 0.0f : a.grad;
    const int64_t label = a.labels[i] - a.first_class;
    const bool here = label >= 0 && label < a.columns;
    const float own = here ? to_scalar(logits[label]) * a.scale : 0.0f;
    over_row(a.columns, [&](int64_t j, auto part) {
      const F d = load(logits + j, part) * a.scale - a.log_normaliser[i];
      // 0 where the exponential is at its bound, as of a class that a bias of minus infinity leaves out: what it
      // would give, times the gradient, is denormal, which slows down every product that follows.
      const F p = choose(d < broadcast(-87.0f), F{}, exponential(d));
      const F g = grad == 0.0f ? F{} : (p - a.smoothing) * grad;
      store(logits + j, g, part);
      store(bias + j, load(bias + j, part) + g, part);
    });
    if (!here) continue;
    // Of a sure row p - 1 is what remains of two numbers near 1: a p that was stored in half precision would leave
    // nothing of it.
    logits[label] =
        from_scalar<T>((__builtin_expf(own - a.log_normaliser[i]) - a.smoothing - a.certainty) * grad);
    bias[label] -= a.certainty * grad;
  }
}

template <class T>
static void centre_rows(const CentreArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    a.distance[i] = 0.0f;
    if (a.labels[i] < 0) continue;
    const T *features = row_of<T>(a.features, i), *centre = row_of<T>(a.centres, a.labels[i]);
    F squares{};
    over_row(a.columns, [&](int64_t j, auto part) {
      const F difference = load(features + j, part) - load(centre + j, part);
      squares += difference * difference;
    });
    a.distance[i] = sum(squares);
  }
}

template <class T>
static void centre_backward_rows(const CentreArguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin,
                                 int64_t end) {
  for (int64_t place = begin; place < end; ++place) {
    const int64_t i = s.order[place];
    if (a.labels[i] < 0) continue;
    const T *features = row_of<T>(a.features, i), *centre = row_of<T>(a.centres, a.labels[i]);
    float* grad = new_row_of<float>(a.grad, i);
    const TableRow grad_centre =
        s.table[0] == nullptr ? TableRow{nullptr, false} : table_row(s, 0, place, chunk, begin, a.labels);
    over_row(a.columns, [&](int64_t j, auto part) {
      const F pull = (load(features + j, part) - load(centre + j, part)) * a.scale;
      store(grad + j, load(grad + j, part) + pull, part);
      if (grad_centre.data != nullptr) grad_centre.add(j, -pull, part);
    });
  }
}

SEDA_BY_STORAGE(logits, LogitsArguments)
SEDA_BY_STORAGE(centre, CentreArguments)
SEDA_BACKWARD_BY_STORAGE(logits_backward, LogitsArguments)
SEDA_BACKWARD_BY_STORAGE(centre_backward, CentreArguments)

}  // namespace seda::SEDA_ISA
