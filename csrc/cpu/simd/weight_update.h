// Clipping, AdamW and the moving average in one pass over the weights (see reference.weight_update).
#pragma once

#include "rows.h"
#include "simd.h"

namespace seda::SEDA_ISA {

static float squares(const float* x, int64_t n) {
  // One vector of sums would wait for each addition.
  constexpr int64_t kAtOnce = 4;
  F total[kAtOnce] = {};
  int64_t j = 0;
  for (; j + kAtOnce * kLanes <= n; j += kAtOnce * kLanes)
    for (int64_t k = 0; k < kAtOnce; ++k) {
      const F value = load(x + j + k * kLanes);
      total[k] += value * value;
    }
  over_row(n - j, [&](int64_t i, auto part) {
    const F value = load(x + j + i, part);
    total[0] += value * value;
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static void weight_update(const UpdateArguments& a, int64_t begin, int64_t end) {
  const bool near = a.moved < 0.5f, keeps = a.new_average < 0.5f;  // the form of torch.lerp whose error is the smaller one
  over_row(end - begin, [&](int64_t i, auto part) {
    const int64_t j = begin + i;
    const F grad = load(a.grad + j, part) * a.clip;
    F average = load(a.exp_avg + j, part), square = load(a.exp_avg_sq + j, part);
    average = keeps ? average + (grad - average) * a.new_average : grad - (grad - average) * (1.0f - a.new_average);
    square = square * a.old_square + grad * grad * a.new_square;
    const F weight = load(a.weight + j, part) * a.decay -
                     average * a.step_size / (square_root(square) * a.square_scale + a.epsilon);
    const F before = load(a.average + j, part), way = weight - before;
    store(a.exp_avg + j, average, part);
    store(a.exp_avg_sq + j, square, part);
    store(a.weight + j, weight, part);
    store(a.average + j, near ? before + way * a.moved : weight - way * (1.0f - a.moved), part);
  });
}

}  // namespace seda::SEDA_ISA
