"""``python -m seda_fast.export``: the whole prediction of a model as one graph that runs without this library.

Its inputs are ``visual`` (rows, Dv) float32 and ``sample_ids`` (rows,) int64, its outputs ``log_proba`` (rows, K) and
``label`` (rows,) (of a multi-label model (rows, K), 1 where the probability reaches a half, else 0), with
``--features`` also ``semantic``, ``aligned`` and ``aligned_point``. The noise is drawn inside,
from the same counters. What is written is compared with the model first.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import Dim, ExportedProgram

from . import __version__
from .command import run, settings_of
from .config import check_given, check_range, check_types, setting
from .files import DataError, atomic_path, make_folder, output_file
from .nn import PFIN, Sampler, SeDA
from .nn.multi_label import THRESHOLD
from .ops import references
from .outputs import PREDICTION_SEED

PROGRAM = "seda_fast.export"
ABOUT = "seda_fast.json"
SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx"}
INPUTS = ("visual", "sample_ids")
OUTPUTS = ("log_proba", "label", "semantic", "aligned", "aligned_point")
# Largest difference of a log-probability or feature from the model's own that is taken for rounding.
TOLERANCE = 1e-4
_CHECKED_ROWS = 70  # more than one block of a prediction, and not a whole number of them

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which model is written where, and how."""

    model: str = setting("", "folder written by seda_fast.train")
    format: Literal["torch-export", "onnx"] = setting("torch-export", "a PyTorch program (.pt2) or ONNX (.onnx)")
    out: str = setting("", "the file; by default model.pt2 or model.onnx in the model's folder")
    features: bool = setting(False, "give the features in both spaces beside the prediction")
    seed: int = setting(PREDICTION_SEED, "seed of the prediction's noise, fixed in the graph")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "model")
        check_range(self, "seed", 0 <= self.seed < 2**63, "in 0 .. 2**63 - 1")


class WholePrediction(SeDA):
    """A model whose prediction takes all rows at once and whose samplers are ready: no step depends on the data.

    Only rounding differs from `SeDA`, which predicts in blocks so that a row's neighbours do not show even there.
    """

    def __init__(self, model: SeDA, seed: int, features: bool) -> None:
        super().__init__(model.config, model.class_names)
        self.load_state_dict(model.state_dict())
        self.seed, self.features = seed, features
        self._ready: dict[tuple[int | None, int | None], Any] = {}
        self._stages: dict[tuple[int, int, int], Tensor] = {}
        self.eval()

    def _in_blocks(
        self,
        visual: Tensor,
        sample_ids: Tensor | None,
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        assert sample_ids is not None
        return function(visual, sample_ids)

    def _samplers(
        self, semantic_steps: int | None, textual_steps: int | None, visual: Tensor
    ) -> tuple[Sampler, Sampler]:
        key = (semantic_steps, textual_steps)
        if key not in self._ready:
            self._ready[key] = super()._samplers(semantic_steps, textual_steps, visual)
        found: tuple[Sampler, Sampler] = self._ready[key]
        return found

    def _stage(
        self,
        network: PFIN,
        source: Tensor,
        condition: Tensor,
        sampler: Sampler,
        sample_ids: Tensor,
        seed: int,
        draw: int,
        stream: int,
    ) -> Tensor:
        """Each chain once: prediction and both kinds of aligned features share theirs."""
        key = (stream, draw, len(sampler.timesteps))
        if key not in self._stages:
            arguments = (network, source, condition, sampler, sample_ids, seed, draw, stream)
            self._stages[key] = super()._stage(*arguments)
        return self._stages[key]

    def forward(self, visual: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, Dv) float32 and (B,) int64 -> the tensors of `OUTPUTS`, the last three with ``features`` only."""
        found = self._outputs(visual, sample_ids)
        self._stages.clear()
        return found

    def _outputs(self, visual: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:
        log_proba = self.predict_log_proba(visual, sample_ids, seed=self.seed)
        assert isinstance(log_proba, Tensor)
        found = (log_proba, labels_of(self, log_proba))
        if not self.features:
            return found
        semantic, aligned = self.align(visual, sample_ids, seed=self.seed)
        _, point = self.align(visual, sample_ids, steps=self.config.classification_steps, seed=self.seed)
        return (*found, semantic, aligned, point)


def labels_of(model: SeDA, log_proba: Tensor) -> Tensor:
    """The output ``label``, int64, from (B, K) log-probabilities."""
    return (log_proba >= math.log(THRESHOLD)).long() if model.config.multi_label else log_proba.argmax(dim=1)


def program_of(model: SeDA, seed: int, features: bool) -> ExportedProgram:
    """The prediction as a program of PyTorch's own operations, for any number of rows from 1 up."""
    whole = WholePrediction(model, seed, features)
    example = (torch.zeros(3, model.config.visual_dim), torch.arange(3))
    rows = Dim("rows", min=1)
    shapes = ({0: rows}, {0: rows})
    with torch.no_grad():
        whole(*example)  # makes the samplers
        graph = torch.export.export(whole, example, dynamic_shapes=shapes).module()
        definitions = references()
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target in definitions:
                node.target = definitions[node.target]
        graph.recompile()
        program = torch.export.export(graph, example, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the files of this machine
    return program


def about(model: SeDA, seed: int, features: bool) -> str:
    """What a user of the file must know, as JSON."""
    return json.dumps(
        {
            "seda_fast": __version__,
            "class_names": list(model.class_names),
            "inputs": list(INPUTS),
            "outputs": list(OUTPUTS if features else OUTPUTS[:2]),
            "seed": seed,
            "config": dataclasses.asdict(model.config),
        }
    )


# ---- formats ---------------------------------------------------------------------------------------------------------


def write_program(path: Path, program: ExportedProgram, text: str) -> None:
    # Its own writer ends the process where the disk is full.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={ABOUT: text})
    path.write_bytes(content.getbuffer())


def run_program(path: Path, inputs: Arrays) -> list[NDArray[Any]]:
    module = torch.export.load(path).module()
    with torch.no_grad():
        found = module(*(torch.from_numpy(inputs[name]) for name in INPUTS))
    return [tensor.numpy() for tensor in found]


def write_onnx(path: Path, program: ExportedProgram, text: str) -> None:
    """Raises DataError when the packages that PyTorch's exporter needs are missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"{' and '.join(missing)} not installed; ONNX needs: pip install 'seda_fast[export]'")
    # It warns about operators of torchvision, which no model here has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = list(OUTPUTS[: len(program.graph_signature.user_outputs)])
    written = torch.onnx.export(program, (), input_names=list(INPUTS), output_names=names, dynamo=True, verbose=False)
    assert written is not None
    written.model.metadata_props["seda_fast"] = text
    for node in written.model.graph:
        node.metadata_props.clear()
        node.meta.clear()
    written.save(path, external_data=False)


def run_onnx(path: Path, inputs: Arrays) -> list[NDArray[Any]] | None:
    """The outputs by onnxruntime; None where that is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, inputs)
    return found


# ---- the check -------------------------------------------------------------------------------------------------------


def check(model: SeDA, seed: int, found: Sequence[NDArray[Any]], inputs: Arrays) -> float:
    """The largest difference of the written graph's outputs from the model's own.

    Raises:
        DataError: it is more than rounding, or a class differs.
    """
    visual, ids = (torch.from_numpy(inputs[name]) for name in INPUTS)
    with torch.inference_mode():
        log_proba = model.predict_log_proba(visual, ids, seed=seed)
        semantic, aligned = model.align(visual, ids, seed=seed)
        _, point = model.align(visual, ids, steps=model.config.classification_steps, seed=seed)
    assert isinstance(log_proba, Tensor)
    expected = [log_proba, labels_of(model, log_proba), semantic, aligned, point]
    worst = 0.0
    for name, ours, theirs in zip(OUTPUTS, expected, found, strict=False):
        if name == "label":
            clear = _clear(model, log_proba)
            if (ours.numpy() != theirs)[clear].any():
                raise DataError("the written graph predicts other classes than the model")
            continue
        difference = float(np.abs(ours.numpy() - theirs).max())
        if not difference <= TOLERANCE:
            raise DataError(f"the written graph's {name} differs from the model's by {difference:.3g}")
        worst = max(worst, difference)
    return worst


def _clear(model: SeDA, log_proba: Tensor) -> NDArray[np.bool_]:
    """Which entries of the output ``label`` rounding cannot decide."""
    if model.config.multi_label:
        distance = (log_proba - math.log(THRESHOLD)).abs()
    elif log_proba.shape[1] > 1:
        best = log_proba.topk(2, dim=1).values
        distance = best[:, 0] - best[:, 1]
    else:
        return np.ones(len(log_proba), dtype=bool)
    return np.asarray((distance > 2 * TOLERANCE).numpy())


def example_inputs(model: SeDA) -> Arrays:
    """Rows spread as the training rows were, with sample ids small and large."""
    rng = np.random.default_rng(0)
    mean, scale = model.visual_mean.numpy(), model.visual_scale.numpy()
    visual = mean + scale * rng.standard_normal((_CHECKED_ROWS, model.config.visual_dim)).astype(np.float32)
    return {"visual": visual, "sample_ids": rng.integers(0, 2**48, _CHECKED_ROWS)}


def export(config: ExportConfig) -> str:
    """Write and check; returns what to print."""
    suffix = SUFFIXES[config.format]
    out = output_file(config.out or str(Path(config.model) / f"model{suffix}"), "--out", (suffix,))
    model = SeDA.from_pretrained(config.model)
    program = program_of(model, config.seed, config.features)
    text = about(model, config.seed, config.features)
    inputs = example_inputs(model)
    make_folder(out.parent)
    with atomic_path(out) as draft:
        if config.format == "onnx":
            write_onnx(draft, program, text)
            found = run_onnx(draft, inputs)
        else:
            write_program(draft, program, text)
            found = run_program(draft, inputs)
        if found is None:
            checked = "not compared with the model: onnxruntime is not installed"
        else:
            worst = check(model, config.seed, found, inputs)
            checked = f"same classes on {_CHECKED_ROWS} rows, largest difference from the model {worst:.1e}"
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, {checked}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""

    def body() -> None:
        config = ExportConfig(**settings_of(PROGRAM, __doc__, {"export": ExportConfig}, argv)["export"])
        # PyTorch's own: about its tree specifications.
        warnings.filterwarnings("ignore", category=FutureWarning)
        print(export(config))

    return run(body, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
