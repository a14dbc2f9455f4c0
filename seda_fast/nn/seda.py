"""SeDA: the semantic learner (DCSL), the semantic translator (DCST), and the model that joins them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import SeDAConfig, TrainConfig
from ..files import DataError, atomic_path, make_folder
from ..ops import q_sample, semantic_projection, stratified_timesteps
from .binary_teacher import BinaryPairTeacher, fit_binary_teacher
from .interaction import PFIN, Dropout
from .kernel_head import KernelHead, label_share
from .linear import placeless_linear
from .multi_label import binary_class_terms, binary_divergence, labelled_rows, rate_logits, with_centre
from .precision import WholeBuffers
from .scaling import Scaling
from .schedule import NoiseSchedule, Sampler
from .space import category_centres
from .teacher import PairTeacher, fit_teacher, lone_rows, teacher_rows
from .text_opinion import TextOpinion
from .textual_head import fitted_textual_head
from .unseen import beyond_the_seen, classes_without_pairs
from .visual import GaussianDropout, VisualHead

# Stream ids of the randomness contract.
VISUAL_NOISE, TEXTUAL_NOISE = 0, 1
SEMANTIC_TIMESTEPS, TEXTUAL_TIMESTEPS = 2, 3
SEMANTIC_CHAIN, TEXTUAL_CHAIN = 4, 5
FIRST_DROPOUT = 6

UNLABELLED = -1
# The counter step of noise draw r starts at r << 16; a chain has fewer steps than that.
_DRAW_SHIFT = 16
# Rows of one prediction block. A sample's result must not depend on its neighbours, and a matrix product's rounding
# depends on its shape: every block has this many rows, the last one padded. On a CPU core 64 rows reach the matrix
# rate of 256 (71 against 63 GFLOP/s seen, 32 rows 57). A GPU needs many more to be filled: on an H200 65 536 rows took
# 168, 119 and 101 ms in blocks of 2048, 4096 and 8192, and a single row, which takes a block too, 8.1, 7.8 and 13.3 ms.
BLOCK_ROWS = {"cpu": 64, "cuda": 4096}

WEIGHTS_FILE = "model.safetensors"
# One metadata key only: safetensors writes several in an arbitrary order, and files must be bit-identical.
_METADATA_KEY = "seda_fast"


class Losses(NamedTuple):
    """The terms of the objective, unweighted scalars, and their weighted sum ``total``."""

    total: Tensor
    centre: Tensor
    semantic: Tensor
    text: Tensor
    mapped: Tensor
    textual_head: Tensor
    teacher: Tensor
    visual: Tensor


class Shard(NamedTuple):
    """Which rows of a batch that several ranks train on together are here.

    Attributes:
        first: place of the first of them in the batch. rows: the whole batch's.
        shares: (terms,) what the rows here are of the rows that each term is a mean of, see `SeDA.term_rows`.
    """

    first: int
    rows: int
    shares: Tensor


class SemanticLearner(nn.Module):
    """Diffusion-Controlled Semantic Learner (DCSL): from noised visual features to their category centre."""

    def __init__(self, config: SeDAConfig) -> None:
        super().__init__()
        self.network = _network(config, config.visual_dim, config.visual_dim)
        self.head = nn.Linear(config.visual_dim, config.n_classes)

    def forward(
        self,
        x: Tensor,
        visual: Tensor,
        timesteps: Tensor,
        dropout: Dropout | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """``x`` (B, Dv) noised, ``visual`` (B, Dv) the condition, ``timesteps`` (B,) -> s (B, Dv)."""
        return self.network(x, visual, timesteps, dropout, memory)  # type: ignore[no-any-return]


class SemanticTranslator(nn.Module):
    """Diffusion-Controlled Semantic Translator (DCST): from noise, given [s, v], to the textual features."""

    def __init__(self, config: SeDAConfig) -> None:
        super().__init__()
        self.network = _network(config, config.text_dim, 2 * config.visual_dim)
        self.head = nn.Linear(config.text_dim, config.n_classes)

    def forward(
        self,
        x: Tensor,
        conditions: Sequence[Tensor],
        timesteps: Tensor,
        dropout: Dropout | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """``x`` (B, Dt) noised, ``conditions`` s and v (B, Dv), ``timesteps`` (B,) -> t_ (B, Dt)."""
        return self.network(x, conditions, timesteps, dropout, memory)  # type: ignore[no-any-return]


def _class_terms(
    features: Tensor, labels: Tensor, centres: Tensor | None, head: nn.Linear, smoothing: float, soft: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Centre loss of the labelled rows, and the cross entropy of labelled rows and of those with ``soft`` labels.

    ``soft`` (B, K) has rows that sum to 1, or to 0 where there is no soft label: zeros, or what is to be added to the
    target that a label makes.
    """
    centre, hard = semantic_projection(
        features, labels, centres, head.weight, head.bias, label_smoothing=smoothing, ignore_index=UNLABELLED
    )
    if soft is None:
        return centre, hard
    n_hard, n_soft = (labels >= 0).sum(), soft.sum()
    entropy = -(soft * F.log_softmax(head(features).to(soft.dtype), dim=1)).sum()
    return centre, (hard * n_hard + entropy) / (n_hard + n_soft).clamp(min=1)


def _network(config: SeDAConfig, dim: int, condition_dim: int) -> PFIN:
    return PFIN(
        dim,
        condition_dim,
        width=config.width,
        expansion=config.expansion,
        blocks=config.blocks,
        time_embedding=config.time_embedding,
        steps=config.diffusion_steps,
        memory_dim=config.text_dim if config.has_memory else 0,
        memory_heads=config.memory_heads,
    )


class SeDA(WholeBuffers):
    """Semantic-Space-Intervened Diffusive Alignment (IJCAI 2025) as a classifier of visual features.

    Args:
        config: shape and prediction settings.
        class_names: K names, kept with the checkpoint; "0", "1", ... by default.

    Buffers ``visual_mean, visual_scale, text_mean, text_scale`` standardise raw features; ``centres`` (K, Dv) are the
    category centres of standardised visual features. All are set by `fit_statistics` and travel with the checkpoint, as
    do the class texts of data that have one text a class: ``text_classes`` (K, Dt), standardised, set by
    `set_class_texts`, None for other data. Both networks read them as their memory. What standardises stays float32 in
    a model of a half precision: raw features may lie far from 0, or beyond float16.
    """

    whole = ("visual_mean", "visual_scale", "text_mean", "text_scale")
    visual_mean: Tensor
    visual_scale: Tensor
    text_mean: Tensor
    text_scale: Tensor
    centres: Tensor
    text_classes: Tensor | None
    unseen: Tensor | None
    seen: Tensor | None
    signal: Tensor
    noise: Tensor

    def __init__(self, config: SeDAConfig, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.config = config
        names = [str(k) for k in range(config.n_classes)] if class_names is None else list(class_names)
        if len(names) != config.n_classes:
            raise ValueError(f"class_names has {len(names)} names for {config.n_classes} classes")
        self.class_names = tuple(names)
        self.learner = SemanticLearner(config)
        self.translator = SemanticTranslator(config)
        self.visual = VisualHead(config)
        self.kernel = KernelHead(config.visual_dim, config.n_classes)
        self.teacher: PairTeacher | BinaryPairTeacher | None = None
        self.register_buffer("unseen", None)  # part of the state where there are such classes
        self.register_buffer("seen", None, persistent=False)
        self.opinion: TextOpinion | None = None
        self.label_share = 1.0
        # How `prepare` scaled the features; not saved, as what it comes to is.
        self.scaling: Scaling | None = None
        self.register_buffer("visual_mean", torch.zeros(config.visual_dim))
        self.register_buffer("visual_scale", torch.ones(config.visual_dim))
        self.register_buffer("text_mean", torch.zeros(config.text_dim))
        self.register_buffer("text_scale", torch.ones(config.text_dim))
        self.register_buffer("centres", torch.zeros(config.n_classes, config.visual_dim))
        texts = torch.zeros(config.n_classes, config.text_dim) if config.class_text else None
        self.register_buffer("text_classes", texts)
        self.schedule = NoiseSchedule(config.diffusion_steps)
        signal, noise = (table.to(self.centres.device) for table in self.schedule.training_tables())
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    # ---- data statistics -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_statistics(
        self,
        visual_mean: Tensor,
        visual_scale: Tensor,
        text_mean: Tensor,
        text_scale: Tensor,
        visual: Tensor,
        labels: Tensor,
    ) -> None:
        """Set the standardisation, and the centres from *standardised* ``visual`` (N, Dv) and ``labels`` (N,)."""
        centres = category_centres(visual, labels, self.config.n_classes)
        self.set_statistics(visual_mean, visual_scale, text_mean, text_scale, centres)
        self.set_rates(labels)

    @torch.no_grad()
    def set_rates(self, labels: Tensor) -> None:
        """Start the heads of a multi-label model at the classes' rates in ``labels`` (N, K); nothing for others.

        A rare class's bias is far from 0 (Lin et al. 2017, sec. 3.3). On shop photos with 46 classes the textual head's
        macro F1 after 10 epochs was 33 % from 0 and 49 % from the rates, its calibration error 40 and 4 points.
        """
        if self.config.multi_label:
            for head in (self.learner.head, self.translator.head, self.visual.head):
                head.bias.copy_(rate_logits(labels))

    @torch.no_grad()
    def set_statistics(
        self, visual_mean: Tensor, visual_scale: Tensor, text_mean: Tensor, text_scale: Tensor, centres: Tensor
    ) -> None:
        """Set the standardisation, means and scales (D,), and the category centres (K, Dv)."""
        self.visual_mean.copy_(visual_mean)
        self.visual_scale.copy_(visual_scale)
        self.text_mean.copy_(text_mean)
        self.text_scale.copy_(text_scale)
        self.centres.copy_(centres)

    @torch.no_grad()
    def set_class_texts(self, texts: Tensor) -> None:
        """Set ``text_classes`` from raw ``texts`` (K, Dt), which the textual statistics then standardise.

        Raises:
            ValueError: the model was not made for class texts, or their shape is another.
        """
        if self.text_classes is None or texts.shape != self.text_classes.shape:
            needed = None if self.text_classes is None else tuple(self.text_classes.shape)
            raise ValueError(f"class texts of shape {tuple(texts.shape)} for a model that has {needed}")
        self.text_classes.copy_(self.standardise_text(texts.to(self.text_mean.dtype)))

    @property
    def memory(self) -> Tensor | None:
        """What both networks attend to, (K, Dt); None where they have no memory."""
        return self.text_classes if self.config.has_memory else None

    def fit_teacher(self, visual: Tensor, text: Tensor, labels: Tensor, paired: Tensor, seed: int) -> None:
        """Set ``teacher`` from standardised training triples where some pairs are unlabelled, else remove it.

        Shapes as in `losses`. The teacher serves training alone and is not saved with the model.
        """
        rows = teacher_rows(labels, paired, seed)
        lone = lone_rows(labels, paired, seed)
        self.set_teacher(visual[rows], text[rows], labels[rows], seed, (visual[lone], labels[lone]))
        self.set_unseen(labels, paired)

    @torch.no_grad()
    def set_textual_head(self, text: Tensor, labels: Tensor) -> None:
        """Start the textual head at a classifier of the standardised ``text`` (n, Dt) of `textual_head_rows`."""
        start = fitted_textual_head(text, labels, self.config.n_classes)
        self.translator.head.weight.copy_(start.weight)
        self.translator.head.bias.copy_(start.bias)

    def set_teacher(
        self,
        visual: Tensor,
        text: Tensor,
        labels: Tensor,
        seed: int,
        lone: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set ``teacher`` from the rows of `teacher_rows`; no row removes it. ``lone``: see `fit_teacher`."""
        if not len(labels):
            self.teacher = None
        elif self.config.multi_label:
            self.teacher = fit_binary_teacher(visual, text, labels, seed)
        else:
            self.teacher = fit_teacher(visual, text, labels, self.config.n_classes, seed, lone)

    @torch.no_grad()
    def set_unseen(self, labels: Tensor, paired: Tensor) -> None:
        """Find the classes of labelled rows of which none has a text; ``labels`` (N,) or (N, K), ``paired`` (N,) bool.

        The textual head does not see them; what a teacher says of unlabelled pairs shows it too little of them.
        ``unseen`` (K,) bool marks them, ``seen`` holds the numbers of all others; both are None where there are none.
        """
        lone = None if self.config.class_text else classes_without_pairs(labels, paired, self.config.n_classes)
        self._mark_unseen(torch.zeros(0, dtype=torch.int64) if lone is None else lone)

    def _mark_unseen(self, classes: Tensor) -> None:
        device = self.centres.device
        marked = torch.zeros(self.config.n_classes, dtype=torch.bool, device="cpu")
        marked[classes.cpu()] = True
        seen = (~marked).nonzero()[:, 0]
        self.unseen, self.seen = (marked.to(device), seen.to(device)) if len(classes) else (None, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """What is loaded says which classes no text shows; a state that names none has none.

        A part of a state, as `load_state_dict` takes with ``strict=False``, leaves what it does not name.
        """
        marked, whole = state_dict.get(prefix + "unseen"), prefix + "centres" in state_dict
        self.kernel.absent_in_state = whole
        if whole or marked is not None:
            # One of another length is refused below, as what nothing here is for.
            fits = marked is not None and marked.shape == (self.config.n_classes,)
            self.unseen = torch.zeros_like(marked, dtype=torch.bool) if marked is not None and fits else None
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._mark_unseen(torch.zeros(0, dtype=torch.int64) if self.unseen is None else self.unseen.nonzero()[:, 0])
        # `torch.nn.Module.to_empty` empties what no state brings, too.
        device, dtype = self.centres.device, self.signal.dtype
        self.signal, self.noise = (table.to(device, dtype) for table in self.schedule.training_tables())

    @torch.no_grad()
    def set_kernel_head(
        self,
        visual: Tensor,
        text: Tensor,
        labels: Tensor,
        paired: Tensor,
        seed: int,
        shares: tuple[float, ...] = (1.0,),
    ) -> float:
        """Fit the kernel head on the rows of `kernel_rows`, (n, Dv), (n, Dt), (n,) or (n, K), (n,), all standardised.

        What an unlabelled row is of is told by ``teacher``, which must be set before, as must the textual head's start:
        beside it a paired row's label has the best of ``shares``, which is returned. Multi-label there is but 1.
        """
        known, unlabelled = labels.clamp(min=0), ~labelled_rows(labels)
        multi_label = self.config.multi_label
        targets = (known if multi_label else F.one_hot(known, self.config.n_classes)).to(visual.dtype)
        if self.teacher is not None and unlabelled.any():
            targets[unlabelled] = self.teacher(visual[unlabelled], text[unlabelled])
        if multi_label:
            self.kernel.fit_multi_label(visual, targets, seed)
            return 1.0
        if shares == (1.0,):
            return self.kernel.fit(visual, targets, seed)
        opinions = torch.where((paired & ~unlabelled)[:, None], self.translator.head(text).softmax(1), targets)
        return self.kernel.fit(visual, targets, seed, opinions, shares)

    @torch.no_grad()
    def find_label_share(self, visual: Tensor, text: Tensor, labels: Tensor, seed: int) -> float:
        """How far labels are to be believed beside the textual head at its start, on rows of `judged_rows`."""
        targets = F.one_hot(labels, self.config.n_classes).to(visual.dtype)
        return label_share(visual, targets, self.translator.head(text).softmax(1), seed)

    def set_label_share(self, share: float) -> None:
        """What labels count for in training, beside what their texts say by the textual head at its start.

        In the kernel head ``share``, in the networks' class terms twice that and at most 1: networks of few passes
        gained by less where labels are wrong, and not where labels are right and classes alike (docs/method.md). Not
        saved with the model.
        """
        self.label_share = share
        self.opinion = TextOpinion(self.translator.head, 2 * share) if share < 1 / 2 else None

    def standardise_visual(self, visual: Tensor) -> Tensor:
        """Raw (B, Dv) -> zero mean and, with a scaling of 1, unit deviation on the training part."""
        return (visual - self.visual_mean) / self.visual_scale

    def standardise_text(self, text: Tensor) -> Tensor:
        """Raw (B, Dt) -> zero mean and, with a scaling of 1, unit deviation on the training part."""
        return (text - self.text_mean) / self.text_scale

    # ---- training ------------------------------------------------------------------------------------------------

    def losses(
        self,
        visual: Tensor,
        text: Tensor,
        labels: Tensor,
        paired: Tensor,
        sample_ids: Tensor,
        *,
        seed: Tensor,
        step: Tensor,
        settings: TrainConfig,
        shard: Shard | None = None,
    ) -> Losses:
        """The training objective on one batch of standardised triples.

        Args:
            visual: (B, Dv). text: (B, Dt), finite also where ``paired`` is false (its values are not used there).
            labels: (B,) int64, -1 unlabelled; of a multi-label model (B, K) integers as `nn.multi_label` tells.
            paired: (B,) bool, whether the row has a text.
            sample_ids: (B,) int64. seed, step: int64 (), key all randomness of the step.
            settings: dropout, smoothing and the weights of the terms.
            shard: these rows are a part of a batch; the result is their share of its losses, which adds up to them.

        Rows without text train the visual and semantic terms only. Unlabelled rows train the text and teacher terms;
        where the model has a ``teacher`` of pairs, its class probabilities serve as their labels in all class terms,
        a row counting there as much as a labelled one. Where it has an ``opinion``, a labelled row's target in the
        cross entropies of the semantic and the visual head is a mixture of its label and of that.
        """
        place = {} if shard is None else {"first_row": shard.first, "batch": shard.rows}
        tau_s, tau_t = (
            stratified_timesteps(seed, step, sample_ids, self.config.diffusion_steps, stream, **place)
            for stream in (SEMANTIC_TIMESTEPS, TEXTUAL_TIMESTEPS)
        )
        layers = FIRST_DROPOUT, FIRST_DROPOUT + self.config.blocks, FIRST_DROPOUT + 2 * self.config.blocks
        dropout = Dropout(settings.dropout, seed, step, sample_ids, layers[0])
        noise = GaussianDropout.of(settings, seed, step, sample_ids, layers[2])
        hidden = self.visual.hidden(visual, noise)
        tables, key = (self.signal, self.noise), {"seed": seed, "step": step, "sample_ids": sample_ids}
        x_v = q_sample(visual, tau_s, *tables, **key, stream=VISUAL_NOISE)
        told_learner, told_semantic, told_translator = noise.conditions(visual)
        s = self.learner(x_v, visual * told_learner, tau_s, dropout, self.memory)
        x_t = q_sample(text, tau_t, *tables, **key, stream=TEXTUAL_NOISE)
        conditions = self._conditions(s * told_semantic, visual * told_translator)
        t = self.translator(x_t, conditions, tau_t, dropout._replace(stream=layers[1]), self.memory)
        mapped = t.detach()

        soft = self._soft_labels(visual, text, labels, paired)
        seen = self._beside_labels(soft, text, labels, paired, settings.label_smoothing)
        # The label of a row without text says nothing of texts.
        known = labels.masked_fill(~paired if labels.ndim == 1 else ~paired[:, None], UNLABELLED)
        # Sums over rows and dimensions are made in float32 at least, also where the networks run in a half precision.
        wide = torch.promote_types(text.dtype, torch.float32)
        pairs = paired.to(wide)
        row_weights = pairs / pairs.sum().clamp(min=1)
        smoothing, head = settings.label_smoothing, self.translator.head
        class_terms = binary_class_terms if self.config.multi_label else _class_terms
        centre, semantic = class_terms(s, labels, self.centres, self.learner.head, smoothing, seen)
        terms: tuple[Tensor, ...] = (
            centre,
            semantic,
            ((t.to(wide) - text.to(wide)).square().mean(1) * row_weights).sum(),
            class_terms(mapped, known, None, head, smoothing, soft)[1],
            class_terms(text, known, None, head, smoothing, soft)[1],
            self._teacher(s, mapped, text, row_weights, settings.teacher_temperature),
            class_terms(hidden, labels, None, self.visual.head, smoothing, seen)[1],
        )
        if shard is not None:
            terms = tuple(term * share for term, share in zip(terms, shard.shares.unbind(0), strict=True))
        total = sum((w * term for w, term in zip(settings.loss_weights, terms, strict=True)), torch.zeros_like(centre))
        return Losses(total, *terms)

    def _conditions(self, s: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """What the translator is told: s and v, zeros in the place of what `SeDAConfig.condition` leaves out."""
        keep = self.config.condition
        semantic = s if keep != "visual" else torch.zeros_like(s)
        return semantic, visual if keep != "semantic" else torch.zeros_like(visual)

    def term_rows(self, labels: Tensor, paired: Tensor) -> Tensor:
        """Of how many rows each term of `losses` (but the total) is the mean: int64 (terms,).

        ``labels`` and ``paired`` as for `losses`.
        """
        labelled, pairs = labelled_rows(labels), paired.sum()
        hard = labelled.sum()
        # What the teacher labels counts beside the labelled rows.
        soft = torch.zeros_like(hard) if self.teacher is None else (~labelled & paired).sum()
        known = (labelled & paired).sum() + soft
        return torch.stack((with_centre(labels).sum(), hard + soft, pairs, known, known, pairs, hard + soft))

    def _soft_labels(self, visual: Tensor, text: Tensor, labels: Tensor, paired: Tensor) -> Tensor | None:
        """The teacher's class probabilities (B, K); where a row is labelled or has no text, zeros, multi-label -1."""
        if self.teacher is None:
            return None
        unlabelled = ~labelled_rows(labels) & paired
        dtype = self.teacher.trust.dtype
        soft: Tensor = self.teacher(visual.to(dtype), text.to(dtype))
        if self.config.multi_label:
            return soft.masked_fill(~unlabelled[:, None], UNLABELLED)
        return soft * unlabelled[:, None]

    def _beside_labels(
        self, soft: Tensor | None, text: Tensor, labels: Tensor, paired: Tensor, smoothing: float
    ) -> Tensor | None:
        """``soft``, and for labelled rows what their texts' opinion changes of their targets (B, K)."""
        if self.opinion is None:
            return soft
        correction = self.opinion.correction(text, labels, paired, smoothing)
        return correction if soft is None else soft + correction

    def _teacher(self, s: Tensor, t: Tensor, text: Tensor, row_weights: Tensor, temperature: float) -> Tensor:
        """Mean divergence of the two heads from the text's, softened; the text itself learns nothing from it."""
        with torch.no_grad():
            logits = self._of_seen(self.translator.head(text)).to(row_weights.dtype) / temperature
            target = logits if self.config.multi_label else F.log_softmax(logits, dim=1)
        divergence = torch.zeros_like(row_weights)
        for student in (self.learner.head(s), self.translator.head(t)):
            softened = self._of_seen(student).to(row_weights.dtype) / temperature
            if self.config.multi_label:
                divergence = divergence + binary_divergence(target, softened)
            else:
                divergence = divergence + (target.exp() * (target - F.log_softmax(softened, dim=1))).sum(1)
        return temperature**2 / 2 * (divergence * row_weights).sum()

    def _of_seen(self, logits: Tensor) -> Tensor:
        """The columns of ``logits`` (B, K) of classes that the textual head has seen; of others it teaches nothing."""
        return logits if self.seen is None else logits.index_select(1, self.seen)

    # ---- prediction ----------------------------------------------------------------------------------------------

    def align(
        self,
        visual: Tensor,
        sample_ids: Tensor | None = None,
        *,
        steps: int | None = None,
        semantic_steps: int | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Carry raw visual features through both stages.

        Args:
            visual: (B, Dv) floating, raw.
            sample_ids: (B,) int64, non-negative; 0 .. B-1 by default. A row's result depends on its features, its id
                and ``seed`` alone, not on the batch it comes in.
            steps: sampling steps of the textual stage; by default `SeDAConfig.textual_steps`. 1 gives the posterior
                mean, more give a sample that lies on the textual distribution.
            semantic_steps: sampling steps of the semantic stage; by default `SeDAConfig.semantic_steps`.
            seed, draw: which noise.

        Returns:
            ``(s, t_)``: (B, Dv) in the semantic space and (B, Dt) in the textual space, both standardised.

        Raises:
            ValueError: ``visual`` or ``sample_ids`` has the wrong shape or dtype, or steps are out of range.
        """
        samplers = self._samplers(semantic_steps, steps, visual)

        def block(rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            return self._align_block(rows, ids, samplers, seed, draw)

        s, t = self._in_blocks(visual, sample_ids, block)
        return s, t

    def alignment_path(
        self, visual: Tensor, sample_ids: Tensor | None = None, *, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The estimates of `align` after each step, for pictures: (S, B, Dv) and, from the final s, (S', B, Dt)."""
        semantic, textual = self._samplers(None, None, visual)

        def block(rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            cuts = [(semantic.first(i + 1), textual.first(1)) for i in range(len(semantic.timesteps))]
            along_s = [self._align_block(rows, ids, cut, seed, 0)[0] for cut in cuts]
            cuts = [(semantic, textual.first(i + 1)) for i in range(len(textual.timesteps))]
            along_t = [self._align_block(rows, ids, cut, seed, 0)[1] for cut in cuts]
            return torch.stack(along_s, dim=1), torch.stack(along_t, dim=1)

        along_s, along_t = self._in_blocks(visual, sample_ids, block)
        return along_s.transpose(0, 1), along_t.transpose(0, 1)

    def predict_log_proba(
        self,
        visual: Tensor,
        sample_ids: Tensor | None = None,
        *,
        seed: int = 0,
        noise_draws: int | None = None,
        heads: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Class log-probabilities of raw visual features, (B, Dv) -> (B, K); multi-label, of carrying each class.

        The three heads' log-probabilities are combined with the weights `SeDAConfig.textual_weight`,
        `SeDAConfig.visual_weight` and, for the semantic head, the rest to 1; where there is a kernel head, its own are
        added with `SeDAConfig.kernel_weight`, the sum of the three having the rest to 1. The result is normalised
        (multi-label: over yes and no of each class, which is to combine the logits); and probabilities are averaged
        over ``noise_draws``. With ``heads`` the result is ``(combined, semantic head's, textual head's, visual
        head's)``, and at its end the kernel head's where there is one. ``sample_ids`` and ``seed`` as in `align`.
        """
        draws = self._draws(noise_draws)
        samplers = self._samplers(None, self.config.classification_steps, visual)

        def block(rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            return self._predict_block(rows, ids, samplers, seed, draws)[0]

        combined, *single = self._in_blocks(visual, sample_ids, block)
        return (combined, *single) if heads else combined

    def predict_and_align(
        self, visual: Tensor, sample_ids: Tensor | None = None, *, seed: int = 0
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """What `predict_log_proba` and `align` give of raw ``visual`` (B, Dv), to the bit, each stage carried out once.

        Returns:
            ``(log_proba, s, t_, point)``: `predict_log_proba`'s with ``heads``; `align`'s, (B, Dv) and (B, Dt); and its
            ``t_`` with `SeDAConfig.classification_steps` in place of `SeDAConfig.textual_steps`, (B, Dt).

        Raises:
            ValueError: as `align`.
        """
        config, draws = self.config, self._draws(None)
        samplers = self._samplers(None, config.classification_steps, visual)
        sampled = None if config.textual_steps == config.classification_steps else self._samplers(None, None, visual)[1]

        def block(rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            log_proba, s, point = self._predict_block(rows, ids, samplers, seed, draws)
            v = self._standardised(rows)
            t = point if sampled is None else self._textual_stage(v, s, sampled, ids, seed, 0)
            return (*log_proba, s, t, point)

        *log_proba, s, t, point = self._in_blocks(visual, sample_ids, block)
        return tuple(log_proba), s, t, point

    def _draws(self, given: int | None) -> int:
        draws = self.config.noise_draws if given is None else given
        if not 1 <= draws < 1 << _DRAW_SHIFT:
            raise ValueError(f"noise_draws must be in 1 .. {(1 << _DRAW_SHIFT) - 1}, not {draws}")
        return draws

    def _predict_block(
        self, rows: Tensor, ids: Tensor, samplers: tuple[Sampler, Sampler], seed: int, draws: int
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The log-probabilities of `predict_log_proba`, and what the first draw's are of, s and t_."""
        standardised = self.standardise_visual(rows)
        of_visual = [self.visual(standardised.to(self.centres.dtype))]
        of_visual += [self.kernel(standardised)] if self.kernel.fitted else []
        found: list[list[Tensor]] = [[], [], []]
        drawn = [self._align_block(rows, ids, samplers, seed, draw) for draw in range(draws)]
        for s, t in drawn:
            aligned = (self.learner.head, s), (self.translator.head, t)
            logits = (*(placeless_linear(x, head.weight, head.bias) for head, x in aligned), *of_visual)
            for kept, value in zip(found, self._combined(logits), strict=True):
                kept.append(value)
        averaged = (torch.logsumexp(torch.stack(kept), dim=0) - math.log(draws) for kept in found)
        return (*averaged, *(self._log_proba(logits) for logits in of_visual)), *drawn[0]

    def _log_proba(self, logits: Tensor) -> Tensor:
        """Log-probabilities (B, K) of a head's logits: of one class among all, or of each class by itself."""
        return F.logsigmoid(logits) if self.config.multi_label else F.log_softmax(logits, dim=1)

    def _combined(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities combined, of the semantic and of the textual head, from all heads' logits (B, K)."""
        weights = self.config.head_weights(len(logits))
        heads = [self._log_proba(head) for head in logits]
        # Normalised over yes and no, the product of powers of two-valued distributions has the weighted logits.
        mixed = list(logits) if self.config.multi_label else list(heads)
        if self.unseen is not None:
            mixed[1] = self._beyond_the_seen(mixed, weights, self.unseen)
        product = sum((w * x for w, x in zip(weights, mixed, strict=True)), torch.zeros_like(heads[0]))
        return self._log_proba(product), heads[0], heads[1]

    def _beyond_the_seen(self, heads: Sequence[Tensor], weights: Sequence[float], unseen: Tensor) -> Tensor:
        """What takes the textual head's place among ``heads`` (B, K) where it has not seen all classes.

        It would give the ``unseen`` (K,) nothing, and all heads together would never choose them. Of these the others
        tell, by their own product; among the rest, which have what the others leave to them, the textual head tells.
        """
        textual, rest = heads[1], sum(weights) - weights[1]
        if not rest:
            return textual  # nobody else is asked
        told = [w / rest * x for i, (w, x) in enumerate(zip(weights, heads, strict=True)) if i != 1]
        others = sum(told, torch.zeros_like(textual))
        if self.config.multi_label:
            return torch.where(unseen, others, textual)
        return beyond_the_seen(textual, F.log_softmax(others, dim=1), unseen)

    def forward(self, visual: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Class log-probabilities, (B, Dv) -> (B, K); see `predict_log_proba`."""
        result = self.predict_log_proba(visual, sample_ids)
        assert isinstance(result, Tensor)
        return result

    def _samplers(
        self, semantic_steps: int | None, textual_steps: int | None, visual: Tensor
    ) -> tuple[Sampler, Sampler]:
        """The two stages' samplers where ``visual`` lies."""
        if not isinstance(visual, Tensor):
            raise ValueError(f"visual must be a tensor, not {type(visual).__name__}")
        config = self.config
        chosen = (
            (config.semantic_sampler, config.semantic_steps if semantic_steps is None else semantic_steps),
            (config.textual_sampler, config.textual_steps if textual_steps is None else textual_steps),
        )
        for _, steps in chosen:
            if not 1 <= steps <= config.diffusion_steps:
                raise ValueError(f"steps must be in 1 .. {config.diffusion_steps}, not {steps}")
        semantic, textual = (self.schedule.sampler(name, steps).to(visual.device) for name, steps in chosen)
        return semantic, textual

    def _align_block(
        self, visual: Tensor, sample_ids: Tensor, samplers: tuple[Sampler, Sampler], seed: int, draw: int
    ) -> tuple[Tensor, Tensor]:
        v = self._standardised(visual)
        s = self._stage(self.learner.network, v, v, samplers[0], sample_ids, seed, draw, SEMANTIC_CHAIN)
        return s, self._textual_stage(v, s, samplers[1], sample_ids, seed, draw)

    def _standardised(self, visual: Tensor) -> Tensor:
        """What the networks read of raw (B, Dv)."""
        return self.standardise_visual(visual).to(self.centres.dtype)

    def _textual_stage(
        self, v: Tensor, s: Tensor, sampler: Sampler, sample_ids: Tensor, seed: int, draw: int
    ) -> Tensor:
        blank = v.new_zeros(v.shape[0], self.config.text_dim)
        condition = torch.cat(self._conditions(s, v), dim=1)
        return self._stage(self.translator.network, blank, condition, sampler, sample_ids, seed, draw, TEXTUAL_CHAIN)

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
        seeds = torch.tensor(seed, dtype=torch.int64, device=source.device)
        step = torch.tensor(draw << _DRAW_SHIFT, dtype=torch.int64, device=source.device)
        first = torch.zeros(source.shape[0], dtype=torch.int64, device=source.device)
        initial = q_sample(
            source,
            first,
            sampler.initial_signal,
            sampler.initial_noise,
            seed=seeds,
            step=step,
            sample_ids=sample_ids,
            stream=stream,
        )
        keys = {"seed": seeds, "step": step, "sample_ids": sample_ids}
        return network.chain(initial, source, condition, sampler, **keys, stream=stream, memory=self.memory)

    def _in_blocks(
        self,
        visual: Tensor,
        sample_ids: Tensor | None,
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Apply ``function`` to the device's `BLOCK_ROWS` at a time, the last block zero-padded; join the results."""
        if visual.ndim != 2 or visual.shape[1] != self.config.visual_dim:
            raise ValueError(f"visual must have shape (rows, {self.config.visual_dim}), not {tuple(visual.shape)}")
        if not visual.is_floating_point():
            raise ValueError(f"visual must be floating, not {visual.dtype}")
        rows = visual.shape[0]
        if sample_ids is None:
            sample_ids = torch.arange(rows, dtype=torch.int64, device=visual.device)
        if sample_ids.shape != (rows,) or sample_ids.dtype != torch.int64:
            raise ValueError(f"sample_ids must be int64 of shape ({rows},)")
        block_rows = BLOCK_ROWS[visual.device.type]
        padding = -rows % block_rows if rows else block_rows
        visual = F.pad(visual.to(self.visual_mean.dtype), (0, 0, 0, padding))
        sample_ids = F.pad(sample_ids, (0, padding))
        parts = [function(v, i) for v, i in zip(visual.split(block_rows), sample_ids.split(block_rows), strict=True)]
        return tuple(torch.cat(part)[:rows] for part in zip(*parts, strict=True))

    # ---- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``model.safetensors`` (weights, statistics, configuration, class names) and return its path.

        The file is complete or absent: it is written under a temporary name and renamed.

        Raises:
            DataError: the folder or the file cannot be written.
        """
        directory = Path(directory)
        make_folder(directory)
        about: dict[str, Any] = {"config": dataclasses.asdict(self.config), "class_names": list(self.class_names)}
        if self.unseen is not None:
            about["unseen"] = self.unseen.nonzero()[:, 0].tolist()
        state = self.state_dict()
        state.pop("unseen", None)  # it stands in ``about``
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        path = directory / WEIGHTS_FILE
        with atomic_path(path) as draft:
            save_file(tensors, draft, metadata={_METADATA_KEY: json.dumps(about, sort_keys=True)})
        return path

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> SeDA:
        """Read what `save_pretrained` wrote, in evaluation mode.

        Raises:
            DataError: the folder holds no readable ``model.safetensors`` of this library.
        """
        path = Path(directory) / WEIGHTS_FILE
        try:
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; a trained model's folder holds {WEIGHTS_FILE}")
            path.open("rb").close()  # safetensors says of a file that may not be read that it is not there
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if _METADATA_KEY not in metadata:
                raise DataError(f"{path}: not a model of this library (its metadata has no {_METADATA_KEY!r})")
            about = json.loads(metadata[_METADATA_KEY])
            # Whatever the caller's default type is, in which it would be made.
            model = cls(SeDAConfig(**about["config"]), about["class_names"]).float()
            model.load_state_dict(load_file(path))
            model._mark_unseen(torch.tensor(about.get("unseen", []), dtype=torch.int64))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise DataError(f"{path}: not a readable safetensors file ({error})") from error
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            # PyTorch names the tensors below its first line.
            reason = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
            raise DataError(f"{path}: not a model of this library ({reason[:300]})") from error
        bad = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None)
        if bad is not None:
            raise DataError(f"{path}: {bad} holds NaN or infinity")
        return model.to(device).eval()
