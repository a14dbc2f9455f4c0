"""The joined model: objective, prediction, files."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from seda_fast import DataError, SeDA, SeDAConfig, TrainConfig, reference
from seda_fast.nn.seda import BLOCK_ROWS

DV, DT, K = 10, 6, 4
CONFIG = SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, blocks=2, time_embedding=8, diffusion_steps=100)


def model(**changes: object) -> SeDA:
    torch.manual_seed(1)
    config = SeDAConfig(**{**CONFIG.__dict__, **changes})  # type: ignore[arg-type]
    made = SeDA(config, [f"class {k}" for k in range(K)])
    for parameter in made.parameters():  # no layer left at zero
        torch.nn.init.normal_(parameter, std=0.2)
    made.fit_statistics(
        torch.randn(DV), torch.rand(DV) + 0.5, torch.randn(DT), torch.rand(DT) + 0.5,
        torch.randn(20, DV), torch.arange(20) % K,
    )  # fmt: skip
    return made.eval()


def batch(rows: int = 12) -> dict[str, Tensor]:
    return {
        "visual": torch.randn(rows, DV),
        "text": torch.randn(rows, DT),
        "labels": torch.arange(rows) % K,
        "paired": torch.ones(rows, dtype=torch.bool),
        "sample_ids": torch.arange(rows) + 100,
    }


def losses(made: SeDA, data: dict[str, Tensor], **settings: float):  # type: ignore[no-untyped-def]
    return made.losses(
        **data,
        seed=torch.tensor(5),
        step=torch.tensor(7),
        settings=TrainConfig(**settings),  # type: ignore[arg-type]
    )


def test_objective_is_the_methods_formula() -> None:
    """Every term from the two networks' outputs, with PyTorch's own losses."""
    made, data = model(), batch()
    seen: dict[str, Tensor] = {}
    made.learner.register_forward_hook(lambda module, inputs, output: seen.update(x_v=inputs[0], s=output))
    made.translator.register_forward_hook(
        lambda module, inputs, output: seen.update(x_t=inputs[0], c=inputs[1], t=output)
    )
    weights = {"centre_weight": 0.5, "semantic_weight": 0.7, "text_weight": 1.3, "mapped_weight": 0.2,
               "textual_head_weight": 0.9, "teacher_weight": 0.4, "visual_head_weight": 0.6}  # fmt: skip
    off = {"dropout": 0.0, "condition_dropout": 0.0, "visual_dropout": 0.0, "visual_input_dropout": 0.0}
    found = losses(made, data, **off, label_smoothing=0.1, teacher_temperature=2.0, **weights)
    s, t, y = seen["s"], seen["t"], data["labels"]
    torch.testing.assert_close(torch.cat(seen["c"], 1), torch.cat((s, data["visual"]), 1))

    def cross_entropy(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, y, label_smoothing=0.1)

    head_s, head_t = made.learner.head, made.translator.head
    teacher = (head_t(data["text"]) / 2).softmax(1)
    divergences = [
        4 * functional.kl_div((head / 2).log_softmax(1), teacher, reduction="batchmean")
        for head in (head_s(s), head_t(t))
    ]
    expected = (
        functional.mse_loss(s, made.centres[y]),
        cross_entropy(head_s(s)),
        functional.mse_loss(t, data["text"]),
        cross_entropy(head_t(t)),
        cross_entropy(head_t(data["text"])),
        sum(divergences) / 2,
        cross_entropy(made.visual(data["visual"])),
    )
    for name, value in zip(found._fields[1:], expected, strict=True):
        torch.testing.assert_close(getattr(found, name), value, msg=lambda text, name=name: f"{name}: {text}")
    total = sum(w * term for w, term in zip(weights.values(), expected, strict=True))
    torch.testing.assert_close(found.total, total)


def gradient_of(made: SeDA, data: dict[str, Tensor], parameter: Tensor, **settings: float) -> Tensor | None:
    return torch.autograd.grad(losses(made, data, **settings).total, parameter, allow_unused=True)[0]


def test_gradients_stop_where_the_method_stops_them() -> None:
    made, data = model(), batch()
    off = {"centre_weight": 0.0, "semantic_weight": 0.0, "text_weight": 0.0, "mapped_weight": 0.0,
           "textual_head_weight": 0.0, "teacher_weight": 0.0, "visual_head_weight": 0.0}  # fmt: skip
    translator, head_t, head_s = (
        made.translator.network.output.weight,
        made.translator.head.weight,
        made.learner.head.weight,
    )

    def strength(parameter: Tensor, **on: float) -> float:
        gradient = gradient_of(made, data, parameter, **{**off, **on})
        return 0.0 if gradient is None else float(gradient.abs().sum())

    # The class loss on t_ trains its head and leaves the mapping to the text loss.
    assert strength(translator, mapped_weight=1.0) == 0
    assert strength(head_t, mapped_weight=1.0) > 0
    assert strength(translator, text_weight=1.0) > 0
    # The teacher teaches both heads.
    assert strength(head_s, teacher_weight=1.0) > 0
    assert strength(head_t, teacher_weight=1.0) > 0
    assert strength(translator, teacher_weight=1.0) == 0


def test_unlabelled_rows_train_text_and_teacher_terms_only() -> None:
    made, data = model(), batch()
    data["labels"] = torch.full_like(data["labels"], -1)
    found = losses(made, data)
    for name in ("centre", "semantic", "mapped", "textual_head", "visual"):
        assert getattr(found, name) == 0
    assert found.text > 0
    assert found.teacher > 0


@pytest.mark.parametrize("condition", ["both", "semantic", "visual"])
def test_translator_sees_what_the_condition_names(condition: str) -> None:
    made, data = model(condition=condition), batch()
    seen: dict[str, Tensor] = {}
    made.learner.register_forward_hook(lambda module, inputs, output: seen.update(s=output))
    made.translator.register_forward_hook(lambda module, inputs, output: seen.update(c=inputs[1]))
    losses(made, data, condition_dropout=0.0)
    s, v = seen["c"]
    assert torch.equal(s, torch.zeros_like(s) if condition == "visual" else seen["s"])
    assert torch.equal(v, torch.zeros_like(v) if condition == "semantic" else data["visual"])


def test_teacher_labels_unlabelled_pairs_only() -> None:
    """With a teacher of pairs each class term is the mean over labelled rows and softly labelled ones alike."""
    made, data = model(), batch()
    data["labels"][:5] = -1
    data["paired"][:2] = False
    data["text"][:2] = 0
    made.fit_teacher(torch.randn(40, DV), torch.randn(40, DT), torch.arange(40) % (K + 1) - 1, torch.ones(40) > 0, 3)
    assert made.teacher is not None
    off = {"dropout": 0.0, "condition_dropout": 0.0, "visual_dropout": 0.0, "visual_input_dropout": 0.0}
    found = losses(made, data, **off, label_smoothing=0.0)
    soft = made.teacher(data["visual"], data["text"])
    targets = torch.cat((soft[2:5], functional.one_hot(data["labels"][5:], K).float()))
    expected = functional.cross_entropy(made.visual(data["visual"])[2:], targets)
    torch.testing.assert_close(found.visual, expected)
    torch.testing.assert_close(
        found.textual_head, functional.cross_entropy(made.translator.head(data["text"])[2:], targets)
    )
    without = made.teacher
    made.teacher = None
    torch.testing.assert_close(losses(made, data, **off).centre, found.centre)
    made.teacher = without
    assert "teacher" not in " ".join(made.state_dict())
    made.fit_teacher(data["visual"], data["text"], torch.arange(12) % K, data["paired"], 3)
    assert made.teacher is None


def test_rows_without_text_train_semantic_terms_only() -> None:
    """Their placeholder text changes nothing, and their labels do not reach the textual terms."""
    made, data = model(), batch()
    data["paired"][::3] = False
    one = losses(made, data, dropout=0.0)
    data["text"] = data["text"].masked_fill(~data["paired"][:, None], 1e3)
    two = losses(made, data, dropout=0.0)
    assert torch.equal(torch.stack(tuple(one)), torch.stack(tuple(two)))
    data["paired"][:] = False
    none = losses(made, data)
    for name in ("text", "mapped", "textual_head", "teacher"):
        assert getattr(none, name) == 0
    assert none.centre > 0
    assert none.visual > 0
    assert none.semantic > 0


def test_losses_compile_in_one_graph_and_agree_with_eager() -> None:
    made, data = model(), batch()
    key = {"seed": torch.tensor(5), "step": torch.tensor(7)}
    data["labels"][:4] = -1
    made.fit_teacher(torch.randn(40, DV), torch.randn(40, DT), torch.arange(40) % (K + 1) - 1, torch.ones(40) > 0, 3)
    settings = TrainConfig(dropout=0.2)
    compiled = torch.compile(lambda: made.losses(**data, **key, settings=settings), fullgraph=True)
    torch.testing.assert_close(torch.stack(tuple(compiled())), torch.stack(tuple(losses(made, data, dropout=0.2))))
    eager = torch.autograd.grad(losses(made, data, dropout=0.2).total, list(made.parameters()))
    graph = torch.autograd.grad(compiled().total, list(made.parameters()))
    for ours, theirs in zip(graph, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 150])
def test_prediction_does_not_depend_on_the_batch(rows: int) -> None:
    made = model(noise_draws=2)
    visual, ids = torch.randn(200, DV), torch.arange(200) * 7919
    with torch.no_grad():
        whole = made.predict_log_proba(visual, ids)
        chosen = torch.randperm(200)[:rows]
        part = made.predict_log_proba(visual[chosen], ids[chosen])
    assert torch.equal(part.argmax(1), whole[chosen].argmax(1))
    torch.testing.assert_close(part, whole[chosen], rtol=0, atol=1e-6)
    again = made.predict_log_proba(visual, ids)
    assert torch.equal(again, whole)


def test_prediction_depends_on_id_and_seed() -> None:
    made = model()
    visual = torch.randn(1, DV).expand(3, DV)
    ids = torch.tensor([4, 4, 5])
    with torch.no_grad():
        one, other = made.predict_log_proba(visual, ids), made.predict_log_proba(visual, ids, seed=1)
    torch.testing.assert_close(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(one[0], other[0])


def test_combined_prediction_is_the_weighted_product_of_the_heads() -> None:
    made = model(textual_weight=0.3, visual_weight=0.6)
    rows = torch.randn(9, DV)
    with torch.no_grad():
        combined, semantic, textual, visual = made.predict_log_proba(rows, heads=True)
        torch.testing.assert_close(visual, made.visual(made.standardise_visual(rows)).log_softmax(1))
    torch.testing.assert_close(combined, (0.1 * semantic + 0.3 * textual + 0.6 * visual).log_softmax(1))
    torch.testing.assert_close(combined.exp().sum(1), torch.ones(9))


def test_draws_average_probabilities() -> None:
    made = model(textual_weight=0.5, visual_weight=0.0)
    visual = torch.randn(5, DV)
    with torch.no_grad():
        s, t = zip(*[made.align(visual, steps=1, draw=r) for r in range(3)], strict=True)
        single = [
            (0.5 * made.learner.head(a).log_softmax(1) + 0.5 * made.translator.head(b).log_softmax(1)).softmax(1)
            for a, b in zip(s, t, strict=True)
        ]
        found = made.predict_log_proba(visual, noise_draws=3).exp()
    torch.testing.assert_close(found, torch.stack(single).mean(0))


def test_it_is_a_module_like_any_other() -> None:
    made = model()
    visual = torch.randn(6, DV)
    assert made(visual).shape == (6, K)
    assert torch.equal(copy.deepcopy(made)(visual), made(visual))
    assert made(visual[:0]).shape == (0, K)
    wide = visual.clone().requires_grad_()
    made(wide).sum().backward()
    assert wide.grad is not None
    assert wide.grad.abs().sum() > 0
    torch.testing.assert_close(
        copy.deepcopy(made).double()(visual.double()).float(), made(visual), rtol=1e-4, atol=1e-4
    )
    for bad in (visual[:, :-1], visual[0], visual.long(), visual.numpy()):
        with pytest.raises(ValueError, match="visual must"):
            made(bad)
    for steps in (0, -1, 101):
        with pytest.raises(ValueError, match=f"steps must be in 1 .. 100, not {steps}"):
            made.align(visual, steps=steps)


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_model_made_on_the_meta_device_is_what_it_loads(way: str) -> None:
    """Tables that are made of settings alone are in no state, and `to_empty` leaves them full of what lay there."""
    full, data = model(), batch()
    with torch.device("meta"):
        made = SeDA(CONFIG)
    if way == "to_empty":
        made.to_empty(device="cpu")
        for buffer in made.buffers():
            buffer.fill_(7)
    made.load_state_dict(full.state_dict(), assign=way == "assign")
    for (name, found), (_, expected) in zip(made.named_buffers(), full.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert losses(made, data).total.equal(losses(full, data).total)
    visual = torch.randn(5, DV)
    with torch.no_grad():
        assert torch.equal(made.eval()(visual), full.eval()(visual))


def test_path_ends_where_align_ends() -> None:
    made = model()
    visual = torch.randn(5, DV)
    with torch.no_grad():
        s, t = made.align(visual)
        along_s, along_t = made.alignment_path(visual)
    assert along_s.shape == (made.config.semantic_steps, 5, DV)
    assert along_t.shape == (made.config.textual_steps, 5, DT)
    torch.testing.assert_close(along_s[-1], s)
    torch.testing.assert_close(along_t[-1], t)


def test_saved_model_predicts_the_same_and_its_file_is_reproducible(tmp_path: Path) -> None:
    made = model()
    visual = torch.randn(70, DV)
    path = made.save_pretrained(tmp_path / "a")
    loaded = SeDA.from_pretrained(tmp_path / "a")
    assert loaded.config == made.config
    assert loaded.class_names == made.class_names
    assert not loaded.training
    assert torch.equal(loaded(visual), made(visual))
    assert made.save_pretrained(tmp_path / "b").read_bytes() == path.read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model.safetensors"]


def test_unusable_model_files_are_one_sentence(tmp_path: Path) -> None:
    def refuses(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            SeDA.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    refuses("there is no such file")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors")
    refuses("not a readable safetensors file")
    save_file({"x": torch.zeros(1)}, path)
    refuses("not a model of this library")
    made = model()
    made.save_pretrained(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses("not a readable safetensors file")
    about = {"config": {**CONFIG.__dict__, "width": 32}, "class_names": list("abcd")}
    path.write_bytes(whole)
    save_file(load_file(path), path, metadata={"seda_fast": json.dumps(about)})
    refuses("not a model of this library")
    about["config"] = {**CONFIG.__dict__, "wings": 2}
    path.write_bytes(whole)
    save_file(load_file(path), path, metadata={"seda_fast": json.dumps(about)})
    refuses("not a model of this library")


def test_networks_are_told_noised_conditions_in_training_only() -> None:
    made, data = model(), batch()
    told: dict[str, tuple[Tensor, ...]] = {}
    made.learner.register_forward_hook(lambda module, inputs, output: told.update(v=(inputs[1],), s=(output,)))
    made.translator.register_forward_hook(lambda module, inputs, output: told.update(c=inputs[1]))
    first = 6 + 2 * made.config.blocks + 2

    def factor(dim: int, stream: int, rate: float) -> Tensor:
        eps = reference.normals(torch.tensor(5), torch.tensor(7), data["sample_ids"], dim, stream)
        return (1 + math.sqrt(rate / (1 - rate)) * eps).float()

    factors = *factor(2 * DV, first, 0.4).chunk(2, dim=1), factor(DV, first + 1, 0.3)
    losses(made, data, dropout=0.0, condition_dropout=0.4, translator_dropout=0.3)
    visual, s = data["visual"], told["s"][0]
    expected = (x * factor for x, factor in zip((visual, s, visual), factors, strict=True))
    for found, wanted in zip((*told["v"], *told["c"]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    only_text = {"centre_weight": 0.0, "semantic_weight": 0.0, "teacher_weight": 0.0, "visual_head_weight": 0.0}
    reaches = gradient_of(made, data, made.learner.network.output.weight, **only_text)
    assert reaches is not None
    assert reaches.abs().sum() > 0  # the translator's loss, through s


def test_prediction_compiles_whole() -> None:
    made = model().eval()
    visual = torch.randn(5, DV)
    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")(visual)
        torch.testing.assert_close(compiled, made(visual))


def test_a_model_predicts_under_another_default_device() -> None:
    """As torch.set_default_device("cuda") makes it: what a prediction makes itself is where the model is."""
    made, visual = model().eval(), torch.randn(5, DV)
    with torch.no_grad():
        expected = made(visual), *made.align(visual)
        with torch.device("meta"):
            found = made(visual), *made.align(visual)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_model_lies_on_one_device() -> None:
    with torch.device("meta"):
        made = SeDA(CONFIG)
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"meta"}
    made.load_state_dict(model().state_dict(), assign=True)
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"cpu"}


def test_classes_that_no_text_shows_are_assigned_to_a_model_on_the_meta_device() -> None:
    full, visual = model().eval(), torch.randn(5, DV)
    full._mark_unseen(torch.tensor([1]))
    with torch.device("meta"):
        made = SeDA(CONFIG)
    made.load_state_dict(full.state_dict(), assign=True)
    assert made.unseen is not None and torch.equal(made.unseen, full.unseen)
    with torch.no_grad():
        assert torch.equal(made.eval()(visual), full(visual))


def test_a_part_of_a_state_leaves_the_rest_as_it_is() -> None:
    """`load_state_dict` with strict=False, as of averaged weights: the kernel head and the marks are not in it."""
    made, visual = model().eval(), torch.randn(5, DV)
    made.kernel.fit(torch.randn(12, DV), torch.eye(K)[torch.arange(12) % K].double(), 0)
    made._mark_unseen(torch.tensor([1]))
    assert made.kernel.fitted
    with torch.no_grad():
        before = made(visual)
        made.load_state_dict(dict(made.named_parameters()), strict=False)
        assert torch.equal(made(visual), before)
        made.load_state_dict({n: t for n, t in made.state_dict().items() if n.startswith("translator.")}, strict=False)
        assert torch.equal(made(visual), before)
    whole = {name: t for name, t in made.state_dict().items() if not name.startswith("kernel.") and name != "unseen"}
    made.load_state_dict(whole)
    assert not made.kernel.fitted and made.unseen is None


@pytest.mark.parametrize("settings", [{}, {"noise_draws": 3, "semantic_steps": 2}, {"textual_steps": 1}])
def test_predicting_and_aligning_at_once_has_the_bits_of_each_alone(
    settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = SeDA(SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, blocks=1, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    visual, ids = torch.randn(70, DV), torch.arange(5, 75)
    with torch.no_grad():
        log_proba = model.predict_log_proba(visual, ids, seed=3, heads=True)
        s, t = model.align(visual, ids, seed=3)
        _, point = model.align(visual, ids, steps=model.config.classification_steps, seed=3)
        stages = []
        stage = SeDA._stage
        monkeypatch.setattr(SeDA, "_stage", lambda *given: (stages.append(given), stage(*given))[1])
        found = model.predict_and_align(visual, ids, seed=3)
    assert all(map(torch.equal, found[0], log_proba)) and len(found[0]) == len(log_proba)
    assert torch.equal(found[1], s) and torch.equal(found[2], t) and torch.equal(found[3], point)
    blocks = -(-70 // BLOCK_ROWS["cpu"])
    same = model.config.textual_steps == model.config.classification_steps
    assert len(stages) == blocks * (2 * model.config.noise_draws + (not same))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_know_every_timestep(dtype: torch.dtype) -> None:
    """bfloat16 would take timestep 999 for 1000, and its angles err by radians."""
    modulation = SeDA(SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K)).learner.network.modulation
    modulation.tables.weight.data.normal_()
    steps = torch.arange(0, 1000, 37)
    with torch.no_grad():
        exact = modulation(steps)
        found = modulation.to(dtype)(steps)
    assert modulation.frequencies.dtype == torch.float32
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() < 0.02 * exact.abs().max()
