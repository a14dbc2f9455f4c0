// The reverse chain's own element-wise parts, row by row (see reference.reverse_chain), and products of a few rows.
#pragma once

#include "interaction.h"
#include "noising.h"

namespace seda::SEDA_ISA {

template <class T>
static void add_rows(const AddArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* m = new_row_of<T>(a.m, i);
    const T* other = a.other.data == nullptr ? nullptr : row_of<T>(a.other, i);
    over_row(a.columns, [&](int64_t j, auto part) {
      store(m + j, load(m + j, part) + load_any(a.bias, j, part) + a.constant + load_any(other, j, part), part);
    });
  }
}

template <class T>
static void plain_norm_rows(const PlainNormArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* h = row_of<T>(a.h, i);
    T* y = new_row_of<T>(a.y, i);
    const RowMoments moments = row_moments(h, a.columns);
    over_row(a.columns, [&](int64_t j, auto part) {
      store(y + j, (load(h + j, part) - moments.mean) * moments.rstd, part);
    });
  }
}

template <class T>
static void chain_step_rows(const ChainStepArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *product = row_of<T>(a.product, i), *source = row_of<T>(a.source, i);
    T* x = new_row_of<T>(a.x, i);
    float* result = a.result + i * a.columns;
    over_row(a.columns, [&](int64_t j, auto part) {
      const F x0 = load(product + j, part) + load(a.bias + j, part);
      store(result + j, load(result + j, part) + a.w * x0, part);
      if (!a.last) store(x + j, a.a * x0 + a.b * load(x + j, part) + a.c * load(source + j, part), part);
    });
    if (a.last || a.e == 0.0f) continue;
    noise_row(x, x, a.columns, PhiloxRow(a.seed, a.step, a.sample_ids[i], a.stream), 1.0f, a.e);
  }
}

template <class T>
static void folded_step_rows(const FoldedStepArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *product = row_of<T>(a.product, i), *condition = row_of<T>(a.condition, i);
    const T* source = a.source.data == nullptr ? nullptr : row_of<T>(a.source, i);
    T* h = new_row_of<T>(a.h, i);
    float* u = a.u + i * a.columns;
    over_row(a.columns, [&](int64_t j, auto part) {
      F next = a.a * (load(product + j, part) + load(a.bias + j, part)) + a.b * load(u + j, part);
      if (source != nullptr) next += a.c * load(source + j, part);
      store(u + j, next, part);
      store(h + j, next + load(a.input_bias + j, part) + load(condition + j, part), part);
    });
  }
}

// Four outputs at a time: their weights stream past once, each sum runs over k in the same order for any thread.
template <class T>
static void product_rows(const ProductArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t kOutputs = 4;
  for (int64_t o = begin; o < end; o += kOutputs) {
    const int64_t count = end - o < kOutputs ? end - o : kOutputs;
    for (int64_t i = 0; i < a.rows; ++i) {
      const T* x = row_of<T>(a.x, i);
      const T* weight[kOutputs];
      for (int64_t q = 0; q < kOutputs; ++q) weight[q] = row_of<T>(a.weight, o + (q < count ? q : count - 1));
      F total[kOutputs] = {};
      // The next outputs' weights on their way to the second cache: rows of 2 to 4 KB end before the processor's own
      // prefetching is under way (51 GB/s of one core beside 44, from the third cache of an AMD EPYC).
      const int64_t ahead = kOutputs * a.columns;
      over_row(a.columns, [&](int64_t k, auto part) {
        const F value = load(x + k, part);
        for (int64_t q = 0; q < kOutputs; ++q) {
          __builtin_prefetch(weight[q] + k + ahead, 0, 2);
          total[q] += value * load(weight[q] + k, part);
        }
      });
      for (int64_t q = 0; q < count; ++q) new_row_of<T>(a.out, i)[o + q] = from_scalar<T>(sum(total[q]));
    }
  }
}

SEDA_BY_STORAGE(add, AddArguments)
SEDA_BY_STORAGE(plain_norm, PlainNormArguments)
SEDA_BY_STORAGE(chain_step, ChainStepArguments)
SEDA_BY_STORAGE(folded_step, FoldedStepArguments)
SEDA_BY_STORAGE(product, ProductArguments)

}  // namespace seda::SEDA_ISA
