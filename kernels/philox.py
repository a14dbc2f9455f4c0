"""Counter-based random numbers inside a kernel: Philox4x32-10 words, normals, dropout masks.

The contract: key = (seed low, seed high), counter = (feature // 4, sample id low, step, stream | sample id high << 8).
The integers are those of every other backend bit by bit, the normals agree to 2e-6.
"""

import math

import triton
import triton.language as tl

# Triton's own library functions are interpreted only if TRITON_INTERPRET=1 stood when Triton was imported.
INTERPRETED = not isinstance(tl.philox_impl, triton.JITFunction)

_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_MINUS_2_LN_2 = tl.constexpr(-2 * math.log(2))


@triton.jit
def random_words(seed_ptr, step_ptr, sample_ids, quads, stream):
    """Four uint32 words for each pair of a sample id (int64) and a group of four features (integer), broadcast.

    ``seed_ptr`` and ``step_ptr`` point to one int64 each: a captured graph reads their value at every replay.
    """
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr)
    zero = quads * 0 + sample_ids * 0
    return tl.philox_impl(
        (zero + quads).to(tl.uint32),
        (zero + sample_ids).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + (((sample_ids >> 32) << 8) | stream)).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _squared_radius(word):
    """``-2 ln u`` with ``u = (w + 0.5) * 2**-24``, ``w = word >> 8``; right to the last bits also next to u = 1.

    u has 25 significant bits, one more than float32, but the distance f of its mantissa from 1 is exact:
    ln u = (e - 24) ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
    """
    w = (word >> 8).to(tl.int32)
    bits = w.to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (e << 23)).to(tl.float32, bitcast=True)
    half = ((126 - e) << 23).to(tl.float32, bitcast=True)  # 0.5 * 2**-e
    f = tl.where(w == 0, 0.0, (mantissa - 1.0) + half)
    e = tl.where(w == 0, -1, e)
    # Minimax of degree 6 for (ln(1 + f) - f + f**2/2) / f**3: 7e-9 absolute.
    p = 0.08672178 * f - 0.14379016
    p = p * f + 0.14977999
    p = p * f - 0.16564423
    p = p * f + 0.19954875
    p = p * f - 0.25001699
    p = p * f + 0.33334166
    log1p = f + f * f * (p * f - 0.5)
    return (e - 24).to(tl.float32) * _MINUS_2_LN_2 - 2.0 * log1p


@triton.jit
def _cosine_sine(word):
    """``cos`` and ``sin`` of ``2 pi u`` folded into half a turn, and the sign bit that both then take.

    The fold is exact, in integers: u = half / 2 + x, x in [-1/4, 1/4).
    """
    turn = word + 0x40000000
    # The upper 23 of the 31 bits, as the mantissa of a float in [2**23, 2**24).
    mantissa = ((turn >> 8) & 0x7FFFFF) | 0x4B000000
    x = (mantissa.to(tl.float32, bitcast=True) - 12582912.0) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    s = x * x
    # Minimax in s: 3e-9 for the sine, 5e-8 for the cosine.
    sine = (((39.53670120 * s - 76.54977982) * s + 81.60100555) * s - 41.34165573) * s + 6.283185005
    cosine = (((56.34064102 * s - 85.25400543) * s + 64.93521881) * s - 19.73918152) * s + 1.0
    return cosine, sine * x, turn & 0x80000000


@triton.jit
def box_muller(word0, word1):
    """Two float32 standard normals from two uint32 words: ``r cos 2 pi u1`` and ``r sin 2 pi u1``, r**2 = -2 ln u0."""
    cosine, sine, sign = _cosine_sine(word1)
    radius = tl.sqrt(_squared_radius(word0))
    radius = (radius.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed_ptr, step_ptr, sample_ids, quads, stream):
    """Standard normals of features ``4 * quads + (0, 1, 2, 3)``, four float32 tensors."""
    word0, word1, word2, word3 = random_words(seed_ptr, step_ptr, sample_ids, quads, stream)
    eps0, eps1 = box_muller(word0, word1)
    eps2, eps3 = box_muller(word2, word3)
    return eps0, eps1, eps2, eps3


@triton.jit
def kept(seed_ptr, step_ptr, sample_ids, first_feature, stream, threshold, WIDTH: tl.constexpr):
    """Which of the WIDTH features from ``first_feature`` (a multiple of 4) dropout keeps: 0 or 1, int32 (rows, WIDTH).

    ``sample_ids`` (rows, 1). ``threshold`` is ``ceil(rate * 2**24 - 0.5)``: an entry stays where its 24 bits reach it.
    """
    quads = first_feature // 4 + tl.arange(0, WIDTH // 4)[None, :]
    word0, word1, word2, word3 = random_words(seed_ptr, step_ptr, sample_ids, quads, stream)
    even = tl.interleave(word0 >> 8, word2 >> 8)
    odd = tl.interleave(word1 >> 8, word3 >> 8)
    return (tl.interleave(even, odd).to(tl.int32) >= threshold).to(tl.int32)
