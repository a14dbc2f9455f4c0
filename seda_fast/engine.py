"""One optimiser step, and the engines that run it: eager PyTorch, `torch.compile`, or one CUDA graph a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError, TrainConfig
from .nn import Losses, SeDA, Shard
from .ops import (
    AttentionChoice,
    attention_choice,
    choose,
    gradient_norm,
    operations,
    updates_in_one_pass,
    weight_update,
)
from .ranks import ALONE, Ranks

EngineName = Literal["auto", "eager", "compile", "graph"]
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

TERMS = Losses._fields
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Steps run on a stream of their own before a capture: libraries set themselves up, kernels are tuned.
_WARM_UP_STEPS = 3
_LATEST = 2**62
# Between two questions whether the device has come to a step.
_POLL_SECONDS = 2e-4


class Rows(Protocol):
    """A training set as the engines see it: on ``device``, batches by row number; ``labels`` and ``paired`` whole."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def paired(self) -> Tensor: ...

    @property
    def device(self) -> torch.device: ...
    @property
    def on_device(self) -> bool:
        """Whether `rows` is a gather on the device, without the host."""

    def __len__(self) -> int: ...
    def rows(self, index: Tensor) -> Batch: ...
    def batches(self, parts: Iterable[Tensor]) -> Iterator[Batch]: ...


class Plan(NamedTuple):
    """Which engine runs a training, and why."""

    asked: str
    used: str
    reason: str


def plan(asked: EngineName, precision: PrecisionName, data: Rows, batch_size: int, ranks: Ranks = ALONE) -> Plan:
    """The engine that runs, by a rule: graph needs CUDA and a whole batch with a row for each rank; what cannot be
    captured is compiled; a CPU runs eager unless told otherwise.

    Raises:
        ConfigError: the precision needs another device.
    """
    cuda = data.device.type == "cuda"
    if precision == "tf32" and not cuda:
        raise ConfigError("precision tf32 needs a CUDA device; give fp32 or bf16")
    if asked == "auto" and not cuda:
        return Plan(asked, "eager", "device is a CPU")
    if asked in ("eager", "compile"):
        return Plan(asked, asked, "asked for")
    obstacles = {
        "it needs a CUDA device": not cuda,
        "the batch is larger than the training part": len(data) < batch_size,
        "the batch has fewer rows than there are ranks": batch_size < ranks.world,
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if found:
        return Plan(asked, "compile", f"no graph: {'; '.join(found)}")
    return Plan(asked, "graph", "device is CUDA" if asked == "auto" else "asked for")


@contextmanager
def matrix_precision(precision: PrecisionName) -> Iterator[None]:
    """TF32 products while the block runs, where ``precision`` says so; else as PyTorch's switches stand."""
    if precision != "tf32":
        yield
        return
    switches = torch.backends.cuda.matmul
    newer = getattr(switches, "fp32_precision", None)
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer switch alone was used: the older one stands as PyTorch has it from the start
        older = "highest"
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        if newer is not None:
            switches.fp32_precision = newer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, biases do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the steps, then a half cosine down to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))))


class MovingAverage:
    """An exponential moving average of parameters that forgets its start.

    Update n (from 0) keeps ``min(decay, (1 + n) / (10 + n))`` of what was there, the first nothing.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._current = list(parameters)
        self.values = [p.detach().clone() for p in self._current]

    def moved(self, n: int) -> float:
        """Share of the way to the parameters that update number ``n`` goes."""
        return 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Update number ``n``, known to the host."""
        if n == 0:
            torch._foreach_copy_(self.values, self._current)
        else:
            torch._foreach_lerp_(self.values, self._current, self.moved(n))

    @torch.no_grad()
    def update_on_device(self, n: Tensor) -> None:
        """The same with ``n`` int64 () on the parameters' device, for a captured graph."""
        kept = ((1 + n) / (10 + n)).clamp(max=self.decay) * (n > 0)
        # v + moved * (p - v), as a step of SGD whose rate lies on the device: one pass of two reads and a write. As a
        # difference, its product and a sum it would be three passes of eight.
        torch._fused_sgd_(
            self.values, self._current, [],
            weight_decay=-1.0, momentum=0.0, lr=(kept - 1).float(), dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip

    @torch.no_grad()
    def store(self) -> None:
        """Write the average into the parameters."""
        torch._foreach_copy_(self._current, self.values)


class _Halves(torch.autograd.Function):
    """Weights in a half precision, all in one launch, and their gradients back in their own in one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        halves = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(halves, weights)
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=ctx.dtype) for grad in given]
        if given:
            torch._foreach_copy_(wide, given)
        found = iter(wide)
        return None, *(None if grad is None else next(found) for grad in grads)


class Objective(nn.Module):
    """`SeDA.losses` in the run's precision, as the forward of a module.

    A half precision is a `torch.autocast` region: parameters stay float32 masters, and each operation, the package's
    own too, casts what it multiplies.
    """

    def __init__(self, model: SeDA, settings: TrainConfig, precision: PrecisionName) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.dtype = _HALF.get(precision)

        # What `forward` calls for whole batches, where the engine compiles.
        self.compiled: Callable[..., Losses] | None = None

    def forward(self, batch: Batch, seed: Tensor, step: Tensor, shard: Shard | None, compiled: bool) -> Losses:
        """The losses of ``batch`` at ``step``, both int64 () as in `SeDA.losses`."""
        call = self.compiled if compiled and self.compiled is not None else self.eager
        return call(batch, seed, step, shard)

    def with_halves(self, batch: Batch, seed: Tensor, step: Tensor, shard: Shard | None) -> Losses:
        """`forward` with the weights of all products cast at once; an autocast region takes a launch for each of them,
        and one for each of their gradients."""
        assert self.dtype is not None
        layers = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]
        named = {f"{name}.{part}": weight for name, layer in layers for part, weight in layer.named_parameters()}
        halves = _Halves.apply(self.dtype, *named.values())  # type: ignore[no-untyped-call]
        losses: Losses = torch.func.functional_call(
            self, dict(zip(named, halves, strict=True)), (batch, seed, step, shard, False)
        )
        return losses

    def eager(self, batch: Batch, seed: Tensor, step: Tensor, shard: Shard | None) -> Losses:
        """`forward` in eager PyTorch."""
        with nullcontext() if self.dtype is None else torch.autocast(seed.device.type, self.dtype):
            return self.model.losses(*batch, seed=seed, step=step, settings=self.settings, shard=shard)


def _parallel(objective: Objective) -> nn.Module:
    """The objective with gradients added up over the ranks; see `Stepper._rehearse`."""
    if objective.compiled is not None:
        torch._dynamo.config.optimize_ddp = False  # it would cut the compiled graph at the buckets
    with warnings.catch_warnings():
        # The new name of the argument is not known to the oldest PyTorch that we run on.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
    # It reads annotations, which are text here.
    parallel.register_comm_hook(None, lambda state, bucket: _added_up(bucket.buffer()))
    return parallel


def _added_up(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Sums of the ranks' gradients, which are shares. DistributedDataParallel itself takes their mean: losses times the
    ranks had overflowed in fp16 where those of one rank do not, and its scale settled elsewhere."""
    done: torch.futures.Future[list[Tensor]] = dist.all_reduce(gradients, async_op=True).get_future()
    return done.then(lambda found: found.value()[0])


class Stepper:
    """Everything that an optimiser step changes, and the engine that runs it.

    Args:
        model: trained in place, on the data's device.
        total_steps: of the whole run, for the learning rate.
        say: called with a sentence where the engine falls back.
    """

    def __init__(
        self,
        model: SeDA,
        data: Rows,
        settings: TrainConfig,
        total_steps: int,
        *,
        engine: EngineName = "eager",
        precision: PrecisionName = "fp32",
        ranks: Ranks = ALONE,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        settings = settings.for_rows(len(data))
        self.model, self.data, self.settings, self.total_steps, self._say = model, data, settings, total_steps, say
        self.ranks = ranks
        self.plan = plan(engine, precision, data, settings.batch_size, ranks)
        device = data.device
        # What fell back to another engine, and those of it that do so in every step.
        self.fallbacks: dict[str, dict[str, Any]] = {}
        self._lasting: set[str] = set()
        wanted = engine if engine != "auto" else "graph" if device.type == "cuda" else "eager"
        if self.plan.used != wanted:
            self._fall(f"engine {wanted}", self.plan.used, self.plan.reason, lasting=True)
        self.done = 0
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.seed = torch.tensor(settings.seed, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
        # Step and term of the first loss that is not finite, as step * len(TERMS) + term; -1 while there is none.
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._glance: Glance | None = None
        self.average = MovingAverage(model.parameters(), settings.ema_decay)
        captured = self.plan.used == "graph"
        # Of every step of the run, where steps must not read the host; also after a capture that failed.
        self._rates: Tensor | None = None
        rate: float | Tensor = settings.learning_rate
        if captured:
            factors = [learning_rate_factor(step, total_steps, settings.warmup) for step in range(total_steps)]
            self._rates = (settings.learning_rate * torch.tensor(factors, dtype=torch.float64)).float().to(device)
            rate = self._rates[0].clone()
            # Said of the warm-up and of batches that no graph serves, which take the same path on purpose.
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=rate,
            betas=(0.9, 0.99),
            fused=True,
            capturable=captured and device.type == "cuda",
        )
        for p in model.parameters():
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.optimiser.state[p] = {
                "step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
            }  # fmt: skip
        self.precision = precision
        self.scaler = self._scaler({})
        # A scaler skips steps and needs the optimiser itself.
        self.one_pass = precision != "fp16" and updates_in_one_pass(list(model.parameters()))
        self.objective = Objective(model, settings, precision)
        # Settled here: a measurement has no place in a compilation or a capture.
        self.attention = self._attention(self.objective.dtype or self.average.values[0].dtype)
        if self.plan.used == "compile":
            self.objective.compiled = torch.compile(self.objective.eager, fullgraph=True, dynamic=False)
        # The ranks of a graph add up their gradients themselves, see `device_step`.
        self._losses: nn.Module = self.objective if ranks.alone or captured else _parallel(self.objective)
        # What ranks exchange of the gradients at hand.
        self.flat = torch.zeros(0, device=device)
        if captured and not ranks.alone:
            self.spread()
        self._graph: Graph | None = None
        self._rehearsed = False

    def _scaler(self, state: dict[str, Any]) -> torch.amp.GradScaler:
        """What keeps the gradients of fp16 in its range."""
        scaler = torch.amp.GradScaler(self.data.device.type, enabled=self.precision == "fp16")
        if state:
            scaler.load_state_dict(state)
        return scaler

    def _attention(self, dtype: torch.dtype) -> AttentionChoice | None:
        """The attention to a memory of class texts; None without one."""
        config = self.model.config
        if not config.has_memory:
            return None
        if self.plan.used == "compile":
            return AttentionChoice("torch", "the step is compiled")
        sizes = {"classes": config.n_classes, "width": config.width, "heads": config.memory_heads}
        return attention_choice(self.data.device, dtype, **sizes)

    # ---- state ---------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; the tensors themselves, not copies."""
        named = list(self.model.named_parameters())
        kept = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for (name, _), value in zip(named, self.average.values, strict=True):
            kept[f"average.{name}"] = value
        for name, p in named:
            kept |= {f"optimiser.{key}.{name}": value for key, value in self.optimiser.state[p].items()}
        return {**kept, "sums": self.sums, "step": self.step}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        for name, own in self.tensors().items():
            if name not in tensors or tensors[name].shape != own.shape:
                raise ValueError(f"the tensor {name} is missing or has another shape")
            own.copy_(tensors[name])
        self.done = int(self.step)

    def spread(self) -> None:
        """Every rank takes over the first one's state; the sums stay there."""
        for tensor in self.tensors().values():
            self.ranks.spread(tensor)
        if not self.ranks.first:
            self.sums.zero_()
        self.done = int(self.step)

    def look(self, stop: int, pace: Callable[[], int], newest: bool) -> tuple[tuple[int, str] | None, int, int]:
        """Step (from 1) and term of the first loss on any rank that was not finite, and the ranks' largest numbers.

        Waits for the device, for all that it was told or, on a GPU and without ``newest``, for what it was told when
        this was asked before; then asks for the ``pace``, and waits for all ranks, where there are several.
        """
        code = int(self._first_bad) if newest else self._glanced()
        # The first is the least, and -1 stands for none.
        late, stop, slowest = self.ranks.largest([-1 if code < 0 else _LATEST - code, stop, pace()])
        return _bad_loss(-1 if late < 0 else _LATEST - late), stop, slowest

    def glance(self) -> tuple[int, str] | None:
        """`look` at the losses of this rank on a GPU, as they were at the glance before; waits for that one alone."""
        return _bad_loss(self._glanced())

    def _glanced(self) -> int:
        if self._glance is None:
            self._glance = Glance(self._first_bad)
        return self._glance.newest()

    def first_non_finite(self) -> str | None:
        """What first has an element that is not finite, a weight or a moment of the optimiser's. Waits for the
        device."""
        named = [(f"the weight {name}", weight) for name, weight in self.model.named_parameters()]
        for name, weight in self.model.named_parameters():
            moments = ((key, self.optimiser.state[weight][key]) for key in ("exp_avg", "exp_avg_sq"))
            named += [(f"the optimiser's {key} of {name}", moment) for key, moment in moments]
        finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
        return next((name for (name, _), whole in zip(named, finite, strict=True) if not whole), None)

    def backends(self) -> str:
        """Who serves the operations, "cpp, reference" say."""
        dtype = self.average.values[0].dtype
        return ", ".join(sorted({choose(op, self.data.device.type, dtype)[0] for op in operations()}))

    def gather_sums(self) -> Tensor:
        """The loss sums of all ranks, which the first goes on with alone, so that it can stop and resume there."""
        if not self.ranks.alone:
            self.ranks.add(self.sums)
            if not self.ranks.first:
                gathered = self.sums.clone()
                self.sums.zero_()
                return gathered
        return self.sums

    def add_fallbacks(self, earlier: Mapping[str, Mapping[str, Any]]) -> None:
        """Count the fallbacks of ``earlier`` steps, those before a resumption, too."""
        for what, how in earlier.items():
            self.fallbacks.setdefault(what, {**how, "steps": 0})["steps"] += how["steps"]

    def rate(self) -> float:
        """Learning rate of the step to come."""
        settings = self.settings
        return settings.learning_rate * learning_rate_factor(self.done, self.total_steps, settings.warmup)

    def report(self) -> dict[str, Any]:
        """For ``metrics.json``: the engine asked for and used, why, and which steps fell back to another one."""
        return {**self.plan._asdict(), "fallbacks": [{"what": what, **how} for what, how in self.fallbacks.items()]}

    # ---- steps ---------------------------------------------------------------------------------------------------

    def steps(self, parts: list[Tensor]) -> Iterator[None]:
        """Train on the batches ``parts`` of row numbers, yielding after each."""
        if self._rates is not None:
            yield from self._graphed(parts)
            return
        if not self.ranks.alone and not self._rehearsed:
            self._rehearse()
        for part, batch in zip(parts, self.data.batches(self.ranks.own(parts)), strict=True):
            rows = len(part)
            compiled = self.plan.used == "compile" and rows == self.settings.batch_size
            if self.plan.used == "compile" and not compiled:
                self._fall(f"a batch of {rows} rows", "eager", "a new shape would be compiled anew")
            self._host_step(batch, part, compiled)
            yield

    def _rehearse(self) -> None:
        """Gradients of the first rows, thrown away.

        After its first step DistributedDataParallel lays its buckets out anew, and then sums of more than two ranks
        add in another order. So that a resumed run, whose first step is another one's later step, has the same
        bits, no step that counts is the first.
        """
        part = torch.arange(min(self.settings.batch_size, len(self.data)))
        (batch,) = self.data.batches([part[self.ranks.part(len(part))]])
        compiled = self.plan.used == "compile" and len(part) == self.settings.batch_size
        self._losses_of(batch, self._shard(batch, self._whole(part)), compiled).total.backward()
        self.optimiser.zero_grad(set_to_none=True)
        self._rehearsed = True

    def _host_step(self, batch: Batch, part: Tensor, compiled: bool) -> None:
        rate = self.rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self._gradients(self._losses_of(batch, self._shard(batch, self._whole(part)), compiled), len(part))
        if self.one_pass:
            self._update_in_one_pass(rate)
        else:
            self._update()
            self.average.update(self.done)
        self.step += 1
        self._count()

    def _count(self) -> None:
        """A step is over, as far as the host is concerned."""
        self.done += 1
        for what in self._lasting:
            self.fallbacks[what]["steps"] += 1

    @torch.no_grad()
    def _update_in_one_pass(self, rate: float) -> None:
        """What the optimiser and the average do one after the other, on the state that they keep."""
        moved = self.average.moved(self.done)
        averages = dict(zip(self.model.parameters(), self.average.values, strict=True))
        norm = gradient_norm([p.grad for p in averages if p.grad is not None])
        for group in self.optimiser.param_groups:
            rows = []
            for p in group["params"]:
                if p.grad is None:
                    averages[p].lerp_(p, moved)
                else:
                    state = self.optimiser.state[p]
                    rows.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], averages[p], state["step"]))
            if rows:
                weight_update(
                    *zip(*rows, strict=True),
                    norm=norm,
                    clip_norm=self.settings.clip_norm,
                    learning_rate=rate,
                    betas=group["betas"],
                    epsilon=group["eps"],
                    weight_decay=group["weight_decay"],
                    moved=moved,
                )

    def _update(self) -> None:
        """Weights from the gradients, which fp16 scaled; reads nothing on the host."""
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _whole(self, part: Tensor) -> Tensor | None:
        """The row numbers ``part`` of a batch, for `_shard`, on the device; None where no other rank shares it."""
        return None if self.ranks.alone else sent(part, self.data.device)

    def _shard(self, batch: Batch, rows: Tensor | None) -> Shard | None:
        """Where the rows of ``batch``, which are this rank's, stand among ``rows``, which are all ranks'."""
        if rows is None or self.ranks.alone:
            return None
        whole = self.model.term_rows(self.data.labels[rows], self.data.paired[rows])
        own = self.model.term_rows(batch[2], batch[3])
        dtype = torch.promote_types(self.average.values[0].dtype, torch.float32)
        return Shard(self.ranks.part(len(rows)).start, len(rows), own.to(dtype) / whole.clamp(min=1).to(dtype))

    def _losses_of(self, batch: Batch, shard: Shard | None, compiled: bool) -> Losses:
        if not compiled:
            return self._losses(batch, self.seed, self.step, shard, False)  # type: ignore[no-any-return]
        try:
            return self._losses(batch, self.seed, self.step, shard, True)  # type: ignore[no-any-return]
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            # No compiler is there, say, or this process compiled it in too many sizes before; it fails at the first
            # call, before anything has changed.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._fall("engine compile", "eager", f"it failed: {reason}", lasting=True)
            self.plan, self.objective.compiled = self.plan._replace(used="eager"), None
            return self._losses(batch, self.seed, self.step, shard, False)  # type: ignore[no-any-return]

    def _gradients(self, losses: Losses, rows: int) -> None:
        """Losses of a batch of ``rows`` rows on all ranks to the sums, gradients to the parameters."""
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()
        values = torch.stack([term.detach().double() for term in losses])
        self.sums += values * rows
        bad = ~values.isfinite()
        # The terms come first, so that one of them is named rather than their sum.
        first = torch.argmax(bad.roll(-1).to(torch.int8))
        code = self.step * len(TERMS) + (first + 1) % len(TERMS)
        self._first_bad.copy_(torch.where((self._first_bad < 0) & bad.any(), code, self._first_bad))

    def device_step(self, batch: Batch, rows: Tensor) -> None:
        """A step that reads nothing on the host: learning rate and counters are tensors. What graphs capture.

        ``batch`` are the rows of this rank among ``rows`` (B,), the row numbers of the whole batch on the device.
        """
        self.device_gradients(batch, rows)
        self.ranks.add(self.flat)
        self.device_update()

    def device_gradients(self, batch: Batch, rows: Tensor) -> None:
        """The first half of `device_step`, before ranks add up their gradients, in ``flat``."""
        shard = self._shard(batch, rows)
        if self.objective.dtype is None:
            losses = self._losses_of(batch, shard, False)
        else:
            losses = self.objective.with_halves(batch, self.seed, self.step, shard)
        self._gradients(losses, len(rows))
        if not self.ranks.alone:
            self._gather_gradients()

    @torch.no_grad()
    def _gather_gradients(self) -> None:
        """All gradients into one tensor, to be added up in one go; those of the weights are parts of it then."""
        weights = [p for p in self.model.parameters() if p.grad is not None]
        self.flat = torch.cat([p.grad.flatten() for p in weights if p.grad is not None])
        for p, part in zip(weights, self.flat.split([p.numel() for p in weights]), strict=True):
            p.grad = part.view_as(p)

    def device_update(self) -> None:
        """The second half of `device_step`."""
        assert self._rates is not None
        for group in self.optimiser.param_groups:
            group["lr"].copy_(self._rates.index_select(0, self.step[None])[0])
        self._update()
        self.average.update_on_device(self.step)
        self.step += 1

    def _graphed(self, parts: list[Tensor]) -> Iterator[None]:
        size = self.settings.batch_size
        whole = [part for part in parts if len(part) == size]
        if whole and self._graph is None and "engine graph" not in self._lasting:
            self._capture()
        replayed = whole if self._graph is not None else []
        if self._graph is not None and replayed:
            for _ in self._graph.steps(replayed):
                self._count()
                yield
        rest = parts[len(replayed) :]
        for part, batch in zip(rest, self.data.batches(self.ranks.own(rest)), strict=True):
            if len(part) != size:
                self._fall(f"a batch of {len(part)} rows", "eager", "a graph has one shape")
            self.device_step(batch, sent(part, self.data.device))
            self._count()
            yield

    def _capture(self) -> None:
        """Make the graph; where that fails, on any rank, all go on without one."""
        scaling, failed, reason = self.scaler.state_dict(), False, "on another rank"
        try:
            self._graph = Graph(self)
        except Exception as error:  # noqa: BLE001 - Triton's (no tile fits, say) are no RuntimeErrors; eager has them again
            self.scaler = self._scaler(scaling)  # the old one may be amid a step
            _end_capture(self.data.device)
            failed, reason = True, (str(error).strip().splitlines() or [type(error).__name__])[0]
        if any(self.ranks.largest([failed])):
            self._graph = None
            self._fall("engine graph", "eager", f"it failed: {reason}", lasting=True)
            self.plan = self.plan._replace(used="eager")

    def _fall(self, what: str, used: str, reason: str, lasting: bool = False) -> None:
        """Tell and count that ``what`` runs on another engine: in this step, or in all that come."""
        if what not in self.fallbacks:
            self.fallbacks[what] = {"used": used, "reason": reason, "steps": 0}
            self._say(f"{what} runs on {used}: {reason}")
        if lasting:
            self._lasting.add(what)
        else:
            self.fallbacks[what]["steps"] += 1


def _end_capture(device: torch.device) -> None:
    """Where CUDA itself ended a capture, PyTorch before 2.13 leaves the device's generator amid it, and whoever draws
    from that next, as the baselines' dropout does, is refused. A copy of its state is amid nothing."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        with suppress(RuntimeError):
            generator.graphsafe_set_state(generator.clone_state())


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Row numbers on the device; the host does not wait for a GPU to have them."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def _bad_loss(code: int) -> tuple[int, str] | None:
    """Step (from 1) and term that ``code`` stands for, see `Stepper`; None for -1."""
    return None if code < 0 else (code // len(TERMS) + 1, TERMS[code % len(TERMS)])


class Glance:
    """A number on a GPU as it was at the glance before, until which the host goes no further; nothing synchronises.

    The steps told since then keep the device busy meanwhile, and the host is never further ahead of it than the steps
    of two glances. Without a bound a graph, which is told in less time than it runs, has a whole epoch waiting when
    the host first sees a number of its beginning.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        # Page-locked, so that the copy itself waits for nothing.
        self._copy = torch.full((), -1, dtype=number.dtype, pin_memory=True)
        self._arrived: torch.cuda.Event | None = None

    def newest(self) -> int:
        """The value of the last glance, -1 at the first; asks for the one of now."""
        if self._arrived is None:
            self._arrived = torch.cuda.Event()
            seen = -1
        else:
            # Asked again and again: a wait in the driver would keep a signal from Python.
            while not self._arrived.query():
                time.sleep(_POLL_SECONDS)
            seen = int(self._copy)
        self._copy.copy_(self._number, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(self._number.device))
        return seen


@contextmanager
def _unchanged(tensors: list[Tensor]) -> Iterator[None]:
    """Puts the values of ``tensors`` back after the block, also where it fails."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


@contextmanager
def _workspaces_of_its_own(device: torch.device) -> Iterator[None]:
    """In this block the workspaces of cuBLAS are made anew; those of a capture lie in its graph's memory.

    PyTorch keeps one for each stream, and frees them all where `torch.compile` makes graphs of its own. A graph that
    was captured with one from before would go on writing to memory that is another's by then.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None) if device.type == "cuda" else None
    if clear is None:
        yield
        return
    clear()
    try:
        yield
    finally:
        clear()


class Graph:
    """A whole step as one CUDA graph: gather, noising, networks, losses, backward, clipping, AdamW, average, counters.

    The rows of the epoch lie in one tensor on the device; the graph itself moves the cursor, so that a replay needs
    nothing from the host but what lies in files: streamed batches are copied to where the graph reads them. Several
    ranks have a graph up to their gradients and one from there, and exchange them between the two.
    """

    def __init__(self, stepper: Stepper) -> None:
        data, size = stepper.data, stepper.settings.batch_size
        self._stepper = stepper
        self._cursor = torch.zeros((), dtype=torch.int64, device=data.device)
        self._order = torch.zeros(len(data), dtype=torch.int64, device=data.device)
        # A graph holds addresses, not tensors: what it reads must live as long as it does.
        self._within = torch.arange(size, device=data.device)
        self._own = stepper.ranks.part(size)
        self._batch: Batch | None = None if data.on_device else data.rows(torch.arange(size)[self._own])
        alone = stepper.ranks.alone
        stages = [self._whole_step] if alone else [self._gradients, stepper.device_update]
        device = data.device
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        with self._rehearsal():
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP_STEPS):
                        # From the start each time: near the end of a run there are not as many steps, and rates, left.
                        stepper.step.zero_()
                        self._cursor.zero_()
                        self._whole_step()
            finally:
                # Also after a failure: what a failed step still does must not come after the old values.
                current.wait_stream(side)
        stepper.optimiser.zero_grad(set_to_none=True)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        pool = torch.cuda.graph_pool_handle()
        # On the data's device, whichever is current; and a capture that fails leaves its stream behind as the current
        # one, which the outer block takes back. What other threads do, those of nccl and of a reader, is not ours.
        with torch.cuda.stream(side), _workspaces_of_its_own(device):
            for stage in stages:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    stage()
                self._graphs.append(graph)
        self._flat = stepper.flat

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Steps in this block change nothing that stays."""
        stepper = self._stepper
        scaling = stepper.scaler.state_dict()
        with _unchanged([*stepper.tensors().values(), stepper._first_bad, self._cursor]):
            yield
        stepper.scaler.load_state_dict(scaling)

    def _gradients(self) -> None:
        rows = self._order.index_select(0, self._cursor + self._within)
        batch = self._stepper.data.rows(rows[self._own]) if self._batch is None else self._batch
        self._stepper.device_gradients(batch, rows)
        self._cursor += len(rows)

    def _whole_step(self) -> None:
        """Both halves of a step; other ranks have no part in it."""
        self._gradients()
        self._stepper.device_update()

    def steps(self, parts: list[Tensor]) -> Iterator[None]:
        """Train on the batches ``parts`` of row numbers, on the host, yielding after each."""
        stepper = self._stepper
        rows = torch.cat(parts)
        self._order[: len(rows)].copy_(sent(rows, self._order.device))
        self._cursor.zero_()
        streamed = None if self._batch is None else stepper.data.batches(stepper.ranks.own(parts))
        for _ in parts:
            if self._batch is not None and streamed is not None:
                for held, new in zip(self._batch, next(streamed), strict=True):
                    held.copy_(new)
            up_to_gradients, *from_there = self._graphs
            up_to_gradients.replay()
            stepper.ranks.add(self._flat)
            for graph in from_there:
                graph.replay()
            yield
