"""The definition of every operation, in plain PyTorch.

Everything here runs in any floating dtype up to float64 and on any device, and knows nobody in the package.
It is the oracle of all parity tests and the implementation that serves where nothing faster is built.
Formulas and names are those of the method's description ("noising", "interaction", "projection", "reverse
chain"); the paper is Semantic-Space-Intervened Diffusive Alignment (IJCAI 2025, arXiv 2505.05721).

Symbols: B rows, D feature size, d width, m expansion, K classes, T diffusion steps, S sampling steps, L
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Row-wise LayerNorm adds this to the variance, as torch.nn.LayerNorm does by default.
NORM_EPS = 1e-5

# Columns for which `row_statistics` gives one mean and one sum: the width of a kernel's tile.
STATISTICS_GROUP = 128

_MASK32 = 0xFFFFFFFF
# Philox4x32 multipliers minus 2**32. With them the int64 product of a 32-bit word stays below 2**62 in
# magnitude (no signed overflow); floor(x * M / 2**32) is then the product's upper half plus x, and the lower
# half is unchanged.
_M0_SIGNED = 0xD2511F53 - 2**32
_M1_SIGNED = 0xCD9E8D57 - 2**32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10


# ------------------------------------------------------------------------------------------------------------
# Counter-based random numbers (the randomness contract)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of one broadcast shape, each holding unsigned 32-bit words (0 .. 2**32 -
            1).
        key: two such tensors, broadcastable to the same shape.

    Returns:
        Four int64 tensors of the counters' broadcast shape, unsigned 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _M0_SIGNED, c2 * _M1_SIGNED
        high0, high1 = (product0 >> 32).add_(c0), (product1 >> 32).add_(c2)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), product1.bitwise_and_(_MASK32)
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), product0.bitwise_and_(_MASK32)
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def random_words(seed: Tensor, step: Tensor, sample_ids: Tensor, width: int, stream: int) -> Tensor:
    """Random 32-bit words of the contract: one row per sample, keyed by (seed, step, sample id, stream)
    alone.

    Args:
        seed: int64 (), its low and high 32 bits are the key.
        step: int64 (), counter word 2 (low 32 bits).
        sample_ids: int64 (B,), non-negative; low 32 bits are counter word 1, bits 32 to 55 go to counter word
            3.
        width: number of words per row.
        stream: 0 .. 255, low byte of counter word 3.

    Returns:
        int64 (B, width); feature j is word j % 4 of counter j // 4.
    """
    quads = torch.arange((width + 3) // 4, dtype=torch.int64, device=sample_ids.device)
    counter = (
        quads[None, :],
        (sample_ids & _MASK32)[:, None],
        (step & _MASK32).reshape(1, 1),
        (((sample_ids >> 32) << 8) | stream)[:, None] & _MASK32,
    )
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    return torch.stack(words, dim=-1).flatten(1)[:, :width]


def uniforms(words: Tensor) -> Tensor:
    """Words to uniforms in (0, 1): ``(x >> 8) * 2**-24 + 2**-25``. int64 (any) -> float64 (same).

    float64 holds these 25 significant bits exactly; float32 would round the largest to 1.
    """
    return (words >> 8).double().add_(0.5).mul_(2.0**-24)


def normals(seed: Tensor, step: Tensor, sample_ids: Tensor, width: int, stream: int) -> Tensor:
    """Standard normals of the contract, float64 (B, width): Box-Muller on words (0, 1) and (2, 3)."""
    u = uniforms(random_words(seed, step, sample_ids, (width + 3) // 4 * 4, stream)).unflatten(1, (-1, 2))
    radius = u[..., 0].log().mul_(-2.0).sqrt_()
    angle = u[..., 1].mul(2.0 * math.pi)
    pairs = torch.stack((angle.cos(), angle.sin()), dim=-1).mul_(radius[..., None])
    return pairs.flatten(1)[:, :width]


def dropout_keep(seed: Tensor, step: Tensor, sample_ids: Tensor, width: int, stream: int, dropout: float) -> Tensor:
    """Which entries dropout keeps: bool (B, width), true where the contract's uniform is at least
    ``dropout``.

    Decided on integers, so that every backend keeps the same entries: ``(w + 0.5) * 2**-24 >= p``.
    """
    threshold = math.ceil(dropout * 2**24 - 0.5)
    return (random_words(seed, step, sample_ids, width, stream) >> 8) >= threshold


def stratified_timesteps(
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    steps: int,
    stream: int,
    *,
    first_row: int = 0,
    batch: int | None = None,
) -> Tensor:
    """Stratified timesteps: row i of a batch of B gets ``floor((i + u_i) * T / B)``, ascending in i.

    Exact in integers up to ``B * T < 2**38``. ``sample_ids`` int64 (n,) name the rows, which are those from
    ``first_row`` on of a batch of ``batch`` rows, by default all; returns int64 (n,) in 0 .. T-1.
    """
    count = sample_ids.shape[0]
    batch = count if batch is None else batch
    offset = 2 * (random_words(seed, step, sample_ids, 1, stream)[:, 0] >> 8) + 1  # u_i * 2**25
    rows = torch.arange(first_row, first_row + count, dtype=torch.int64, device=sample_ids.device)
    return ((rows << 25) + offset) * steps // (max(batch, 1) << 25)


# ------------------------------------------------------------------------------------------------------------
# Noising


def q_sample(
    x0: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    *,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int = 0,
) -> Tensor:
    """Forward diffusion ``x = signal[tau] * x0 + noise[tau] * eps`` (Ho et al. 2020, eq. 4), eps from the
    counters.

    ``x0`` (B, D) floating, ``timesteps`` (B,) integer, ``signal`` and ``noise`` (T,), ``seed`` and ``step``
    int64 (), ``sample_ids`` int64 (B,). Returns (B, D) in x0's dtype; arithmetic in at least float32.
    """
    compute = torch.promote_types(x0.dtype, torch.float32)
    eps = normals(seed, step, sample_ids, x0.shape[1], stream).to(compute)
    tau = timesteps.long()
    x = signal.to(compute)[tau, None] * x0.to(compute) + noise.to(compute)[tau, None] * eps
    return x.to(x0.dtype)


def q_sample_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    """Gradient of `q_sample` with respect to ``x0``: ``signal[tau] * grad``. (B, D) -> (B, D)."""
    compute = torch.promote_types(grad.dtype, torch.float32)
    return (signal.to(compute)[timesteps.long(), None] * grad.to(compute)).to(grad.dtype)


# ------------------------------------------------------------------------------------------------------------
# Interaction


def layer_norm(h: Tensor) -> Tensor:
    """Row-wise LayerNorm without affine parameters. (B, d) -> (B, d)."""
    return F.layer_norm(h, h.shape[-1:], eps=NORM_EPS)


def row_statistics(h: Tensor) -> Tensor:
    """What the norm of the next block needs of its rows, in the form in which tiles of a product can leave
    it.

    ``h`` (B, d). Returns float32 (B, ceil(d/128), 2): the mean and the centred sum of squares of each group
    of 128 columns (the last may be shorter). Groups combine as in Chan et al. 1979, without cancellation.
    """
    groups = h.float().split(STATISTICS_GROUP, dim=1)
    means = torch.stack([group.mean(1) for group in groups], dim=1)
    squares = [(group - means[:, i, None]).square().sum(1) for i, group in enumerate(groups)]
    return torch.stack((means, torch.stack(squares, dim=1)), dim=2)


def interaction_block_forward(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One PFIN block with what its backward needs; see `interaction_block` for the arguments.

    ``keep`` bool (B, m*d) is `dropout_keep`'s mask, None without dropout.
    Returns ``(h_next (B, d), residual (B, d), pre (B, m*d), hidden (B, m*d))``: the block's result, the
    second
    product, the first product, and the gated activation after dropout.
    """
    tau = timesteps.long()
    z = layer_norm(h) * (1 + scale[tau]) + shift[tau]
    pre = F.linear(z, w_h, b_h)
    hidden = F.silu(pre) * gate
    if keep is not None:
        hidden = hidden * keep / (1 - dropout)
    residual = F.linear(hidden, w_o, b_o)
    return h + (1 + alpha[tau]) * residual, residual, pre, hidden


def interaction_block(
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    b_h: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    stream: int = 6,
) -> Tensor:
    """One block of the Progressive Feature Interaction Network::

        z  = n(h) * (1 + scale[tau]) + shift[tau]
        u  = silu(linear(z, w_h, b_h)) * gate,  then dropout
        h' = h + (1 + alpha[tau]) * linear(u, w_o, b_o)

    ``h`` (B, d), ``gate`` (B, m*d), ``timesteps`` (B,) integer, tables (T, d), ``w_h`` (m*d, d), ``b_h``
    (m*d,), ``w_o`` (d, m*d), ``b_o`` (d,). ``seed``, ``step``, ``sample_ids`` and ``stream`` key the dropout.
    Returns (B, d).
    """
    keep = None
    if dropout > 0:
        assert seed is not None and step is not None and sample_ids is not None
        keep = dropout_keep(seed, step, sample_ids, gate.shape[1], stream, dropout)
    return interaction_block_forward(h, gate, timesteps, shift, scale, alpha, w_h, b_h, w_o, b_o, keep, dropout)[0]


def interaction_block_backward(
    grad: Tensor,
    h: Tensor,
    gate: Tensor,
    timesteps: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    w_h: Tensor,
    w_o: Tensor,
    residual: Tensor,
    pre: Tensor,
    hidden: Tensor,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """Gradients of `interaction_block_forward`'s first result, written out.

    ``grad`` (B, d) is the gradient of ``h_next``. Returns the gradients of ``h, gate, shift, scale, alpha,
    w_h, b_h,
    w_o, b_o`` in this order, each in its argument's shape.
    """
    tau = timesteps.long()
    grad_residual = grad * (1 + alpha[tau])
    grad_hidden = grad_residual @ w_o
    if keep is not None:
        grad_hidden = grad_hidden * keep / (1 - dropout)
    sigmoid = torch.sigmoid(pre)
    grad_gate = grad_hidden * pre * sigmoid
    grad_pre = grad_hidden * gate * sigmoid * (1 + pre * (1 - sigmoid))

    normed, rstd = _normed(h)
    grad_z = grad_pre @ w_h
    grad_normed = grad_z * (1 + scale[tau])
    inner = grad_normed - grad_normed.mean(-1, keepdim=True)
    grad_h = grad + rstd * (inner - normed * (grad_normed * normed).mean(-1, keepdim=True))

    def table(rows: Tensor) -> Tensor:
        return _add_rows(torch.zeros_like(shift, memory_format=torch.contiguous_format), tau, rows)

    z = normed * (1 + scale[tau]) + shift[tau]
    return (
        grad_h,
        grad_gate,
        table(grad_z),
        table(grad_z * normed),
        table(grad * residual),
        grad_pre.t() @ z,
        grad_pre.sum(0),
        grad_residual.t() @ hidden,
        grad_residual.sum(0),
    )


def interaction_network_forward(
    x: Tensor,
    conditions: Sequence[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    b_x: Tensor,
    w_c: Tensor,
    b_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    keeps: Sequence[Tensor | None],
    dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """The whole PFIN with what its backward needs.

    ``x`` (B, D), ``conditions`` (B, ...) side by side are the condition, ``modulation`` (T, L, 3, d) holds shift,
    scale and alpha, the weights are those of `reverse_chain`, ``keeps`` has each block's `dropout_keep`.

    Returns:
        The prediction (B, D), and: the embedded condition and its norm (B, d); the gates' product (B, L*m*d), without
        bias and 1; one block after the other, the first products without bias (L*B, m*d), the gated activations after
        dropout (L*B, m*d) and the second products without bias (L*B, d); and the states and their modulated norms
        ((L+1)*B, d), the last of them plain.
    """
    condition = F.linear(torch.cat(tuple(conditions), dim=1), w_c, b_c)
    normed = layer_norm(condition)
    gates = F.linear(normed, w_g)
    states, modulated = [F.linear(x, w_x, b_x) + normed], []
    products: list[list[Tensor]] = [[], [], []]
    per_block = zip((1 + (gates + b_g)).chunk(len(w_h), dim=1), w_h, b_h, w_o, b_o, keeps, strict=True)
    for layer, (gate, *weights, keep) in enumerate(per_block):
        shift, scale, alpha = modulation[:, layer].unbind(1)
        given: list[Any] = [states[-1], gate, timesteps, shift, scale, alpha, *weights, keep, dropout]
        h_next, residual, pre, hidden = interaction_block_forward(*given)
        tau = timesteps.long()
        modulated.append(layer_norm(states[-1]) * (1 + scale[tau]) + shift[tau])
        states.append(h_next)
        for kept, value in zip(products, (pre - weights[1], hidden, residual - weights[3]), strict=True):
            kept.append(value)
    modulated.append(layer_norm(states[-1]))
    prediction = F.linear(modulated[-1], w_y, b_y)
    stacked = (torch.cat(parts) for parts in (*products, states, modulated))
    return prediction, [condition, normed, gates, *stacked]


def interaction_network_backward(
    grad: Tensor,
    x: Tensor,
    conditions: Sequence[Tensor],
    timesteps: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    w_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    saved: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    dropout: float = 0.0,
) -> list[Tensor]:
    """Gradients of `interaction_network_forward`'s prediction, written out; ``grad`` (B, D) is that of the prediction.

    Returns those of x, modulation, w_x, b_x, w_c, b_c, w_g, b_g, w_y and b_y, then those of each block's w_h, of its
    b_h, w_o and b_o, then those of the conditions.
    """
    condition, normed, gates, *stacked = saved
    blocks, rows = len(w_h), x.shape[0]
    pre, hidden, residual = (list(t.split(rows) if rows else [t] * blocks) for t in stacked[:3])
    states, modulated = (list(t.split(rows) if rows else [t] * (blocks + 1)) for t in stacked[3:])
    gate = (1 + (gates + b_g)).chunk(blocks, dim=1)
    d_h = _layer_norm_backward(states[-1], grad @ w_y)
    d_modulation = torch.zeros_like(modulation, memory_format=torch.contiguous_format)
    d_gates: list[Tensor] = []
    found: list[list[Tensor]] = [[], [], [], []]
    for i in reversed(range(blocks)):
        tables = modulation[:, i].unbind(1)
        given: list[Any] = [d_h, states[i], gate[i], timesteps, *tables, w_h[i], w_o[i]]
        given += [residual[i] + b_o[i], pre[i] + b_h[i], hidden[i], keeps[i], dropout]
        d_h, d_gate, *d_tables, d_w_h, d_b_h, d_w_o, d_b_o = interaction_block_backward(*given)
        d_modulation[:, i] = torch.stack(d_tables, dim=1)
        d_gates.insert(0, d_gate)
        for parts, value in zip(found, (d_w_h, d_b_h, d_w_o, d_b_o), strict=True):
            parts.insert(0, value)
    d_gates_whole = torch.cat(d_gates, dim=1)
    d_condition = _layer_norm_backward(condition, d_gates_whole @ w_g + d_h)
    ends = [d_h @ w_x, d_modulation, d_h.t() @ x, d_h.sum(0)]
    ends += [d_condition.t() @ torch.cat(tuple(conditions), dim=1), d_condition.sum(0)]
    ends += [d_gates_whole.t() @ normed, d_gates_whole.sum(0), grad.t() @ modulated[-1], grad.sum(0)]
    d_conditions = (d_condition @ w_c).split([part.shape[1] for part in conditions], dim=1)
    return [*ends, *(value for parts in found for value in parts), *d_conditions]


def _normed(h: Tensor) -> tuple[Tensor, Tensor]:
    """``n(h)`` (B, d) and the reciprocal deviations (B, 1), computed in at least float32: the square of what lies 256
    from a row's mean is no number of float16."""
    centred = h.to(torch.promote_types(h.dtype, torch.float32))
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return (centred * rstd).to(h.dtype), rstd.to(h.dtype)


def _add_rows(total: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """``total`` (n, d) with ``rows`` (B, d) added, in place, to those at ``places`` (B,), which may repeat.

    In a fixed order: on a GPU `index_add_` adds as its threads come to it, where `index_put_` sorts the places first.
    """
    if total.is_cuda:
        return total.index_put_((places,), rows, accumulate=True)
    return total.index_add_(0, places, rows)


def _layer_norm_backward(h: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `layer_norm` (B, d) from that of its result."""
    normed, rstd = _normed(h)
    return rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))


# ------------------------------------------------------------------------------------------------------------
# Projection


def centre_loss(features: Tensor, labels: Tensor, centres: Tensor, ignore_index: int) -> Tensor:
    """Mean over labelled rows and dimensions of ``(f - P[y])**2``, at least float32; 0 without a labelled row."""
    compute = torch.promote_types(features.dtype, torch.float32)
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0).long()
    difference = (features.to(compute) - centres.to(compute)[target]).masked_fill(~labelled[:, None], 0)
    return difference.square().sum() / (labelled.sum().clamp(min=1) * features.shape[1])


def unit_rows(values: Tensor) -> Tensor:
    """Rows (B, D) divided by their lengths, at least float32 on the way; rows of zeros stay so.

    The square of a length is soon no number of float16, nor is 1e-12, for which a length of 0 is taken; by float16's
    least normal number the gradient stays one of its numbers too.
    """
    compute = values.to(torch.promote_types(values.dtype, torch.float32))
    return F.normalize(compute, dim=1, eps=max(1e-12, torch.finfo(values.dtype).tiny)).to(values.dtype)


def semantic_projection_forward(
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`semantic_projection` and, third, the rows' log-sum-exp (B,) that the backward needs."""
    compute = torch.promote_types(features.dtype, torch.float32)
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0).long()
    rows = labelled.sum().clamp(min=1).to(compute)
    logits = F.linear(features, weight, bias).to(compute) / temperature
    log_normaliser = torch.logsumexp(logits, dim=1)
    true_logit = logits.gather(1, target[:, None])[:, 0]
    cross_entropy = log_normaliser - (1 - label_smoothing) * true_logit
    if label_smoothing > 0:  # 0 times the minus infinity of a class that a bias leaves out is no number
        cross_entropy = cross_entropy - label_smoothing * logits.mean(1)
    cross_entropy = cross_entropy.masked_fill(~labelled, 0).sum() / rows
    if centres is None:
        return cross_entropy.new_zeros(()), cross_entropy, log_normaliser
    return centre_loss(features, labels, centres, ignore_index), cross_entropy, log_normaliser


def semantic_projection(
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Centre loss and cross entropy of features against category centres and a class head.

    ``features`` f (B, D), ``labels`` y (B,) integer, ``centres`` P (K, D) or None, ``weight`` (K, D),
    ``bias`` (K,)::

        centre_loss   = mean over labelled rows and dimensions of (f - P[y])**2        (0 without centres)
        cross_entropy = mean over labelled rows of CE(linear(f, weight, bias) / temperature, y), smoothed

    Rows with ``ignore_index`` are skipped; without any labelled row both results are 0. With ``cosine`` the logits
    are ``(cos(f, weight) + bias) / temperature``. Returns two scalars.
    """
    if cosine:
        unit, prototypes = unit_rows(features), unit_rows(weight)
        entropy = semantic_projection(
            unit,
            labels,
            None,
            prototypes,
            bias,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )[1]
        if centres is None:
            return entropy.new_zeros(()), entropy
        return centre_loss(features, labels, centres, ignore_index), entropy
    return semantic_projection_forward(
        features,
        labels,
        centres,
        weight,
        bias,
        temperature=temperature,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )[:2]


def semantic_projection_backward(
    grad_centre: Tensor,
    grad_entropy: Tensor,
    features: Tensor,
    labels: Tensor,
    centres: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    log_normaliser: Tensor,
    *,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    centre_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `semantic_projection` for ``features, centres, weight, bias``, given those of its two
    scalars.

    That of the centres is None where there are none or ``centre_gradient`` is false.
    """
    compute = log_normaliser.dtype
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0).long()
    rows = labelled.sum().clamp(min=1).to(compute)
    logits = F.linear(features, weight, bias).to(compute) / temperature
    grad_logits = (logits - log_normaliser[:, None]).exp_() - label_smoothing / weight.shape[0]
    grad_logits.scatter_add_(1, target[:, None], grad_logits.new_full((len(target), 1), label_smoothing - 1))
    grad_logits = grad_logits.masked_fill_(~labelled[:, None], 0) * (grad_entropy / (rows * temperature))
    grad_bias = grad_logits.sum(0).to(bias.dtype)
    grad_logits = grad_logits.to(features.dtype)
    grad_features = grad_logits @ weight
    grad_centres = None
    if centres is not None:
        difference = (features.to(compute) - centres.to(compute)[target]).masked_fill(~labelled[:, None], 0)
        pull = difference * (2 * grad_centre / (rows * features.shape[1]))
        grad_features = (grad_features.to(compute) + pull).to(features.dtype)
        if centre_gradient:
            grad_centres = _add_rows(pull.new_zeros(centres.shape), target, -pull).to(centres.dtype)
    return grad_features, grad_centres, grad_logits.t() @ features, grad_bias


# ------------------------------------------------------------------------------------------------------------
# Memory


def memory_read(
    h: Tensor, keys: Tensor, values: Tensor, w_q: Tensor, b_q: Tensor, w_r: Tensor, b_r: Tensor, heads: int
) -> Tensor:
    """The state with what it reads from a memory: multi-head cross-attention (Vaswani et al. 2017, sec. 3.2).

    ``h`` (B, d), ``keys`` and ``values`` (K, d), ``w_q`` and ``w_r`` (d, d), ``b_q`` and ``b_r`` (d,); ``heads``
    H divides d. With q, k, v split into H parts of d / H columns::

        q  = linear(n(h), w_q, b_q)
        h' = h + linear(softmax(q k^T / sqrt(d / H)) v, w_r, b_r)

    Returns (B, d).
    """
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (F.linear(layer_norm(h), w_q, b_q), keys, values))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=2)
    return h + F.linear((weights @ v).transpose(0, 1).flatten(1), w_r, b_r)


# ------------------------------------------------------------------------------------------------------------
# Reverse chain


def embed_condition(condition: Tensor, w_c: Tensor, b_c: Tensor, w_g: Tensor, b_g: Tensor) -> tuple[Tensor, Tensor]:
    """What a network needs of its condition, independent of the step.

    ``condition`` (B, Dc), ``w_c`` (d, Dc), ``w_g`` (L*m*d, d). Returns ``n(c')`` (B, d) with ``c' =
    linear(condition,
    w_c, b_c)``, and the L gates ``1 + linear(n(c'), w_g, b_g)`` side by side, (B, L*m*d).
    """
    normed = layer_norm(F.linear(condition, w_c, b_c))
    return normed, 1 + F.linear(normed, w_g, b_g)


def reverse_chain(
    initial: Tensor,
    source: Tensor,
    condition: Tensor,
    coefficients: Tensor,
    modulation: Tensor,
    w_x: Tensor,
    b_x: Tensor,
    w_c: Tensor,
    b_c: Tensor,
    w_g: Tensor,
    b_g: Tensor,
    w_h: Sequence[Tensor],
    b_h: Sequence[Tensor],
    w_o: Sequence[Tensor],
    b_o: Sequence[Tensor],
    w_y: Tensor,
    b_y: Tensor,
    *,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
    noisy: bool = True,
) -> Tensor:
    """One stage's reverse diffusion with clean-target prediction and one affine update per step.

    At step i (0 .. S-1), with x the chain's state and ``a, b, c, e, w = coefficients[i]``::

        x0_hat  = PFIN(x, condition, tau_i)
        x      <- a * x0_hat + b * x + c * source + e * eps_i
        result += w * x0_hat

    ``initial`` and ``source`` (B, D), ``condition`` (B, Dc), ``coefficients`` (S, 5), ``modulation`` (S, L,
    3, d) with
    shift, scale, alpha of each step and block. Weights are PFIN's: ``w_x`` (d, D), ``w_c`` (d, Dc), ``w_g``
    (L*m*d, d), ``w_h`` L times (m*d, d), ``w_o`` L times (d, m*d), ``w_y`` (D, d), and their biases.
    ``eps_i`` are the contract's normals of ``stream`` at counter step ``step + 1 + i`` (``step`` itself keyed
    the initial state). ``noisy=False`` says that all e are 0: no normals are drawn.
    The state is the network's input: the gain sqrt(abar) is part of the coefficients. Returns (B, D).
    """
    normed_condition, gates = embed_condition(condition, w_c, b_c, w_g, b_g)
    gate = gates.chunk(len(w_h), dim=1)
    first_row = torch.zeros(initial.shape[0], dtype=torch.int64, device=initial.device)
    wide = torch.promote_types(initial.dtype, torch.float32)  # rounded coefficients would err alike at every row
    a, b, c, e, w = coefficients.to(wide).unbind(1)
    x, result = initial, torch.zeros_like(initial, dtype=wide)
    for i in range(coefficients.shape[0]):
        h = F.linear(x, w_x, b_x) + normed_condition
        for layer in range(len(w_h)):
            shift, scale, alpha = modulation[i, layer].unsqueeze(1).unbind(0)
            h = interaction_block(
                h,
                gate[layer],
                first_row,
                shift,
                scale,
                alpha,
                w_h[layer],
                b_h[layer],
                w_o[layer],
                b_o[layer],
            )
        x0_hat = F.linear(layer_norm(h), w_y, b_y)
        result = result + w[i] * x0_hat
        if i + 1 < coefficients.shape[0]:
            x = a[i] * x0_hat + b[i] * x + c[i] * source
            if noisy:
                x = (x + e[i] * normals(seed, step + 1 + i, sample_ids, x.shape[1], stream).to(wide)).to(x.dtype)
    return result.to(initial.dtype)


# ------------------------------------------------------------------------------------------------------------
# The optimiser's step


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm () of all gradients together, as `torch.nn.utils.clip_grad_norm_` takes it."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    return norm


def weight_update(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    average: Sequence[Tensor],
    steps: Sequence[Tensor],
    norm: Tensor,
    clip_norm: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    moved: float,
) -> None:
    """Clipping, AdamW (Loshchilov and Hutter 2019, algorithm 2) and a moving average, all in place.

    For each weight w with gradient g, moments m and v, average e and number of steps n ()::

        g <- g min(1, clip_norm / (norm + 1e-6))        n <- n + 1
        m <- m + (1 - beta1) (g - m)                    v <- beta2 v + (1 - beta2) g**2
        w <- w (1 - learning_rate weight_decay)
               - learning_rate / (1 - beta1**n) m / (sqrt(v / (1 - beta2**n)) + epsilon)
        e <- e + moved (w - e)

    ``norm`` () is `gradient_norm` of the whole model; the gradients themselves stay.
    """
    clip = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for w, g, m, v, e, n in zip(weights, grads, exp_avg, exp_avg_sq, average, steps, strict=True):
        n += 1
        g = g * clip
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first, second = (1 - beta ** n.double() for beta in (beta1, beta2))
        root = (v / second.to(v.dtype)).sqrt() + epsilon
        w.mul_(1 - learning_rate * weight_decay).sub_((learning_rate / first).to(w.dtype) * m / root)
        e.lerp_(w, moved)
