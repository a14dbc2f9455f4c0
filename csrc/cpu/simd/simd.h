// Vectors of the instruction set that this translation unit is compiled for, on GCC's and clang's vector types.
// Included only by files that are compiled once per instruction set. Those include no C++ library header: an inline
// function compiled here for AVX-512 could be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../philox.h"

#define SEDA_INLINE static inline __attribute__((always_inline))

namespace seda::SEDA_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
constexpr int kLanes = 16;
typedef __m512 Singles;
typedef __m512d Doubles;
typedef __m512i Integers;
#define SEDA_MM(operation) _mm512_##operation
#define SEDA_SET1_EPI64 _mm512_set1_epi64
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
typedef __m256 Singles;
typedef __m256d Doubles;
typedef __m256i Integers;
#define SEDA_MM(operation) _mm256_##operation
#define SEDA_SET1_EPI64 _mm256_set1_epi64x
#else
constexpr int kLanes = 4;
#if defined(__x86_64__)
typedef __m128 Singles;
typedef __m128d Doubles;
typedef __m128i Integers;
#define SEDA_MM(operation) _mm_##operation
#define SEDA_SET1_EPI64 _mm_set1_epi64x
#endif
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint64_t W __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

SEDA_INLINE F broadcast(float x) { return x - F{}; }
SEDA_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
template <class To, class From>
SEDA_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return (To)x;
}
SEDA_INLINE F choose(I mask, F a, F b) { return mask ? a : b; }

SEDA_INLINE F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
SEDA_INLINE F load(const bfloat16* p) {
  H x;
  memcpy(&x, p, sizeof x);
  return bits<F>(__builtin_convertvector(x, U) << 16);
}
SEDA_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
SEDA_INLINE void store(bfloat16* p, F x) {
  const U u = bits<U>(x);
  // Round to nearest, ties to even; a NaN keeps its sign and becomes quiet.
  const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const U quiet = (u >> 16) | 0x40u;
  const H h = __builtin_convertvector(x == x ? rounded : quiet, H);
  memcpy(p, &h, sizeof h);
}

SEDA_INLINE float to_scalar(float x) { return x; }
SEDA_INLINE float to_scalar(bfloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &u, sizeof y);
  return y;
}
template <class T>
SEDA_INLINE T from_scalar(float x) {
  T lanes[kLanes];
  store(lanes, broadcast(x));
  return lanes[0];
}

// How many lanes of a vector lie inside the row: all, or the row's last few.
struct Whole {};
struct Part {
  int64_t lanes;
};

template <class T>
SEDA_INLINE F load(const T* p, Whole) {
  return load(p);
}
// Lanes outside the row read as 0.
template <class T>
SEDA_INLINE F load(const T* p, Part part) {
  T whole[kLanes] = {};
  memcpy(whole, p, static_cast<size_t>(part.lanes) * sizeof(T));
  return load(whole);
}
template <class T>
SEDA_INLINE void store(T* p, F x, Whole) {
  store(p, x);
}
template <class T>
SEDA_INLINE void store(T* p, F x, Part part) {
  T whole[kLanes];
  store(whole, x);
  memcpy(p, whole, static_cast<size_t>(part.lanes) * sizeof(T));
}

SEDA_INLINE F fill_outside(F x, Whole, float) { return x; }
SEDA_INLINE F fill_outside(F x, Part part, float fill) {
  I lane{};
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return choose(lane < static_cast<int32_t>(part.lanes), x, broadcast(fill));
}
template <class Width>
SEDA_INLINE F zero_outside(F x, Width width) {
  return fill_outside(x, width, 0.0f);
}

// body(j, Whole or Part) for the vectors of a row of n elements that start at j.
template <class Body>
SEDA_INLINE void over_row(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, Whole{});
  if (j < n) body(j, Part{n - j});
}

SEDA_INLINE F square_root(F x) {
#if defined(SEDA_MM)
  return (F)SEDA_MM(sqrt_ps)((Singles)x);
#else
  F y;
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

SEDA_INLINE float sum(F x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// exp(x), relative error below 2e-7 on [-87, 88]; x below is taken as -87, above as 88. NaN stays NaN.
// Cephes' expf: x = n ln 2 + r, |r| <= ln(2) / 2, polynomial of degree 5 for (exp(r) - 1 - r) / r**2.
SEDA_INLINE F exponential(F x) {
  const F input = x, high = broadcast(88.0f), low = broadcast(-87.0f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const F magic = broadcast(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer in the low bits
  const F shifted = x * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return choose(input == input, bits<F>(bits<I>(p) + (bits<I>(shifted) << 23)), input);
}

// 0 where the exponential is at its bound: times a large x that would be more than nothing.
SEDA_INLINE F sigmoid(F x) { return choose(x < broadcast(-88.0f), F{}, 1.0f / (1.0f + exponential(-x))); }

// Philox words, each in the low half of a 64-bit lane; the high half holds what is left of a product and is ignored.
struct VectorWords {
  using Word = W;
  using Product = W;
  SEDA_INLINE Product multiply(Word a, uint32_t b) {
#if defined(SEDA_MM)
    return (W)SEDA_MM(mul_epu32)((Integers)a, SEDA_SET1_EPI64(b));
#else
    return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(b);
#endif
  }
  SEDA_INLINE Word high(Product p) { return p >> 32; }
  SEDA_INLINE Word low(Product p) { return p; }
  SEDA_INLINE Word mix(Word a, Word b, uint32_t key) { return a ^ b ^ static_cast<uint64_t>(key); }
};

// Random words of kLanes consecutive counters from `first`. Lane l of word k belongs to the counter
// first + (kLanes / 4) * (l % 4) + l / 4: that order lets `interleave` work inside 128-bit lanes only.
SEDA_INLINE void random_words(const PhiloxRow& row, uint32_t first, U (&words)[4]) {
  W group[2][4];
  for (int parity = 0; parity < 2; ++parity) {
    W index{};
    for (int k = 0; k < kLanes / 2; ++k) {
      const int lane = 2 * k + parity;
      index[k] = static_cast<uint64_t>((kLanes / 4) * (lane % 4) + lane / 4);
    }
    W* c = group[parity];
    c[0] = index + static_cast<uint64_t>(first);
    c[1] = W{} + static_cast<uint64_t>(row.c1);
    c[2] = W{} + static_cast<uint64_t>(row.c2);
    c[3] = W{} + static_cast<uint64_t>(row.c3);
    philox4x32_10<VectorWords>(group[parity], row.key0, row.key1);
  }
  for (int k = 0; k < 4; ++k) words[k] = bits<U>((group[0][k] & 0xFFFFFFFFull) | (group[1][k] << 32));
}

// Word k of each counter in `x[k]`, lanes as in `random_words`, to the order of the features: out[j] is word j % 4 of
// counter first + j / 4.
SEDA_INLINE void interleave(const F (&x)[4], F (&out)[4]) {
#if defined(SEDA_MM)
  const auto a = (Doubles)SEDA_MM(unpacklo_ps)((Singles)x[0], (Singles)x[1]);
  const auto b = (Doubles)SEDA_MM(unpackhi_ps)((Singles)x[0], (Singles)x[1]);
  const auto c = (Doubles)SEDA_MM(unpacklo_ps)((Singles)x[2], (Singles)x[3]);
  const auto d = (Doubles)SEDA_MM(unpackhi_ps)((Singles)x[2], (Singles)x[3]);
  out[0] = (F)SEDA_MM(unpacklo_pd)(a, c);
  out[1] = (F)SEDA_MM(unpackhi_pd)(a, c);
  out[2] = (F)SEDA_MM(unpacklo_pd)(b, d);
  out[3] = (F)SEDA_MM(unpackhi_pd)(b, d);
#else
  for (int j = 0; j < 4 * kLanes; ++j) out[j / kLanes][j % kLanes] = x[j % 4][j / 4];
#endif
}

// r = sqrt(-2 ln u) for u = (w + 0.5) * 2**-24, w in 0 .. 2**24 - 1. u needs 25 bits: above a half, where float32 would
// round it (the largest to 1), the fraction f of ln(1 + f) is taken from the exact integer instead.
SEDA_INLINE F box_muller_radius(I w) {
  const F u = (to_float(w) + 0.5f) * 0x1p-24f;
  const I exponent = (bits<I>(u) - 0x3F3504F3) >> 23;  // u = m * 2**exponent, m in [sqrt(1/2), sqrt(2))
  const F m = bits<F>(bits<I>(u) - (exponent << 23));
  const I top = exponent == 0;
  const I odd = 2 * w + 1;
  const F exact = choose(top, to_float(odd - (1 << 25)) * 0x1p-25f, to_float(odd - (1 << 24)) * 0x1p-24f);
  const F f = choose(w >= (1 << 23), exact, m - 1.0f);
  // Cephes' logf: ln(1 + f) = f - f**2 / 2 + f**3 P(f).
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F e = to_float(exponent), square = f * f;
  F y = p * f * square + e * -2.12194440e-4f;
  y = y - 0.5f * square;
  return square_root(-2.0f * (f + y + e * 0.693359375f));
}

// cos and sin of 2 pi u for u = (w + 0.5) * 2**-24: the distance to the nearest quarter turn is an exact integer.
SEDA_INLINE void cosine_sine_of_turn(I w, F& cosine, F& sine) {
  const I odd = 2 * w + 1;                       // u in units of 2**-25 turns
  const I quarter = (odd + (1 << 22)) >> 23;     // 0 .. 4
  const F s = to_float(odd - (quarter << 23)) * 0x1p-22f;  // in [-1, 1): the angle is pi / 4 * s
  const F t = s * s;
  // Chebyshev interpolation of sin(pi/4 sqrt(t)) / sqrt(t) and cos(pi/4 sqrt(t)) on [0, 1].
  F a = t * -3.5954290725115357e-5f + 2.4900068014925836e-3f;
  a = a * t + -8.074543470810158e-2f;
  a = a * t + 7.853981609766183e-1f;
  a = a * s;
  F b = t * 3.529797104073023e-6f + -3.259385858800123e-4f;
  b = b * t + 1.585432522840392e-2f;
  b = b * t + -3.0842513515828135e-1f;
  b = b * t + 1.0f;
  const I swap = (quarter & 1) != 0;
  cosine = bits<F>(bits<I>(choose(swap, a, b)) ^ (((quarter + 1) & 2) << 30));
  sine = bits<F>(bits<I>(choose(swap, b, a)) ^ ((quarter & 2) << 30));
}

// 4 * kLanes standard normals in the order of the features, from counter `first`.
SEDA_INLINE void normals(const PhiloxRow& row, uint32_t first, F (&out)[4]) {
  U words[4];
  random_words(row, first, words);
  F pairs[4];
  for (int k = 0; k < 4; k += 2) {
    const F radius = box_muller_radius(bits<I>(words[k] >> 8));
    F cosine, sine;
    cosine_sine_of_turn(bits<I>(words[k + 1] >> 8), cosine, sine);
    pairs[k] = radius * cosine;
    pairs[k + 1] = radius * sine;
  }
  interleave(pairs, out);
}

// Calls body(j, words, Whole or Part) for each vector of a row's random words in the order of the features.
template <class Body>
SEDA_INLINE void over_random_row(const PhiloxRow& row, int64_t n, const Body& body) {
  int64_t j = 0;
  while (j < n) {
    U words[4];
    random_words(row, static_cast<uint32_t>(j / 4), words);
    F mixed[4] = {bits<F>(words[0]), bits<F>(words[1]), bits<F>(words[2]), bits<F>(words[3])}, ordered[4];
    interleave(mixed, ordered);
    for (int k = 0; k < 4 && j < n; ++k, j += kLanes) {
      if (j + kLanes <= n)
        body(j, bits<U>(ordered[k]), Whole{});
      else
        body(j, bits<U>(ordered[k]), Part{n - j});
    }
  }
}

}  // namespace seda::SEDA_ISA
