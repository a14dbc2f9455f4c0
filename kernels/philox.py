"""Counter-based random numbers inside a kernel: Philox4x32-10 words, normals, dropout masks.

The contract: key = (seed low, seed high), counter = (feature // 4, sample id low, step, stream | sample id high << 8).
The integers are those of every other backend bit by bit, the normals agree to 2e-6.
"""

import math

import triton
import triton.language as tl

# Triton's own library functions are interpreted only if TRITON_INTERPRET=1 stood when Triton was imported.
INTERPRETED = not isinstance(tl.philox_impl, triton.JITFunction)

_INTERPRETED = tl.constexpr(INTERPRETED)

_MINUS_2_LN_2 = tl.constexpr(-2 * math.log(2))
# Philox4x32-10: the multipliers of a round, and what a round adds to the key (Salmon et al. 2011, table 2).
_FACTOR_0, _FACTOR_2 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_KEY_0, _KEY_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def _halves(word, FACTOR: tl.constexpr):
    """High and low word of the product of two uint32 numbers: one instruction, where the compiler makes two or more."""
    if _INTERPRETED:
        product = word.to(tl.uint64) * FACTOR
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$1, $0}, product; }", "=r,=r,r,n",
            [word, FACTOR], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four uint32 tensors; `tl.philox_impl` with fewer instructions."""
    for _ in tl.static_range(10):
        high0, low0 = _halves(c0, _FACTOR_0)
        high2, low2 = _halves(c2, _FACTOR_2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += tl.cast(_KEY_0, tl.uint32)
        k1 += tl.cast(_KEY_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random_words(seed_ptr, step_ptr, sample_ids, quads, stream):
    """Four uint32 words for each pair of a sample id (int64) and a group of four features (integer), broadcast.

    ``seed_ptr`` and ``step_ptr`` point to one int64 each: a captured graph reads their value at every replay.
    """
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr)
    zero = quads * 0 + sample_ids * 0
    return _rounds(
        (zero + quads).to(tl.uint32),
        (zero + sample_ids).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + (((sample_ids >> 32) << 8) | stream)).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _log2(u):
    """The GPU's own logarithm of u in (0, 1]: 2**-22 absolute above 1/2, 2**-22 relative below (PTX, lg2.approx)."""
    if _INTERPRETED:
        return tl.log2(u)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _squared_radius(word):
    """``-2 ln u`` with ``u = (w + 0.5) * 2**-24``, ``w = word >> 8``, so that its root is right to 1e-6 everywhere.

    An error d of the square is one of d / 2r of the radius r. That of the GPU's logarithm, 3.3e-7 where u is above 1/2,
    would be too much where r is small: within 1/64 of 1 a series in f = 1 - u, which is exact there, serves, with an
    error of 2.4e-7 f. Beyond, d / 2r is at most 9.4e-7, and below 1/2 it is 1.2e-7 r, less than 7.1e-7.
    """
    w = (word >> 8).to(tl.int32).to(tl.float32)
    far = _log2(w * 5.9604644775390625e-08 + 2.98023223876953125e-08) * _MINUS_2_LN_2
    # u has 25 significant bits, one more than float32; both differences are exact near 1.
    f = (1.0 - w * 5.9604644775390625e-08) - 2.98023223876953125e-08
    near = ((0.6666666666666666 * f + 1.0) * f + 2.0) * f
    return tl.where(f < 0.015625, near, far)


@triton.jit
def _cosine_sine(word):
    """``cos`` and ``sin`` of ``2 pi u`` folded into half a turn, and the sign bit that both then take.

    The fold is exact, in integers: u = half / 2 + x, x in [-1/4, 1/4).
    """
    # Shifted out is the bit of half a turn; what is left, as a signed number, is x * 2**33, of 24 bits.
    x = (((word << 1) & 0xFFFFFE00) | 0x100).to(tl.int32, bitcast=True).to(tl.float32) * 1.1641532182693481e-10
    s = x * x
    # Minimax in s: 3e-9 for the sine, 5e-8 for the cosine.
    sine = (((39.53670120 * s - 76.54977982) * s + 81.60100555) * s - 41.34165573) * s + 6.283185005
    cosine = (((56.34064102 * s - 85.25400543) * s + 64.93521881) * s - 19.73918152) * s + 1.0
    return cosine, sine * x, (word + 0x40000000) & 0x80000000


@triton.jit
def box_muller(word0, word1, deviation=1.0):
    """Two float32 normals from two uint32 words: ``r cos 2 pi u1`` and ``r sin 2 pi u1``, r**2 = -2 ln u0."""
    cosine, sine, sign = _cosine_sine(word1)
    radius = tl.sqrt(_squared_radius(word0)) * deviation
    radius = (radius.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed_ptr, step_ptr, sample_ids, quads, stream, deviation=1.0):
    """Normals of features ``4 * quads + (0, 1, 2, 3)`` of that standard deviation, four float32 tensors."""
    word0, word1, word2, word3 = random_words(seed_ptr, step_ptr, sample_ids, quads, stream)
    eps0, eps1 = box_muller(word0, word1, deviation)
    eps2, eps3 = box_muller(word2, word3, deviation)
    return eps0, eps1, eps2, eps3


@triton.jit
def features_of_quads(quad0, quad1, quad2, quad3):
    """Four (rows, n) tensors, one for each feature of n quads -> (rows, 4 n) in the features' order."""
    return tl.interleave(tl.interleave(quad0, quad2), tl.interleave(quad1, quad3))


@triton.jit
def row_normals(seed_ptr, step_ptr, ids, first_feature, stream, deviation, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Normals of the WIDTH features from ``first_feature`` (a multiple of 8) of each row, (rows, WIDTH).

    ``ids`` and ``deviation`` (rows, 1). A thread makes as many neighbours as it stores at once, so that they need
    not go through shared memory: four of float32, eight in half precision (HALF).
    """
    if HALF:
        quads = first_feature // 4 + 2 * tl.arange(0, WIDTH // 8)[None, :]
        a0, a1, a2, a3 = normals(seed_ptr, step_ptr, ids, quads, stream, deviation)
        b0, b1, b2, b3 = normals(seed_ptr, step_ptr, ids, quads + 1, stream, deviation)
        even, odd = features_of_quads(a0, a2, b0, b2), features_of_quads(a1, a3, b1, b3)
        return tl.interleave(even, odd)
    else:
        quads = first_feature // 4 + tl.arange(0, WIDTH // 4)[None, :]
        eps0, eps1, eps2, eps3 = normals(seed_ptr, step_ptr, ids, quads, stream, deviation)
        return features_of_quads(eps0, eps1, eps2, eps3)


@triton.jit
def kept(seed_ptr, step_ptr, sample_ids, first_feature, stream, threshold, WIDTH: tl.constexpr):
    """Which of the WIDTH features from ``first_feature`` (a multiple of 4) dropout keeps: 0 or 1, int32 (rows, WIDTH).

    ``sample_ids`` (rows, 1). ``threshold`` is ``ceil(rate * 2**24 - 0.5)``: an entry stays where its 24 bits reach it.
    """
    quads = first_feature // 4 + tl.arange(0, WIDTH // 4)[None, :]
    word0, word1, word2, word3 = random_words(seed_ptr, step_ptr, sample_ids, quads, stream)
    words = features_of_quads(word0 >> 8, word1 >> 8, word2 >> 8, word3 >> 8)
    return (words.to(tl.int32) >= threshold).to(tl.int32)
