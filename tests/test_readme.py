"""The README's commands and code work as written."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from seda_fast import SeDA, SeDAConfig, evaluate, predict, train
from seda_fast.data import KEYS


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    # All of them, so that no closing fence is taken for an opening one.
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    return [content for of, content in found if of == language]


def test_python_examples_run(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SeDA(SeDAConfig(visual_dim=6, text_dim=4, n_classes=3, width=16, blocks=1)).save_pretrained("runs/digits")
    examples = blocks(readme, "python")
    assert examples
    for example in examples:
        names: dict[str, object] = {}
        exec(example, names)
        log_proba = names["log_proba"]
        assert isinstance(log_proba, torch.Tensor)
        assert log_proba.shape == (5, 3)
    assert (tmp_path / "runs" / "copy" / "model.safetensors").is_file()


def test_commands_as_written_work_in_their_order(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``python -m seda_fast.NAME`` line, on a small set named as in the README, with a small model."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {
        "visual_train": rng.normal(size=(40, 6)),
        "text_train": rng.normal(size=(40, 4)),
        "label_train": np.arange(40) % 3,
    }
    np.savez("features.npz", **arrays)
    np.savez("new.npz", visual=rng.normal(size=(7, 6)))
    lines = [line for block in blocks(readme) for line in block.splitlines() if line.startswith("python -m seda_fast.")]
    small = ["--epochs", "1", "--width", "16", "--blocks", "1", "--no-baselines"]
    mains = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}
    ran = set()
    for line in lines:
        words = shlex.split(line.split("#")[0].replace("[", "").replace("]", ""))
        name = words[2].removeprefix("seda_fast.")
        if name in mains:
            assert mains[name](words[3:] + (small if name == "train" else [])) == 0
            ran.add(name)
    assert ran == set(mains)
    assert {"predictions.csv", "aligned.npz", "runs"} <= {path.name for path in tmp_path.iterdir()}


def test_every_key_of_the_data_table_is_the_readers(readme: str) -> None:
    table = readme[readme.index("| key |") : readme.index("- A label of **-1**")]
    assert set(re.findall(r"`([a-z_]+)`", table)) == set(KEYS)


def test_make_targets_and_options_exist(readme: str, repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z]+)", readme, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
    sections = [*train.SECTIONS.values(), evaluate.EvaluateConfig, predict.PredictConfig]
    settings = {field.name for section in sections for field in dataclasses.fields(section)}
    known = {"--config", "--help", "--no-baselines", *("--" + name.replace("_", "-") for name in settings)}
    known |= {"--nproc-per-node", "--max-restarts"}  # torchrun's
    quality = (repository / "benchmarks" / "quality" / "__main__.py").read_text(encoding="utf-8")
    known |= {"--quick", "--sets", "--select"} & set(re.findall(r'"(--[a-z-]+)"', quality))
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)):
        assert option in known, option


def test_table_of_few_labels_is_that_of_the_measured_quality(readme: str, repository: Path) -> None:
    source = json.loads((repository / "benchmarks/results/quality.json").read_text(encoding="utf-8"))
    rows = {(row["set"], row["regime"]): row for row in source["rows"]}
    table = re.findall(r"^\| (\w+), (\d+) \| ([\d.*]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.*]+) \(", readme, flags=re.M)
    assert len(table) >= 7
    for name, labels, *cells in table:
        row = rows[name, f"labels-{labels}"]
        methods = row["methods"]
        others = [methods[m]["top1"] for m in ("one_step", "one_step_mse", "mlp_pseudo", "bridge")]
        expected = [*(methods[m]["top1"] for m in ("seda", "linear", "mlp")), max(others)]
        assert [cell.strip("*") for cell in cells] == [f"{value:.1f}" for value in expected], (name, labels)
        bold = [i for i, cell in enumerate(cells) if cell.startswith("*")]
        assert bold == ([0] if row["interval"][0] > 0 else []), (name, labels)


def test_sentences_on_what_carries_and_what_labels_are_of_the_measured_quality(readme: str, repository: Path) -> None:
    source = json.loads((repository / "benchmarks/results/quality.json").read_text(encoding="utf-8"))
    methods = {(row["set"], row["regime"]): row["methods"] for row in source["rows"]}
    full, told = methods["fashion_products", "full"], " ".join(readme.split())
    found = re.search(
        r"distance of (\d+) to the true texts, and (\d+) with its point estimate, .* have (\d+) and more", told
    )
    assert found is not None
    mapped = {m: full[m]["alignment"] for m in ("one_step", "one_step_mse")}
    theirs = min(values["frechet"] for values in mapped.values())
    ours = [full["seda"][kind]["frechet"] for kind in ("alignment", "alignment_point")]
    assert list(map(int, found.groups())) == [*map(round, ours), int(theirs)]
    recalls = [full["seda"]["alignment_point"], mapped["one_step_mse"], mapped["one_step"]]
    expected = "{:.1f}; of theirs {:.1f} and {:.1f}".format(*(r["recall_at_10"] for r in recalls))
    assert f"point estimate {expected})" in told
    few = [methods[name, "labels-8"] for name in ("fashion_products", "cub10", "wikipedia")]
    trained = "its trained heads have {:.1f}, {:.1f} and {:.1f}, without the teacher {:.1f}, {:.1f} and {:.1f},"
    heads = [m[name]["three_heads"]["top1"] for name in ("seda", "seda:no_teacher") for m in few]
    assert trained.format(*heads) in told
    alone = "what the teacher says, has {:.1f}, {:.1f} and {:.1f}."
    assert alone.format(*(m["seda"]["visual_head"]["top1"] for m in few)) in told
    kernel = "alone it has {:.1f}, {:.1f} and {:.1f} on the three sets, the three heads that are trained have "
    kernel += "{:.1f}, {:.1f} and {:.1f}, all four {:.1f}, {:.1f} and {:.1f}."
    sets = [methods[name, "full"]["seda"] for name in ("fashion_products", "wikipedia", "cub10")]
    heads = [m[head]["top1"] for head in ("kernel_head", "three_heads") for m in sets]
    assert kernel.format(*heads, *(m["top1"] for m in sets)) in told


def test_sentences_on_where_it_does_not_pay_are_of_the_measured_quality(readme: str, repository: Path) -> None:
    source = json.loads((repository / "benchmarks/results/quality.json").read_text(encoding="utf-8"))
    rows = {(row["set"], row["regime"]): row for row in source["rows"]}
    told = " ".join(readme.split())
    said = re.search(
        r"over five seeds ([\d.]+) points below .* ([\d.]+) above on wikipedia, ([\d.]+) below on cub10, all within",
        told,
    )
    assert said is not None
    full = [rows[name, "full"]["difference"] for name in ("fashion_products", "wikipedia", "cub10")]
    assert list(said.groups()) == [f"{value:.1f}" for value in (-full[0], full[1], -full[2])]
    assert all(low < 0 < high for low, high in (rows[name, "full"]["interval"] for name in ("wikipedia", "cub10")))
    assert rows["fashion_products", "full"]["interval"][1] > 0
    assert len(rows) == 33 and all(row["interval"][1] > 0 for row in rows.values())
    assert "in none of the 33 cells is it plainly worse." in told
    wrong = [rows[name, "wrong-labels"]["difference"] for name in ("fashion_products", "wikipedia", "cub10")]
    assert "Where 30 % of the labels are wrong it is {:.1f}, {:.1f} and {:.1f} points ahead".format(*wrong) in told
    unmeasured = {regime for (_, regime), row in rows.items() if row["methods"].get("bridge", {}).get("seeds", 0) < 5}
    assert unmeasured == {"wrong-labels"} and "by a diffusion of texts was not measured." in told
    seeds = {row["methods"][name]["seeds"] for row in rows.values() for name in ("seda", "linear", "mlp", "one_step")}
    assert min(seeds) >= 5


def test_differences_on_folds_are_of_the_measured_quality(readme: str, repository: Path) -> None:
    told = re.search(r"On six folds of each training part.* are (\S+), (\S+) and (\S+)\.", readme)
    folds = json.loads((repository / "benchmarks/results/quality.json").read_text())["cross_validated"]
    found = {row["set"]: row for row in folds if row["regime"] == "full"}
    assert told and {row["folds"] for row in found.values()} == {6}
    differences = [round(found[name]["difference"], 1) for name in ("fashion_products", "wikipedia", "cub10")]
    assert [float(number) for number in told.groups()] == pytest.approx(differences)


def test_gpu_s_speed_is_that_of_the_record(readme: str, repository: Path) -> None:
    record = json.loads((repository / "benchmarks/results/nvidia-h200.json").read_text(encoding="utf-8"))
    rows = {(row["workload"], row["competitor"]): row for row in record["rows"]}
    step, chain = "training step, B = 4096", "reverse chain of 5 steps, B = 65536 bfloat16"
    section = " ".join(readme[readme.index("On an NVIDIA H200") : readme.index("## Long runs")].split())
    graph, compiled = (rows[step, who]["ratio"] for who in ("compiled, reduce-overhead", "eager"))
    assert (
        f"takes {rows[step, 'seda_fast']['median'] * 1e3:.2f} ms: eager PyTorch takes {compiled:.1f} times" in section
    )
    assert f'`torch.compile(mode="reduce-overhead")` {graph:.1f} times.' in section
    ratios = " and ".join(f"{rows[chain, who]['ratio']:.2f}" for who in ("eager", "compiled"))
    assert f"takes {rows[chain, 'seda_fast']['median'] * 1e3:.2f} ms, {ratios} times as long" in section


def test_speed_beside_gates_made_once_is_that_of_the_record(readme: str, repository: Path) -> None:
    file = repository / "benchmarks/results/intel-r-xeon-r-processor-2-threads.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    found = {(row["workload"], row["competitor"]): f"{row['ratio']:.2f}" for row in record["rows"]}
    many, one = (f"reverse chain of 5 steps, B = {rows} float32" for rows in (1024, 1))
    section = " ".join(readme[readme.index("The loop of a chain") : readme.index("The run is without")].split())
    ratios = f"(commit {record['commit']}, where the two ratios at 1024 rows are {found[many, 'eager']} and"
    assert f"{ratios} {found[many, 'compiled']})" in section
    made_once = [found[workload, f"{who}, gates once"] for workload in (many, one) for who in ("eager", "compiled")]
    assert (
        "takes {} times as long as ours at 1024 rows and `torch.compile` {}, for one row {} and {}.".format(*made_once)
        in section
    )
    assert f"the usual loop takes {found[one, 'eager']} times as long there, less than the 3 that were" in section


def test_table_of_speed_is_that_of_the_record(readme: str, repository: Path) -> None:
    record = json.loads((repository / "benchmarks/results/amd-epyc-2-threads.json").read_text(encoding="utf-8"))
    ratios = {(row["workload"], row["competitor"]): row["ratio"] for row in record["rows"]}
    ratios |= {(name, who): run["ratio"] for name, found in record["runs"].items() for who, run in found.items()}
    section = readme[readme.index("## How fast?") : readme.index("## Long runs")]
    table = re.findall(r"^\| ([^|`]+) \| ([\d.]+) \| ([\d.]+|-) \|$", section, flags=re.M)
    assert len(table) >= 5
    for name, *cells in table:
        measured = [ratios.get((name, competitor)) for competitor in ("eager", "compiled")]
        assert cells == ["-" if ratio is None else f"{ratio:.2f}" for ratio in measured], name
    (run,) = record["runs"].values()
    assert f"{1 / run['eager']['peak_memory_ratio']:.2f} of eager PyTorch's memory" in section
