"""Whole-step graphs without a GPU: a machine that captures and replays on the CPU as a CUDA graph does.

A capture runs the host's code once and keeps what it asked the device for: each PyTorch operation down to those inside
our own operations, each Triton kernel. A replay asks for the same again, on the same memory, with the same host
values; nothing of Python runs. As on a GPU, what a capture asks for has no effect yet, memory made in it belongs to
the graph, and memory from before is only pointed at: if its owner lets go of it, a replay reads what is not there.
"""

import collections
import dataclasses
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from seda_fast import SeDA, SeDAConfig, TrainConfig, engine, use_backend
from seda_fast.engine import Plan, Rows, Stepper
from seda_fast.loop import Trainer, TrainingSet
from seda_fast.ops import _dispatch, _triton
from seda_fast.ranks import Ranks
from seda_fast.streaming import RowReader, StreamedSet

# Read by Triton when a kernel is defined: without a GPU its interpreter runs the kernels on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CONFIG = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=2, time_embedding=8, diffusion_steps=12)
# 4 batches of 14 rows and one of 4 an epoch: 50 steps.
SETTINGS = TrainConfig(epochs=10, batch_size=14, learning_rate=3e-3)


class CaptureError(RuntimeError):
    """What a capture, or a replay, cannot do."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor as a graph knows it: where its memory is and how it is read."""

    memory: "Memory"
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Memory:
    """A storage that a graph points to. ``own``: made in the capture, by the operation ``origin``."""

    def __init__(self, storage: torch.UntypedStorage, own: bool, origin: str) -> None:
        self.weak, self.own, self.origin, self.size = StorageWeakRef(storage), own, origin, storage.nbytes()
        self.pool: torch.UntypedStorage | None = None
        self.before = None if own else storage.clone()

    def live(self) -> torch.UntypedStorage | None:
        found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        return found

    def storage(self) -> torch.UntypedStorage:
        found = self.pool if self.pool is not None else self.live()
        if found is None:
            raise CaptureError(f"the graph reads memory that its owner let go of, first in {self.origin}")
        return found

    def at(self, place: Place) -> Tensor:
        return torch.empty(0, dtype=place.dtype).set_(self.storage(), place.offset, place.shape, place.stride)


def poison(storage: torch.UntypedStorage) -> None:
    """All bits set: NaN in every floating dtype, -1 in integers."""
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)


def obstacle(func: Any, args: tuple[Any, ...]) -> str | None:
    """Why CUDA would not capture an operation, or would bake in what changes."""
    tags, name = func.tags, func._schema.name
    if torch.Tag.nondeterministic_seeded in tags:
        return "draws from PyTorch's own generator"
    if torch.Tag.data_dependent_output in tags or name == "aten::item":
        return "makes the host wait for a value"
    if name in ("aten::lift", "aten::lift_fresh"):
        return "copies a value of the host"
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return "makes a shape that depends on values" if masks else None
    return "makes a shape that depends on values" if torch.Tag.dynamic_output_shape in tags else None


class Tape(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[int, Memory] = {}
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []
        self.outliving: list[Memory] = []
        self.replays = 0
        self.stream: Stream | None = None

    # ---- capture

    def place(self, tensor: Tensor, own: bool, origin: str) -> Place:
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage._cdata)
        if memory is None:
            memory = self.memories[storage._cdata] = Memory(storage, own, origin)
        return Place(memory, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        if space == "seda_fast":
            backend, implementation = _dispatch.choose(name, "cpu", args[0].dtype)
            if backend != "cpp":  # which never runs on a GPU
                with self:
                    return implementation.function(*args, **kwargs)
        why = obstacle(func, args)
        if why is not None:
            raise CaptureError(f"{func} {why}")
        return self.record(func, args, kwargs, str(func))

    def record(self, func: Callable[..., Any], args: Any, kwargs: Any, origin: str) -> Any:
        given = tree_map_only(Tensor, lambda t: self.place(t, False, origin), (args, kwargs))
        result = func(*args, **kwargs)
        self.calls.append((func, given, tree_map_only(Tensor, lambda t: self.place(t, True, origin), result)))
        return result

    def end(self) -> None:
        """What was run only to see what it asks for is undone; what the graph alone needs becomes its pool."""
        gc.collect()
        for memory in self.memories.values():
            alive = memory.live()
            if memory.own:
                self.outliving += [memory] if alive is not None else []
                memory.pool = alive if alive is not None else torch.UntypedStorage(memory.size)
                poison(memory.pool)
            elif alive is not None and memory.before is not None:
                alive.copy_(memory.before)
                memory.before = None

    # ---- replay

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, given, results in self.calls:
            args, kwargs = tree_map_only(Place, lambda place: place.memory.at(place), given)
            taken = {id(place.memory) for place in tree_leaves(given) if isinstance(place, Place)}
            # What an operation only reserves holds whatever was there before.
            reserved = func in EMPTY
            found = None if reserved else func(*args, **kwargs)
            places = [place for place in tree_leaves(results) if isinstance(place, Place)]
            for i, place in enumerate(places):
                if id(place.memory) in taken:
                    continue  # written in place, or a view
                if reserved:
                    poison(place.memory.storage())
                else:
                    place.memory.at(place).copy_([t for t in tree_leaves(found) if isinstance(t, Tensor)][i])


_ATEN = torch.ops.aten
EMPTY = {
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}


@contextmanager
def capturing(tape: Tape, **options: Any) -> Iterator[None]:
    """Stands for `torch.cuda.graph`."""
    tape.stream = options.get("stream")
    with launches_on(tape), tape:
        yield
    tape.end()


@contextmanager
def launches_on(tape: Tape) -> Iterator[None]:
    """Triton's launches, as its interpreter runs them, are recorded too."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter.InterpretedFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def launch(*args: Any, **kwargs: Any) -> None:
            plain(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        with _disable_current_modes():
            tape.record(launch, args, kwargs, f"the kernel {kernel.fn.__name__}")

    interpreter.InterpretedFunction.run = run
    try:
        yield
    finally:
        interpreter.InterpretedFunction.run = plain


class Stream:
    """Stands for `torch.cuda.Stream`: a CPU does one thing after the other."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.awaited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.awaited.append(other)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The loop's own `engine.Graph` on the machine, and every tape that it makes."""
    made: list[Tape] = []

    def tape() -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(engine, "plan", lambda asked, *unused: Plan(asked, asked, "a test"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", tape)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return made


def training_set(rows: int, odd: bool) -> TrainingSet:
    """``odd``: with rows that have no label or no text."""
    generator = torch.Generator().manual_seed(9)
    labels, paired = torch.arange(rows) % 3, torch.ones(rows, dtype=torch.bool)
    class_text, class_visual = torch.randn(3, 5, generator=generator), torch.randn(3, 8, generator=generator)
    visual = class_visual[labels] + 0.5 * torch.randn(rows, 8, generator=generator)
    text = class_text[labels] + 0.5 * torch.randn(rows, 5, generator=generator)
    if odd:
        labels[5:20], paired[rows // 2 : rows // 2 + 7] = -1, False
    return TrainingSet(visual, text, labels, paired, torch.arange(rows) * 3)


def streamed(data: TrainingSet) -> StreamedSet:
    """The same rows, but for the reader that they come from."""
    features = (RowReader(x.numpy()) for x in (data.visual, data.text))
    statistics = (f(n) for n in (8, 5) for f in (torch.zeros, torch.ones))
    return StreamedSet(*features, *statistics, data.labels, data.paired, data.sample_ids)


def trainer(
    asked: Any,
    settings: TrainConfig = SETTINGS,
    rows: int = 60,
    odd: bool = False,
    lone: bool = False,
    as_read: Callable[[TrainingSet], Rows] = lambda data: data,
    **options: Any,
) -> Trainer:
    """``lone``: a class has no text, and labels are believed in part."""
    torch.manual_seed(0)
    model, data = SeDA(CONFIG), training_set(rows, odd)
    if lone:
        data = dataclasses.replace(data, paired=data.labels != 2)
    model.fit_statistics(torch.zeros(8), torch.ones(8), torch.zeros(5), torch.ones(5), data.visual, data.labels)
    model.fit_teacher(data.visual, data.text, data.labels, data.paired, 0)
    assert (model.teacher is not None) == odd
    assert (model.unseen is not None) == lone
    model.set_label_share(0.4 if odd or lone else 1.0)
    return Trainer(model, as_read(data), settings, engine=asked, **options)


def step_by_step(**options: Any) -> Trainer:
    """The step that a graph captures, run without one."""

    class Direct:
        def __init__(self, stepper: Stepper) -> None:
            self.stepper = stepper

        def steps(self, parts: list[Tensor]) -> Iterator[None]:
            for rows in parts:
                own = rows[self.stepper.ranks.part(len(rows))]
                self.stepper.device_step(self.stepper.data.rows(own), rows)
                yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Graph", Direct)
        done = trainer("graph", **options)
        done.run()
    return done


def same_bits(one: Trainer, other: Trainer) -> None:
    assert one.stepper.done == other.stepper.done == int(one.stepper.step) == int(other.stepper.step)
    for (name, a), b in zip(one.stepper.tensors().items(), other.stepper.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    assert [epoch.losses for epoch in one.history] == [epoch.losses for epoch in other.history]


# --------------------------------------------------------------------------------------------------- the loop's graph


@pytest.mark.parametrize(
    ("backend", "given"),
    [
        pytest.param("auto", {}, id="auto"),
        pytest.param("auto", {"odd": True}, id="auto, some without label or text"),
        pytest.param("auto", {"lone": True}, id="auto, a class without text, labels that err"),
        # Inside our operations too; thousands of calls a step.
        pytest.param("reference", {"odd": True}, id="reference, some without label or text", marks=pytest.mark.slow),
    ],
)
def test_fifty_replays_train_as_the_eager_engine_does(tapes: list[Tape], backend: str, given: dict[str, bool]) -> None:
    with use_backend(backend):
        graphed, eager = trainer("graph", **given), trainer("eager", **given)
        graphed.run()
        eager.run()
        direct = step_by_step(**given)
    (tape,) = tapes
    assert (tape.replays, graphed.stepper.done) == (40, 50)
    same_bits(graphed, direct)
    # The eager engine's learning rate and averaging come from the host, in float64.
    for a, b in zip(graphed.history, eager.history, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)
    for a, b in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)
    assert graphed.stepper.report()["fallbacks"] == [
        {"what": "a batch of 4 rows", "used": "eager", "reason": "a graph has one shape", "steps": 10}
    ]


@pytest.mark.usefixtures("tapes")
def test_in_bf16_the_captured_step_stays_as_near_to_eager_as_eager_to_float32() -> None:
    """It casts all weights at once and adds a shared weight's gradients in bf16, where autocast does neither."""
    exact, eager = trainer("eager", odd=True), trainer("eager", odd=True, precision="bf16")
    exact.run()
    eager.run()
    direct = step_by_step(odd=True, precision="bf16")

    def apart(one: Trainer, other: Trainer) -> float:
        pairs = [(a.losses, b.losses) for a, b in zip(one.history, other.history, strict=True)]
        return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in b if b[name])

    # Seen: 0.0012 and 0.0025.
    assert apart(direct, eager) < 2 * apart(eager, exact) < 0.01


@pytest.mark.parametrize(
    ("backend", "rate"),
    [
        ("auto", "dropout"),
        ("auto", "condition_dropout"),
        ("auto", "translator_dropout"),
        ("auto", "visual_dropout"),
        ("auto", "visual_input_dropout"),
        ("auto", "all"),
        pytest.param("reference", "all", marks=pytest.mark.slow),
    ],
)
def test_a_rate_of_0_is_captured(tapes: list[Tape], backend: str, rate: str) -> None:
    """Without dropout an operation is given no seed; what it puts there must not come from the host."""
    every = ("dropout", "condition_dropout", "translator_dropout", "visual_dropout", "visual_input_dropout")
    rates: dict[str, Any] = dict.fromkeys(every if rate == "all" else (rate,), 0.0)
    settings = dataclasses.replace(SETTINGS, epochs=2, **rates)
    with use_backend(backend):
        graphed = trainer("graph", settings)
        graphed.run()
        assert [tape.replays for tape in tapes] == [4 * settings.epochs]
        same_bits(graphed, step_by_step(settings=settings))


@pytest.mark.slow(seconds=200)
def test_the_kernels_launches_are_captured_too(tapes: list[Tape]) -> None:
    if _dispatch.refusal("q_sample", "triton", "cpu") is not None:
        pytest.skip("Triton was imported to compile, so it does not interpret in this process")
    options: Any = {"settings": dataclasses.replace(SETTINGS, epochs=2, batch_size=20)}
    with use_backend("triton"):
        graphed = trainer("graph", **options)
        graphed.run()
        direct = step_by_step(**options)
    with use_backend("reference"):
        reference = trainer("eager", **options)
        reference.run()
    (tape,) = tapes
    origins = {memory.origin for memory in tape.memories.values()}
    assert {"the kernel noising_kernel", "the kernel normaliser_kernel"} <= origins
    same_bits(graphed, direct)
    for a, b in zip(graphed.history, reference.history, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_is_captured(tapes: list[Tape], precision: Any) -> None:
    graphed = trainer("graph", precision=precision)
    graphed.run()
    assert [tape.replays for tape in tapes] == [40]
    direct = step_by_step(precision=precision)
    same_bits(graphed, direct)
    assert graphed.stepper.scaler.state_dict() == direct.stepper.scaler.state_dict()


def test_a_captured_step_of_fp16_looks_for_its_scale_as_an_eager_one_does(tapes: list[Tape]) -> None:
    """Steps whose gradients overflow are left out, and halve the scale."""
    counts = []
    for engine_name in ("graph", "eager"):
        found = trainer(engine_name, precision="fp16")
        found.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        found.run()
        scale = found.stepper.scaler.get_scale()
        steps = {int(state["step"]) for state in found.stepper.optimiser.state.values()}
        counts.append((scale, steps))
    (graphed, eager) = counts
    assert graphed == eager
    assert graphed[0] < 2.0**30
    assert max(graphed[1]) < 50
    assert [tape.replays for tape in tapes] == [40]


def test_batches_from_files_are_captured(tapes: list[Tape]) -> None:
    """They have the bits that rows on the device have."""
    graphed = trainer("graph", odd=True, as_read=streamed)
    assert not graphed.data.on_device
    graphed.run()
    assert [tape.replays for tape in tapes] == [40]
    same_bits(graphed, step_by_step(odd=True))


class Twin(Ranks):
    """The first of two ranks; what comes from the other one is what a real one would say."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.sent: list[tuple[int, ...]] = []

    def add(self, tensor: Tensor) -> Tensor:
        self.sent.append(tuple(tensor.shape))
        return tensor.mul_(0.5)  # in place: what is read afterwards must be what was added up

    def largest(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def spread(self, tensor: Tensor) -> None:
        self.sent.append(tuple(tensor.shape))


@pytest.mark.parametrize("as_read", [pytest.param(lambda data: data, id="device"), pytest.param(streamed, id="files")])
def test_ranks_capture_both_halves_of_a_step(tapes: list[Tape], as_read: Any) -> None:
    options: dict[str, Any] = {"odd": True, "precision": "bf16"}
    graphed = trainer("graph", ranks=Twin(), as_read=as_read, **options)
    weights = sum(p.numel() for p in graphed.model.parameters())
    told: Any = graphed.stepper.ranks
    assert len(told.sent) == len(graphed.stepper.tensors()), "all begin with what the first has"
    told.sent.clear()
    graphed.run()
    assert [tape.replays for tape in tapes] == [40, 40]
    assert told.sent.count((weights,)) == 50, "once a step, and none in the warm-up"
    same_bits(graphed, step_by_step(ranks=Twin(), **options))


def test_weights_cast_at_once_give_what_an_autocast_region_gives() -> None:
    stepper = trainer("eager", precision="bf16", odd=True).stepper
    batch = stepper.data.rows(torch.arange(14))
    found = []
    for call in (
        lambda: stepper.objective.eager(batch, stepper.seed, stepper.step, None),
        lambda: stepper.objective.with_halves(batch, stepper.seed, stepper.step, None),
    ):
        with Launches() as launches:
            losses = call()
            stepper.optimiser.zero_grad(set_to_none=True)
            losses.total.backward()
        found.append((losses, [p.grad for p in stepper.model.parameters()], launches.counts["aten::_to_copy"]))
    (plain, expected, one_by_one), (halved, got, at_once) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, halved, strict=True))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        # A weight that is read twice adds up its gradients in bfloat16.
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))
    layers = sum(isinstance(module, nn.Linear) for module in stepper.model.modules())
    assert at_once <= one_by_one - 4 * layers


class Launches(TorchDispatchMode):
    """Counts what a device is asked for, down to what is inside our operations: views and reservations cost nothing."""

    FREE = frozenset({"_unsafe_view", "_record_function_enter_new", "_record_function_exit"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "seda_fast":
            with self:
                return _dispatch.choose(name, "cpu", args[0].dtype)[1].function(*args, **(kwargs or {}))
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        if name not in self.FREE and func not in EMPTY and not any(views):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_in_half_precision_asks_the_device_for_few_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 940, of which 350 drew the timesteps and 150 cast weights and their gradients one by one."""
    kernels: Any = pytest.importorskip("seda_fast.kernels.noising")
    launched: list[str] = []
    monkeypatch.setattr(
        type(kernels.noising_kernel), "run", lambda kernel, *a, **o: launched.append(kernel.fn.__name__)
    )
    # No kernel runs here, so that the interpreter gets nothing wrong.
    monkeypatch.setattr(_triton, "_interprets_bfloat16", lambda args: False)
    monkeypatch.setattr(engine, "plan", lambda asked, *unused: Plan(asked, asked, "a test"))
    config = dataclasses.replace(CONFIG, blocks=SeDAConfig(visual_dim=1, text_dim=1, n_classes=2).blocks)
    monkeypatch.setitem(globals(), "CONFIG", config)
    stepper = trainer("graph", precision="bf16").stepper
    with use_backend("triton"), Launches() as launches:
        stepper.device_step(stepper.data.rows(torch.arange(14)), torch.arange(14))
    assert launched.count("timesteps_kernel") == 2
    assert launched.count("noising_kernel") == 6
    asked = launches.counts.total() + len(launched)
    assert asked <= 375, launches.counts


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 60), (1, 30), (2, 60)])
def test_a_run_shorter_than_the_warm_up(tapes: list[Tape], epochs: int, batch_size: int) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=epochs, batch_size=batch_size)
    graphed = trainer("graph", settings)
    graphed.run()
    assert "engine graph" not in graphed.stepper.fallbacks
    same_bits(graphed, step_by_step(settings=settings))


def test_only_gradients_outlive_the_capture(tapes: list[Tape]) -> None:
    graphed = trainer("graph")
    next(graphed.stepper.steps([torch.arange(14)]))
    gradients = {p.grad.untyped_storage()._cdata for p in graphed.model.parameters() if p.grad is not None}
    (tape,) = tapes
    living = [memory.live() for memory in tape.outliving]
    assert gradients == {storage._cdata for storage in living if storage is not None}


def test_the_capture_is_on_the_data_s_device(tapes: list[Tape]) -> None:
    """PyTorch's own stream for captures is on whichever device was current at the first one: on another than the
    data's it would capture nothing, and replays would do nothing."""
    graphed = trainer("graph")
    next(graphed.stepper.steps([torch.arange(14)]))
    (tape,) = tapes
    assert tape.stream is not None
    assert tape.stream.device == graphed.data.device


def test_a_warm_up_that_fails_leaves_the_state_alone(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, steps = trainer("graph"), []
    before = {name: value.clone() for name, value in graphed.stepper.tensors().items()}
    plain = Stepper.device_update

    def second_fails(self: Stepper) -> None:
        steps.append(self.done)
        plain(self)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Stepper, "device_update", second_fails)
    walk = graphed.stepper.steps([torch.arange(14)])
    monkeypatch.setattr(graphed.stepper.data.__class__, "batches", lambda *unused: pytest.fail("a step was made"))
    with pytest.raises(pytest.fail.Exception):
        # Falls back before it asks for its first own batch.
        next(walk)
    # The old values come after whatever the failed step still does on its own stream.
    assert len(torch.cuda.current_stream().awaited) == 1
    assert all(torch.equal(before[name], value) for name, value in graphed.stepper.tensors().items())


# ------------------------------------------------------------------------------------------------ nothing on the host


def test_a_step_needs_nothing_of_the_host() -> None:
    """On tensors without data whatever reads a value, or crosses from the host's memory to the device's, fails."""
    model = SeDA(CONFIG).to("meta")
    data = TrainingSet(*(None if f is None else f.to("meta") for f in training_set(60, False).__dict__.values()))
    stepper = Stepper(SeDA(CONFIG), training_set(60, False), SETTINGS, 50)
    device: Any = {"device": "meta"}
    stepper.model, stepper.data, stepper.objective.model = model, data, model
    stepper.seed, stepper.step = (torch.zeros((), dtype=torch.int64, **device) for _ in range(2))
    stepper.sums, stepper._first_bad = stepper.sums.to("meta"), stepper._first_bad.to("meta")
    stepper._rates = torch.zeros(50, **device)
    stepper.average = engine.MovingAverage(model.parameters(), 0.99)
    # PyTorch's own fused AdamW has no kernel without data; the gradients and their clipping are ours.
    stepper.optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    for group in stepper.optimiser.param_groups:
        group["lr"] = torch.zeros((), **device)
    stepper.optimiser.step = lambda: None  # type: ignore[method-assign, assignment]
    # Nor has its fused SGD, which moves the average.
    stepper.average.update_on_device = lambda n: None  # type: ignore[method-assign]
    rows = torch.zeros(14, dtype=torch.int64, **device)
    stepper.device_step(data.rows(rows), rows)
    assert all(p.grad is not None for p in model.visual.parameters())


# --------------------------------------------------------------------------------------------------- the machine itself


def faulty_read(x: Tensor) -> None:
    x.add_(float(x.sum()))


def faulty_mask(x: Tensor) -> None:
    x.index_put_((x > 0,), x.new_zeros(()))


def faulty_selection(x: Tensor) -> None:
    x.copy_(x[x > -1e9])


def faulty_constant(x: Tensor) -> None:
    x.add_(torch.tensor(2.0))


def faulty_random(x: Tensor) -> None:
    x.add_(torch.randn(3))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (faulty_read, "_local_scalar_dense.default makes the host wait"),
        (faulty_mask, "index_put_.default makes a shape that depends on values"),
        (faulty_selection, "index.Tensor makes a shape that depends on values"),
        (faulty_constant, "lift_fresh.default copies a value of the host"),
        (faulty_random, "randn.default draws from PyTorch's own generator"),
    ],
)
def test_the_machine_refuses(fault: Callable[[Tensor], None], why: str) -> None:
    with pytest.raises(CaptureError, match=why), capturing(Tape()):
        fault(torch.ones(3))


def test_an_int_for_a_counter_is_captured() -> None:
    tape = Tape()
    with capturing(tape):
        found = _dispatch.as_counter(2**40 + 3, "seed", torch.device("cpu"))
    tape.replay()
    assert (found.dtype, found.shape, found.item()) == (torch.int64, (), 2**40 + 3)


def test_the_machine_bakes_in_what_the_host_knew() -> None:
    tape, x, seen = Tape(), torch.zeros(3), [0]
    with capturing(tape):
        x.add_(seen[0] + 1)
    assert x.tolist() == [0, 0, 0], "a capture has no effect"
    for seen[0] in range(4):
        tape.replay()
    assert x.tolist() == [4, 4, 4], "not 1 + 2 + 3 + 4"


def test_the_machine_replays_views_gradients_and_lists() -> None:
    tape, x, weight = Tape(), torch.ones(4, 2), nn.Parameter(torch.full((3, 2), 0.5))
    total = torch.zeros(())
    with capturing(tape):
        loss = (x[1:] @ weight.t()).square().sum()
        loss.backward()
        with torch.no_grad():
            torch._foreach_add_([weight], [weight.grad], alpha=-0.01)
            total += loss.detach()
    expected, summed = torch.full((3, 2), 0.5), 0.0
    for factor in (1.0, 2.0, 3.0):
        x.fill_(factor)
        tape.replay()
        logits = x[1:] @ expected.t()
        summed += float(logits.square().sum())
        expected -= 0.01 * 2 * logits.t() @ x[1:]
    torch.testing.assert_close(weight.detach(), expected)
    assert float(total) == pytest.approx(summed)


def test_the_machine_sees_memory_that_was_let_go() -> None:
    tape, x, temporary = Tape(), torch.zeros(3), torch.ones(3)
    with capturing(tape):
        x.add_(temporary)
    tape.replay()
    del temporary
    with pytest.raises(CaptureError, match=r"memory that its owner let go of, first in aten\.add_"):
        tape.replay()


def test_the_machine_sees_what_outlives_and_what_was_never_written() -> None:
    tape, x, kept = Tape(), torch.zeros(3), []
    with capturing(tape):
        kept.append(x + 1)
        x.add_(torch.empty(3))
    assert len(tape.outliving) == 1
    assert kept[0].isnan().all(), "what a capture made holds nothing before a replay"
    tape.replay()
    assert kept[0].tolist() == [1, 1, 1]
    assert x.isnan().all()
    assert math.isnan(float(x[0]))
