"""A training step, from the gather of a batch to the moving average, against the same algebra in plain PyTorch."""

import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seda_fast import SeDA, SeDAConfig, TrainConfig, reference, use_backend
from seda_fast.engine import Stepper
from seda_fast.loop import TrainingSet
from seda_fast.nn import PFIN
from seda_fast.prepare import READERS
from seda_fast.streaming import RowReader, StreamedSet

ROWS = {"cuda": 4096, "cpu": 1024}
BATCHES = 8
TOTAL_STEPS = 10_000
SIZES = {"visual_dim": 768, "text_dim": 384, "n_classes": 100}
SMALL = {"visual_dim": 24, "text_dim": 16, "n_classes": 5, "width": 32, "visual_width": 32, "diffusion_steps": 50}
QUIET = TrainConfig(
    dropout=0.0, condition_dropout=0.0, translator_dropout=0.0, visual_dropout=0.0, visual_input_dropout=0.0
)


class Draw(NamedTuple):
    """The random numbers of a step: timesteps (B,), and noise like the features."""

    tau_s: Tensor
    tau_t: Tensor
    visual: Tensor
    text: Tensor


def draw(visual: Tensor, text: Tensor, steps: int) -> Draw:
    """As one would draw them in PyTorch."""
    rows = torch.arange(len(visual), device=visual.device)
    taus = [((rows + torch.rand(len(rows), device=rows.device)) * steps / len(rows)).long() for _ in range(2)]
    return Draw(*taus, torch.randn_like(visual), torch.randn_like(text))


def network(net: PFIN, x: Tensor, condition: Tensor, tau: Tensor, dropout: float) -> Tensor:
    """PFIN in plain PyTorch, with tables over timesteps."""
    tables = net.modulation(torch.arange(net.steps, device=x.device))
    return denoised(net, x, *conditioned(net, condition), tables, tau, dropout)


def conditioned(net: PFIN, condition: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a network makes of its condition, whatever the timestep."""
    c = F.layer_norm(net.condition(condition), (net.condition.out_features,))
    return c, (1 + net.gates(c)).chunk(len(net.blocks), dim=1)


def denoised(
    net: PFIN, x: Tensor, c: Tensor, gates: tuple[Tensor, ...], tables: Tensor, tau: Tensor, dropout: float
) -> Tensor:
    """The rest of it; ``tau`` are rows of the ``tables`` (L, 3, T, d)."""
    h = net.input(x) + c
    for layer, block in enumerate(net.blocks):
        shift, scale, alpha = tables[layer].unbind(0)
        z = F.layer_norm(h, (h.shape[1],)) * (1 + scale[tau]) + shift[tau]
        u = F.dropout(F.silu(block.hidden(z)) * gates[layer], dropout)
        h = h + (1 + alpha[tau]) * block.output(u)
    return net.output(F.layer_norm(h, (h.shape[1],)))


def gaussian_dropout(x: Tensor, rate: float) -> Tensor:
    return x * (1 + math.sqrt(rate / (1 - rate)) * torch.randn_like(x)) if rate else x


def plain_loss(model: SeDA, visual: Tensor, text: Tensor, labels: Tensor, drawn: Draw, s: TrainConfig) -> Tensor:
    """The objective for rows that all have label and text."""
    x_v = model.signal[drawn.tau_s, None] * visual + model.noise[drawn.tau_s, None] * drawn.visual
    told = gaussian_dropout(visual, s.condition_dropout)
    semantic = network(model.learner.network, x_v, told, drawn.tau_s, s.dropout)
    x_t = model.signal[drawn.tau_t, None] * text + model.noise[drawn.tau_t, None] * drawn.text
    told = gaussian_dropout(visual, s.translator_dropout)
    condition = torch.cat((gaussian_dropout(semantic, s.condition_dropout), told), dim=1)
    mapped = network(model.translator.network, x_t, condition, drawn.tau_t, s.dropout)
    hidden = model.visual.norm(model.visual.input(gaussian_dropout(visual, s.visual_input_dropout)))
    hidden = gaussian_dropout(F.gelu(hidden), s.visual_dropout)
    still, temperature = mapped.detach(), s.teacher_temperature

    def entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=s.label_smoothing)

    by_s, by_t, by_text = model.learner.head(semantic), model.translator.head(still), model.translator.head(text)
    with torch.no_grad():
        target = F.log_softmax(by_text / temperature, dim=1)
    divergence = sum(
        F.kl_div(F.log_softmax(logits / temperature, dim=1), target, reduction="batchmean", log_target=True)
        for logits in (by_s, by_t)
    )
    terms = (
        F.mse_loss(semantic, model.centres[labels]),
        entropy(by_s),
        F.mse_loss(mapped, text),
        entropy(by_t),
        entropy(by_text),
        temperature**2 / 2 * divergence,
        entropy(model.visual.head(hidden)),
    )
    return sum(weight * term for weight, term in zip(s.loss_weights, terms, strict=True))  # type: ignore[return-value]


class Plain:
    """A trainer as a good engineer writes it: fused AdamW, no needless copies; ``loss`` may be compiled."""

    def __init__(
        self, model: SeDA, data: TrainingSet, rows: int, loss: Callable[..., Tensor], settings: TrainConfig
    ) -> None:
        self.model, self.data, self.rows, self.loss, self.settings = model, data, rows, loss, settings
        rate = settings.learning_rate
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)
        self.average = [p.detach().clone() for p in model.parameters()]
        self.cursor, self.moved = 0, 0.005

    def step(self, index: Tensor | None = None) -> Tensor:
        """On the rows ``index``, by default the next of the set."""
        if index is None:
            index = torch.arange(self.cursor, self.cursor + self.rows, device=self.data.device)
            self.cursor = (self.cursor + self.rows) % len(self.data)
        visual, text, labels = self.data.visual[index], self.data.text[index], self.data.labels[index]
        cuda = self.data.device.type == "cuda"
        context: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        with context:
            drawn = draw(visual, text, self.model.config.diffusion_steps)
            loss = self.loss(self.model, visual, text, labels, drawn, self.settings)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), self.moved)
        return loss.detach()


def training_set(config: SeDAConfig, rows: int, device: torch.device) -> TrainingSet:
    labels = torch.arange(rows) % config.n_classes
    visual, text = torch.randn(rows, config.visual_dim), torch.randn(rows, config.text_dim)
    fields = (visual, text, labels, torch.ones(rows, dtype=torch.bool), torch.arange(rows))
    return TrainingSet(*(field.to(device) for field in fields))


def endless(stepper: Stepper, rows: int) -> Iterator[None]:
    """One step after the other, epoch after epoch."""
    while True:
        yield from stepper.steps(list(torch.arange(len(stepper.data)).split(rows)))


def ours(
    model: SeDA, data: TrainingSet, rows: int, settings: TrainConfig, engine: Any = "auto"
) -> Callable[[], Tensor]:
    """A step of the library's own loop, by default with the engine that it chooses."""
    precision: Any = "bf16" if data.device.type == "cuda" else "fp32"
    settings = TrainConfig(**{**settings.__dict__, "batch_size": rows})
    stepper = Stepper(model, data, settings, TOTAL_STEPS, engine=engine, precision=precision)
    walk = endless(stepper, rows)

    def step() -> Tensor:
        if stepper.done % TOTAL_STEPS == 0:
            stepper.step.zero_()  # a run has no more learning rates than that
        stepper.sums.zero_()
        next(walk)
        return stepper.sums[0] / rows

    return step


def assert_same_loss(model: SeDA, data: TrainingSet, rows: int) -> None:
    """With the same timesteps and noise and without dropout, both objectives and their gradients agree."""
    model, index = copy.deepcopy(model).double(), torch.arange(rows, device=data.device)
    visual, text, labels, paired, ids = data.rows(index)
    visual, text = visual.double(), text.double()
    seed, step = (torch.tensor(n, device=data.device) for n in (3, 5))
    taus = [reference.stratified_timesteps(seed, step, ids, model.config.diffusion_steps, n) for n in (2, 3)]
    noise = [reference.normals(seed, step, ids, x.shape[1], n) for n, x in ((0, visual), (1, text))]
    found = model.losses(visual, text, labels, paired, ids, seed=seed, step=step, settings=QUIET).total
    expected = plain_loss(model, visual, text, labels, Draw(*taus, *noise), QUIET)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def flops_a_row(model: SeDA) -> float:
    """What a row adds to the products of a step, counted by PyTorch: what needs no gradient has no backward, and the
    tables over timesteps are of no row."""

    def counted(rows: int) -> int:
        data = training_set(model.config, rows, torch.device("cpu"))
        drawn = draw(data.visual, data.text, model.config.diffusion_steps)
        with FlopCounterMode(display=False) as counter:
            plain_loss(own, data.visual, data.text, data.labels, drawn, TrainConfig().for_rows(rows)).backward()
        return counter.get_total_flops()

    own = copy.deepcopy(model).cpu()
    return (counted(16) - counted(8)) / 8


def assert_same_on_backend(
    model: SeDA,
    data: TrainingSet,
    rows: int,
    close: Any,
    name: str = "seda_fast",
    loss: Any = None,
    spare: float = 0.0,
) -> None:
    """What is timed, on the backend and in the precision that it is timed in: the objective and its gradients err no
    more than plain PyTorch's do, without dropout.

    Args:
        loss: a competitor's, called as `plain_loss`; None for ours.
        spare: roundings that each entry may be off besides.
    """
    visual, text, labels, paired, ids = data.rows(torch.arange(rows, device=data.device))
    seed, step = (torch.tensor(n, device=data.device) for n in (3, 5))
    taus = [reference.stratified_timesteps(seed, step, ids, model.config.diffusion_steps, n) for n in (2, 3)]
    noise = [reference.normals(seed, step, ids, x.shape[1], n) for n, x in ((0, visual), (1, text))]
    half = data.device.type == "cuda"

    def gradients(own: SeDA, loss: Callable[[], Tensor], lower: bool) -> dict[str, Tensor]:
        with torch.autocast(data.device.type, torch.bfloat16, enabled=lower):
            value = loss()
        found = torch.autograd.grad(value, list(own.parameters()))
        return {"the loss": value.detach(), **dict(zip(dict(own.named_parameters()), found, strict=True))}

    wide, drawn = copy.deepcopy(model).double(), Draw(*taus, *(n.float() for n in noise))
    exact = gradients(
        wide,
        lambda: plain_loss(wide, visual.double(), text.double(), labels, Draw(*taus, *noise), QUIET),
        False,
    )
    usual = gradients(model, lambda: plain_loss(model, visual, text, labels, drawn, QUIET), half)
    given = (visual, text, labels, paired, ids)

    def timed() -> Tensor:
        if loss is not None:
            return loss(model, visual, text, labels, drawn, QUIET)
        return model.losses(*given, seed=seed, step=step, settings=QUIET).total

    # A gradient of autocast's has the weights' dtype and the products' roundings.
    dtype = torch.bfloat16 if half else torch.float32
    for part, value in gradients(model, timed, half).items():
        contract = spare * torch.finfo(dtype).eps * float(exact[part].square().mean().sqrt())
        what = f"{name}, {part} of a step of {rows} rows"
        close(value.to(dtype), exact[part], usual[part].to(dtype), what, contract=contract)


def bench_training_step(
    contest: Any, device: torch.device, quick: bool, workload: Any, compile_variants: Any, close: Any
) -> None:
    rows = 32 if quick else ROWS[device.type]
    config = SeDAConfig(**{**SIZES, **(SMALL if quick else {})})
    data = training_set(config, BATCHES * rows, device)
    settings = TrainConfig().for_rows(len(data))
    model = SeDA(config).to(device)
    assert_same_loss(model, data, min(rows, 64))
    assert_same_on_backend(model, data, rows, close)
    steps = {"seda_fast": ours(copy.deepcopy(model), data, rows, settings)}
    for engine in ("eager", "compile"):
        if engine != ("eager" if device.type == "cpu" else "graph"):  # what auto chooses
            steps[f"seda_fast, engine {engine}"] = ours(copy.deepcopy(model), data, rows, settings, engine)
    variants: dict[str, Callable[..., Tensor]] = {
        "eager": plain_loss,
        **compile_variants(plain_loss, device, large=True),
    }
    if device.type == "cuda":
        variants["compiled, reduce-overhead"] = torch.compile(
            plain_loss, mode="reduce-overhead", fullgraph=True, dynamic=False
        )
    for name, loss in variants.items():
        steps[name] = Plain(copy.deepcopy(model), data, rows, loss, settings).step

    def check(name: str, result: Tensor) -> None:
        # The first losses of one model under other random numbers.
        expected = plain_loss(model, *data.rows(torch.arange(rows, device=device))[:3], drawn, settings)
        torch.testing.assert_close(result.float(), expected.float(), rtol=0.1, atol=0.1, msg=name)

    with torch.no_grad():
        drawn = draw(data.visual[:rows], data.text[:rows], config.diffusion_steps)
    parameters = sum(p.nbytes for p in model.parameters())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Weights, two moments and the average are read and written once, gradients once.
    moved = 10.0 * parameters + 4.0 * rows * (config.visual_dim + config.text_dim)
    title = f"training step, B = {rows}"
    flops = rows * flops_a_row(model)
    contest(workload(title, "interaction_block", moved, flops, dtype, host=True), steps, check)


def bench_epoch(contest: Any, device: torch.device, quick: bool, workload: Any) -> None:
    """What a whole run of ``python -m seda_fast.train`` repeats: an epoch of 20 batches with the defaults."""
    rows, batches = (32, 2) if quick else (256, 20)
    config = SeDAConfig(**{**SIZES, **(SMALL if quick else {})})
    data = training_set(config, batches * rows, device)
    settings = TrainConfig().for_rows(len(data))
    model = SeDA(config).to(device)
    assert_same_loss(model, data, min(rows, 64))
    steps = {
        "seda_fast": ours(copy.deepcopy(model), data, rows, settings),
        "eager": Plain(copy.deepcopy(model), data, rows, plain_loss, settings).step,
    }

    def epoch(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.stack([step() for _ in range(batches)]).mean()

    def check(name: str, result: Tensor) -> None:
        assert torch.isfinite(result), name

    parameters = sum(p.nbytes for p in model.parameters())
    moved = batches * (10.0 * parameters + 4.0 * rows * (config.visual_dim + config.text_dim))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = workload(
        f"an epoch, {batches} batches of {rows}", "interaction_block", moved,
        batches * rows * flops_a_row(model), dtype, host=True,
    )  # fmt: skip
    contest(work, {name: epoch(step) for name, step in steps.items()}, check)


def streamed(data: TrainingSet, folder: Path) -> StreamedSet:
    """The same rows, read from files of ``folder``."""
    device, readers = data.device, []
    for name, features in (("visual", data.visual), ("text", data.text)):
        np.save(folder / f"{name}.npy", features.cpu().numpy())
        array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
        readers.append(RowReader(array, READERS if device.type == "cuda" else 1))
    moments = [f(x.shape[1], device=device) for x in (data.visual, data.text) for f in (torch.zeros, torch.ones)]
    return StreamedSet(*readers, *moments, data.labels, data.paired, data.sample_ids)


def bench_other_steps(contest: Any, device: torch.device, quick: bool, workload: Any, tmp_path: Path) -> None:
    """Passes over rows that are read from files, and in fp16, against passes over rows on the device."""
    rows, batches = (32, 2) if quick else (ROWS[device.type], BATCHES)
    config = SeDAConfig(**{**SIZES, **(SMALL if quick else {})})
    data = training_set(config, batches * rows, device)
    settings = TrainConfig(**{**TrainConfig().for_rows(len(data)).__dict__, "batch_size": rows})
    model = SeDA(config).to(device)
    usual: Any = "bf16" if device.type == "cuda" else "fp32"
    kinds: dict[str, tuple[Any, Any]] = {
        "seda_fast": (data, usual),
        "seda_fast, batches from files": (streamed(data, tmp_path), usual),
        **({"seda_fast, fp16": (data, "fp16")} if device.type == "cuda" else {}),
    }
    parts = list(torch.arange(len(data)).split(rows))

    def passing(read: Any, precision: Any) -> Callable[[], Tensor]:
        own = copy.deepcopy(model)
        stepper = Stepper(own, read, settings, TOTAL_STEPS, engine="auto", precision=precision)

        def epoch() -> Tensor:
            stepper.sums.zero_()
            for _ in stepper.steps(parts):
                pass
            return stepper.sums[0] / len(data)

        return epoch

    passes = {name: passing(*kind) for name, kind in kinds.items()}

    def check(name: str, result: Tensor) -> None:
        # Of one model, the same rows and the same random numbers, a pass over all of them.
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05, msg=name)

    expected = passing(data, usual)()
    parameters = sum(p.nbytes for p in model.parameters())
    moved = batches * (10.0 * parameters + 4.0 * rows * (config.visual_dim + config.text_dim))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    title, flops = f"{batches} steps, B = {rows}", batches * rows * flops_a_row(model)
    contest(workload(title, "interaction_block", moved, flops, dtype, host=True), passes, check)


BATCH_SIZES = (1, 16, 256, 1024, 4096, 16384, 65536)
GROWTH: dict[str, tuple[str, dict[str, Sequence[int]]]] = {
    "classes, K": ("n_classes", {"cpu": [128, 512, 2048], "cuda": [128, 1024, 8192, 32768]}),
    "width, d": ("width", {"cpu": [128, 256, 512], "cuda": [128, 256, 512, 1024]}),
    "training rows, N": ("rows", {"cpu": [1024, 4096, 16384, 65536], "cuda": [4096, 16384, 65536, 262144]}),
    "sampling steps, S": ("steps", {"cpu": [2, 8, 32], "cuda": [2, 8, 32, 128]}),
}


# So many rows of a batch have their loss and gradients compared with float64.
CHECKED = {"cuda": 4096, "cpu": 1024}


def spare_of(rows: int) -> float:
    """Roundings that few rows' gradients are allowed: eager's own of 1 and 16 rows lean to one side by up to 4."""
    return 8.0 if rows < 256 else 0.0


class Point(NamedTuple):
    """One size's call, and what raises where the call's result, or what it was made by, is wrong."""

    call: Callable[[], Any]
    check: Callable[[Any], None]


def point(name: str, value: int, device: torch.device, quick: bool, close: Any) -> Point:
    """A training step, an epoch of ``rows`` rows, or a reverse chain of ``steps`` steps, all else as by default."""
    rows = 32 if quick else 256
    sizes = {**SIZES, **(SMALL if quick else {}), **({name: value} if name in ("n_classes", "width") else {})}
    config = SeDAConfig(**sizes)
    model = SeDA(config).to(device)
    if name == "steps":
        return chain_point(model, torch.randn(64, config.visual_dim, device=device), value, close)
    data = training_set(config, value if name == "rows" else 2 * rows, device)
    kept = copy.deepcopy(model)
    step = ours(model, data, rows, TrainConfig())

    def check(result: Any) -> None:
        assert torch.stack(result if isinstance(result, list) else [result]).isfinite().all(), f"{name} = {value}"
        assert_same_loss(kept, data, min(rows, 64))
        assert_same_on_backend(kept, data, rows, close, spare=spare_of(rows))

    return Point((lambda: [step() for _ in range(value // rows)]) if name == "rows" else step, check)


def chain_point(model: SeDA, visual: Tensor, steps: int, close: Any) -> Point:
    """Both stages of a prediction, the textual one of ``steps`` steps."""

    def aligned(model: SeDA, visual: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return model.align(visual, steps=steps, semantic_steps=1)

    def check(result: tuple[Tensor, Tensor]) -> None:
        with use_backend("reference"):
            exact, usual = aligned(copy.deepcopy(model).double(), visual.double()), aligned(model, visual)
        for stage, *three in zip(("semantic", "textual"), result, exact, usual, strict=True):
            close(*three, f"seda_fast, the {stage} stage of {steps} steps")

    return Point(lambda: aligned(model, visual), check)


@pytest.mark.timeout(1800)  # the largest points take minutes on a slow CPU
@pytest.mark.parametrize("what", list(GROWTH))
def bench_growth(contest: Any, device: torch.device, quick: bool, growth: Any, close: Any, what: str) -> None:
    """How time grows with one size while the others stay."""
    name, values = GROWTH[what]
    sizes = values[device.type][: 2 if quick else None]
    # An eighth of the rows has as many steps, of smaller batches.
    sizes = [n // 8 for n in sizes] if quick and name == "rows" else sizes
    points = {n: point(name, n, device, quick, close) for n in sizes}
    kind = {"rows": "an epoch", "steps": "a reverse chain"}.get(name, "a training step")

    def check(competitor: str, n: int, result: Any) -> None:
        points[n].check(result)

    growth(contest, f"{kind} over {what}", {n: of.call for n, of in points.items()}, check)


def expected_loss(model: SeDA, data: TrainingSet, rows: int, settings: TrainConfig) -> tuple[float, float]:
    """What a step of the first ``rows`` rows should say, with other random numbers, and how far from it it may be.

    A tenth, as of other steps; the few rows of a small batch differ by more, which several draws tell.
    """
    visual, text, labels, *_ = data.rows(torch.arange(rows, device=data.device))
    draws = 16 if rows < 256 else 1
    with torch.no_grad():
        drawn = (draw(visual, text, model.config.diffusion_steps) for _ in range(draws))
        found = torch.stack([plain_loss(model, visual, text, labels, one, settings).float() for one in drawn])
    spread = float(found.std()) if draws > 1 else 0.0
    return float(found.mean()), 0.1 * float(found.mean()) + 8 * spread


@pytest.mark.timeout(3600)  # the largest steps take most of a minute each on a slow CPU
def bench_batch_sizes(contest: Any, device: torch.device, quick: bool, growth: Any, any_size: Any, close: Any) -> None:
    """A step at every batch size against eager and compiled, which is compiled for all sizes at once."""
    sizes = BATCH_SIZES[: 2 if quick else None]
    config = SeDAConfig(**{**SIZES, **(SMALL if quick else {})})
    data, model = training_set(config, 2 * sizes[-1], device), SeDA(config).to(device)
    # So slow that the weights stay: all sizes' losses are then of the same model.
    settings = dataclasses.replace(TrainConfig().for_rows(len(data)), learning_rate=1e-9)
    losses: dict[str, Any] = {"eager": plain_loss, **any_size(plain_loss, device)}
    trained = {name: copy.deepcopy(model) for name in losses}
    points: dict[int, Callable[[], Tensor]]
    points = {rows: ours(copy.deepcopy(model), data, rows, settings) for rows in sizes}
    others = {
        name: {rows: Plain(trained[name], data, rows, loss, settings).step for rows in sizes}
        for name, loss in losses.items()
    }

    @cache
    def expected(rows: int) -> tuple[float, float]:
        return expected_loss(model, data, rows, settings)

    def check(name: str, rows: int, result: Tensor) -> None:
        loss, allowed = expected(rows)
        off = abs(float(result) - loss)
        assert off <= allowed, (
            f"{name}, {rows} rows: a loss of {float(result):.4f}, expected {loss:.4f} ± {allowed:.4f}"
        )
        if name == "seda_fast":
            assert_same_loss(model, data, min(rows, 64))
        if rows <= CHECKED[device.type]:
            assert_same_on_backend(model, data, rows, close, name, losses.get(name), spare_of(rows))

    # Each of these sizes is code of its own where a compiler takes a batch of one row, and no dropout, for another.
    with torch._dynamo.config.patch(recompile_limit=64):
        growth(contest, "a training step over rows of a batch, B", points, check, others)


# Processes that are started for a figure: what compiles takes a minute of them each.
STARTS = {"eager": 5, "compile": 1, "graph": 1}
FIRST_STEP = """
import sys, time
start = time.perf_counter()
import torch
torch_in = time.perf_counter()
import seda_fast
package_in = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import bench_train
from seda_fast.engine import Stepper
from seda_fast.measure import peak_memory_bytes
config = bench_train.SeDAConfig(**bench_train.SIZES)
data = bench_train.training_set(config, 2048, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
model = bench_train.SeDA(config).to(data.device)
settings = bench_train.TrainConfig(batch_size=256)
walk = bench_train.endless(Stepper(model, data, settings, 10_000, engine=sys.argv[2]), 256)
times = []
for _ in range(8):
    begin = time.perf_counter()
    next(walk)
    if data.device.type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
usual = sorted(times[1:])[3]
peak = peak_memory_bytes(data.device)
print(times[0], usual, torch_in - start, package_in - torch_in, peak)
"""


def bench_start(contest: Any, quick: bool, startup: Any, tmp_path: Path) -> None:
    """The first step cold and with caches over a later one, the import over PyTorch's, and peak memory."""
    if quick:
        pytest.skip("the start is measured in new processes, which compile: too long for a quick check")
    engines = ["eager", "compile", *(["graph"] if torch.cuda.is_available() else [])]
    # Tiles are tuned on a GPU alone.
    tunings = [False, *([True] if torch.cuda.is_available() else [])]
    for engine, tuned, caches in itertools.product(engines, tunings, ("cold", "warm")):
        command = [sys.executable, "-c", FIRST_STEP, str(Path(__file__).parent), engine]
        how = f"{engine}{', tuned' * tuned}"
        # A cold start has caches of its own; those of the first are the warm ones'.
        folders = [tmp_path / how / str(i if caches == "cold" else 0) for i in range(STARTS[engine])]
        startup(contest, f"{how}, caches {caches}", command, folders, tuned)
