// Noising, row by row (see reference.q_sample).
#pragma once

#include "rows.h"
#include "simd.h"

namespace seda::SEDA_ISA {

template <class T>
SEDA_INLINE void noise_row(const T* x0, T* x, int64_t columns, const PhiloxRow& row, float signal, float noise) {
  constexpr int64_t kBlock = 4 * kLanes;
  F eps[4];
  int64_t j = 0;
  for (; j + kBlock <= columns; j += kBlock) {
    normals(row, static_cast<uint32_t>(j / 4), eps);
    for (int k = 0; k < 4; ++k) store(x + j + k * kLanes, signal * load(x0 + j + k * kLanes) + noise * eps[k]);
  }
  if (j == columns) return;
  normals(row, static_cast<uint32_t>(j / 4), eps);
  for (int k = 0; k < 4 && j < columns; ++k, j += kLanes) {
    const Part part{columns - j < kLanes ? columns - j : kLanes};
    store(x + j, signal * load(x0 + j, part) + noise * eps[k], part);
  }
}

template <class T>
SEDA_INLINE void scale_row(const T* from, T* to, int64_t columns, float factor) {
  over_row(columns, [&](int64_t j, auto part) { store(to + j, factor * load(from + j, part), part); });
}

template <class T>
static void noising_rows(const NoisingArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const PhiloxRow row(a.seed, a.step, a.sample_ids[i], a.stream);
    noise_row(static_cast<const T*>(a.x0.data) + i * a.x0.stride, static_cast<T*>(a.x.data) + i * a.x.stride,
              a.columns, row, a.signal[a.timesteps[i]], a.noise[a.timesteps[i]]);
  }
}

template <class T>
static void noising_backward_rows(const NoisingArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    scale_row(static_cast<const T*>(a.x0.data) + i * a.x0.stride, static_cast<T*>(a.x.data) + i * a.x.stride,
              a.columns, a.signal[a.timesteps[i]]);
}

static void box_muller(const int32_t* words, float* normals, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    I first{}, second{};
    const int64_t count = end - i < kLanes ? end - i : kLanes;
    for (int64_t k = 0; k < count; ++k) {
      first[k] = words[2 * (i + k)];
      second[k] = words[2 * (i + k) + 1];
    }
    const F radius = box_muller_radius(first);
    F cosine, sine;
    cosine_sine_of_turn(second, cosine, sine);
    for (int64_t k = 0; k < count; ++k) {
      normals[2 * (i + k)] = radius[k] * cosine[k];
      normals[2 * (i + k) + 1] = radius[k] * sine[k];
    }
  }
}

static void noising(const NoisingArguments& a, int64_t begin, int64_t end) {
  a.storage == Storage::float32 ? noising_rows<float>(a, begin, end) : noising_rows<bfloat16>(a, begin, end);
}

static void noising_backward(const NoisingArguments& a, int64_t begin, int64_t end) {
  a.storage == Storage::float32 ? noising_backward_rows<float>(a, begin, end)
                                : noising_backward_rows<bfloat16>(a, begin, end);
}

}  // namespace seda::SEDA_ISA
