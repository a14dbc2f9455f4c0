// Standard normals of the randomness contract, one thread's share: for device code and, in tests, for the host.
#pragma once

#include <math.h>
#include <string.h>

#include "../philox.h"

namespace seda {

SEDA_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

SEDA_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// -2 ln u with u = (w + 0.5) * 2**-24, w = word >> 8; right to the last bits also next to u = 1. u has one bit more
// than float32, but the distance f of its mantissa from 1 is exact: ln u = (e - 24) ln 2 + ln(1 + f).
SEDA_HOST_DEVICE float squared_radius(uint32_t word) {
  constexpr int32_t kSqrtHalfBits = 0x3F3504F3;
  constexpr float kMinus2Ln2 = -1.3862943611198906f;
  const int32_t w = static_cast<int32_t>(word >> 8);
  const int32_t bits = static_cast<int32_t>(bits_of(static_cast<float>(w)));
  int32_t e = (bits - kSqrtHalfBits) >> 23;
  const float mantissa = float_of(static_cast<uint32_t>(bits - e * (1 << 23)));
  const float half = float_of(static_cast<uint32_t>(126 - e) << 23);  // 0.5 * 2**-e
  float f = (mantissa - 1.0f) + half;
  if (w == 0) f = 0.0f, e = -1;
  // Minimax of degree 6 for (ln(1 + f) - f + f**2/2) / f**3: 7e-9 absolute.
  float p = fmaf(0.08672178f, f, -0.14379016f);
  p = fmaf(p, f, 0.14977999f);
  p = fmaf(p, f, -0.16564423f);
  p = fmaf(p, f, 0.19954875f);
  p = fmaf(p, f, -0.25001699f);
  p = fmaf(p, f, 0.33334166f);
  const float log1p = fmaf(f * f, fmaf(p, f, -0.5f), f);
  return fmaf(static_cast<float>(e - 24), kMinus2Ln2, -2.0f * log1p);
}

// Two standard normals from two words: r cos 2 pi u1 and r sin 2 pi u1, r**2 = -2 ln u0.
SEDA_HOST_DEVICE void box_muller(uint32_t word0, uint32_t word1, float& first, float& second) {
  // Folded exactly, in integers: u1 = half / 2 + x with x in [-1/4, 1/4); half a turn is a sign for both.
  const uint32_t turn = word1 + 0x40000000u;
  const float x = fmaf(float_of(((turn >> 8) & 0x7FFFFFu) | 0x4B000000u) - 12582912.0f, 5.9604644775390625e-08f,
                       2.98023223876953125e-08f);
  const float s = x * x;
  // Minimax in s: 3e-9 for the sine, 5e-8 for the cosine.
  float sine = fmaf(39.53670120f, s, -76.54977982f);
  sine = fmaf(sine, s, 81.60100555f);
  sine = fmaf(sine, s, -41.34165573f);
  sine = fmaf(sine, s, 6.283185005f);
  float cosine = fmaf(56.34064102f, s, -85.25400543f);
  cosine = fmaf(cosine, s, 64.93521881f);
  cosine = fmaf(cosine, s, -19.73918152f);
  cosine = fmaf(cosine, s, 1.0f);
  const float radius = float_of(bits_of(sqrtf(squared_radius(word0))) ^ (turn & 0x80000000u));
  first = radius * cosine;
  second = radius * (sine * x);
}

// Normals of features 4 quad .. 4 quad + 3.
SEDA_HOST_DEVICE void four_normals(const PhiloxRow& row, uint32_t quad, float (&eps)[4]) {
  uint32_t words[4] = {quad, row.c1, row.c2, row.c3};
  philox4x32_10<ScalarWords>(words, row.key0, row.key1);
  box_muller(words[0], words[1], eps[0], eps[1]);
  box_muller(words[2], words[3], eps[2], eps[3]);
}

// Normals of features `feature` and `feature + 1`, feature even.
SEDA_HOST_DEVICE void two_normals(const PhiloxRow& row, uint32_t feature, float& first, float& second) {
  uint32_t words[4] = {feature / 4, row.c1, row.c2, row.c3};
  philox4x32_10<ScalarWords>(words, row.key0, row.key1);
  const bool upper = (feature & 2) != 0;
  box_muller(upper ? words[2] : words[0], upper ? words[3] : words[1], first, second);
}

}  // namespace seda
