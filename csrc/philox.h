// Philox4x32-10 (Salmon et al., SC 2011) and the counter layout of the randomness contract: one text for the host's
// scalar code, the host's vector code and the device.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define SEDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SEDA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace seda {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// How one 32-bit word computes. The vector code has its own policy with the same members (cpu/simd/simd.h).
struct ScalarWords {
  using Word = uint32_t;
  using Product = uint64_t;
  static SEDA_HOST_DEVICE Product multiply(Word a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  static SEDA_HOST_DEVICE Word high(Product p) { return static_cast<uint32_t>(p >> 32); }
  static SEDA_HOST_DEVICE Word low(Product p) { return static_cast<uint32_t>(p); }
  static SEDA_HOST_DEVICE Word mix(Word a, Word b, uint32_t key) { return a ^ b ^ key; }
};

// Replaces the counter by its four random words.
template <class Words>
SEDA_HOST_DEVICE void philox4x32_10(typename Words::Word (&c)[4], uint32_t key0, uint32_t key1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const typename Words::Product product0 = Words::multiply(c[0], kPhiloxMultiplier0);
    const typename Words::Product product1 = Words::multiply(c[2], kPhiloxMultiplier1);
    c[0] = Words::mix(Words::high(product1), c[1], key0);
    c[1] = Words::low(product1);
    c[2] = Words::mix(Words::high(product0), c[3], key1);
    c[3] = Words::low(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// What a row of random words shares: key = seed, counter = (feature / 4, id low, step, stream | id high << 8).
struct PhiloxRow {
  uint32_t key0, key1, c1, c2, c3;

  SEDA_HOST_DEVICE PhiloxRow(int64_t seed, int64_t step, int64_t sample_id, int64_t stream)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        c1(static_cast<uint32_t>(sample_id)),
        c2(static_cast<uint32_t>(step)),
        c3(static_cast<uint32_t>((static_cast<uint64_t>(sample_id) >> 32 << 8) | static_cast<uint64_t>(stream))) {}
};

}  // namespace seda
