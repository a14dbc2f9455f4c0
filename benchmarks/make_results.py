"""Write ``benchmarks/RESULTS.md`` from the recorded ``benchmarks/results/*.json``: floor, target, reached, ratio.

    python benchmarks/make_results.py [--check]

A figure stands there only when a run recorded it; what nobody measured says so. ``--check`` writes nothing and fails
when the file is not what the records give.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NOT_MEASURED = "not measured"
OURS = "seda_fast"
# A whole run on a CPU, the same recipe in eager PyTorch over ours.
RUN_TO_REACH = 1.3
# What a whole run was in records that do not say it.
TRAINING_ALONE = "both sides train on random tensors, without what is fitted before and predicted after"


@dataclass(frozen=True, eq=False)
class Target:
    """What a workload should reach.

    Attributes:
        workload: how the recorded workload's name begins. shown: its name here.
        gpu_floor, gpu_seconds: counted floor and time to reach on an H200, None where only ratios count.
        gpu, cpu: the competitor's time over ours to reach, by competitor.
    """

    workload: str
    shown: str
    gpu_floor: float | None
    gpu_seconds: float | None
    gpu: dict[str, float]
    cpu: dict[str, float]


TARGETS = (
    Target("noising forward", "noising", 47e-6, 55e-6, {}, {"eager": 3.0, "compiled": 6.0}),
    Target("interaction forward", "interaction block, forward and backward", 130e-6, 215e-6,
           {"compiled, max-autotune": 1.5}, {}),
    Target("projection forward", "projection, forward and backward", None, None, {"compiled": 1.3}, {}),
    Target("training step", "training step", 370e-6, 750e-6, {"eager": 3.0, "compiled, reduce-overhead": 1.4},
           {"eager": 1.3, "compiled": 1.35}),
    # One stage, half of the two that were asked for together.
    Target("reverse chain of 5 steps, B = 1 ", "reverse chain of one row", 10e-6, 75e-6, {}, {"eager": 3.0}),
    Target("reverse chain", "reverse chain of many rows", 3.3e-3, 5.5e-3, {}, {"eager": 1.5, "compiled": 1.2}),
)  # fmt: skip


def target_of(workload: str) -> Target | None:
    """The first target whose workload this is."""
    return next((target for target in TARGETS if workload.startswith(target.workload)), None)


def duration(seconds: float | None) -> str:
    """In a unit that suits it."""
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def is_gpu(record: dict[str, Any]) -> bool:
    """Absolute figures are recorded on a GPU only."""
    return record["copy_bytes_per_second"] is not None


def shares_of(row: dict[str, Any]) -> str:
    """Of a row's two ceilings, that which binds first; then what the workload moves and multiplies."""
    told = f"{row['share_of_ceiling']:.0%} of {row['bound']}"
    if row.get("moved") is None:
        return told
    other = "copy" if row["bound"] == "matrix" else "matrix"
    if row["flops"]:
        told += f", {row['other_share']:.0%} of {other}"
    counted = f"{row['moved'] / 1e6:.3g} MB" + (f", {row['flops'] / 1e9:.3g} GFLOP" if row["flops"] else "")
    return f"{told} ({counted})"


def table_of(record: dict[str, Any]) -> list[str]:
    """A row for each workload and competitor."""
    lines = [
        "| workload | floor | time to reach | reached | share of ceiling | against | ratio to reach | ratio | spread "
        "| at the ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_workload: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_workload.setdefault(row["workload"], []).append(row)
    for name, rows in by_workload.items():
        ours = next(row for row in rows if row["competitor"] == OURS)
        target = target_of(name)
        wanted = (target.gpu if is_gpu(record) else target.cpu) if target else {}
        to_reach = duration(target.gpu_seconds) if target and target.gpu_seconds and is_gpu(record) else "-"
        share = shares_of(ours)
        times = (duration(ours["floor"]), to_reach, duration(ours["median"])) if is_gpu(record) else ("-", "-", "-")
        for row in rows:
            if row is ours:
                continue
            ratio = f"{wanted[row['competitor']]:.2f}" if row["competitor"] in wanted else "-"
            at_ceiling = f"{row['ratio'] / ours['share_of_ceiling']:.2f}" if ours["bound"] == "matrix" else "-"
            cells = (name, *times, share, row["competitor"], ratio, f"{row['ratio']:.2f}", f"{row['spread']:.0%}")
            cells = (*cells, at_ceiling)
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def not_compared(record: dict[str, Any]) -> list[str]:
    """One line on the competitors that could not run, and why, and one on the benchmarks that failed whole; none where
    all ran."""
    reasons: dict[str, None] = {}
    failed = []
    for place, said in record.get("left_out", {}).items():
        _, _, competitor = place.partition(": ")
        if competitor:
            reasons[f"{competitor} ({said})"] = None
        else:
            failed.append(f"{place.rpartition('::')[2]} ({said})")
    lines = [f"Not compared: {'; '.join(reasons)}."] if reasons else []
    lines += [f"Without a result: {'; '.join(failed)}."] if failed else []
    return [part for line in lines for part in ("", line)]


def unmeasured(record: dict[str, Any]) -> list[str]:
    """One line on the targets that the record says nothing of; none where it says something of all."""
    met = {(target_of(row["workload"]), row["competitor"]) for row in record["rows"]}
    missing = []
    for target in TARGETS:
        if (target, OURS) not in met:
            missing.append(target.shown)
            continue
        ratios = target.gpu if is_gpu(record) else target.cpu
        missing += [f"{target.shown} against {name}" for name in ratios if (target, name) not in met]
    return ["", f"Of what has a target, {NOT_MEASURED}: {'; '.join(missing)}."] if missing else []


def section(record: dict[str, Any]) -> list[str]:
    """What one device's record says."""
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version != "not installed")
    lines = [f"## {record['device']}", "", f"Commit {record['commit']}; {used}.", ""]
    lines += [f"{record['repeats']} repeats of each:", ""]
    lines += table_of(record)
    lines += not_compared(record)
    lines += unmeasured(record)
    lines += growth_of(record)
    if record.get("runs"):
        lines += runs_of(record)
    parts = {"growth": "how time grows", "runs": "whole runs", "starts": "starts, imports and their memory"}
    if absent := [shown for part, shown in parts.items() if not record.get(part)]:
        lines += ["", f"{NOT_MEASURED.capitalize()} here: {'; '.join(absent)}."]
    lines += starts_of(record)
    return [*lines, ""]


def listed(values: list[Any] | None, form: str) -> str:
    """Figures in a row; a dash where the record has none."""
    return ", ".join(format(value, form) for value in values) if values else "-"


def growth_of(record: dict[str, Any]) -> list[str]:
    """How time grows with each size, a row each, and competitors over the sizes; none where nothing was recorded."""
    if not record.get("growth"):
        return []
    lines = ["", "How time grows, fitted on logarithms, and from the last size but one to the last:", ""]
    lines += ["| | sizes | slope | at the end | repeats | spread |", "|---|---|---|---|---|---|"]
    for name, found in record["growth"].items():
        sizes, times = found["sizes"], found["times"]
        end = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
        counts, spreads = (
            listed(found.get(of, {}).get(OURS), form) for of, form in (("counts", "d"), ("spreads", ".0%"))
        )
        cells = (name, listed(sizes, "d"), f"{found['slope']:.2f}", f"{end:.2f}", counts, spreads)
        lines.append("| " + " | ".join(cells) + " |")
    return lines + sizes_of(record)


def starts_of(record: dict[str, Any]) -> list[str]:
    """Starts, a row each; none where nothing was recorded."""
    if not record.get("starts"):
        return []
    lines = ["", "| start | first step over a later one | import over PyTorch's | peak memory | repeats | spread |"]
    lines.append("|---|---|---|---|---|---|")
    for name, start in record["starts"].items():
        spread = f"{start['spread']:.0%}" if "spread" in start else "-"
        cells = (f"{start['first_step_over_later']:.1f}", f"{start['import_over_torch']:.2f}",
                 f"{start['peak_memory_bytes'] / 1e6:.0f} MB", str(start.get("count", "-")), spread)  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def sizes_of(record: dict[str, Any]) -> list[str]:
    """Competitors over the sizes of a growth, a row each, with the spreads where the record has them, and how often
    the least repeated was measured."""
    lines = []
    for name, found in record["growth"].items():
        ratios, counts = found.get("ratios", {}), found.get("counts")
        if ratios:
            spread = ", and in brackets its spread" if "spreads" in found else ""
            lines += ["", f"Time over ours{spread}: {name}", ""]
            lines.append("| | " + " | ".join(map(str, found["sizes"])) + " |")
            lines.append("|---" * (len(found["sizes"]) + 1) + "|")
            for competitor, values in ratios.items():
                spreads = found.get("spreads", {}).get(competitor)
                known = [""] * len(values) if spreads is None else [f" ({value:.0%})" for value in spreads]
                cells = (f"{value:.2f}{around}" for value, around in zip(values, known, strict=True))
                lines.append(f"| {competitor} | " + " | ".join(cells) + " |")
            if is_gpu(record):
                lines.append("| ours takes | " + " | ".join(duration(taken) for taken in found["times"]) + " |")
            if counts:
                least = (min(count) for count in zip(*counts.values(), strict=True))
                lines.append("| repeats, at least | " + " | ".join(map(str, least)) + " |")
    return lines


def runs_of(record: dict[str, Any]) -> list[str]:
    """Whole runs, a row each competitor, and what they are; only a CPU's have a target."""
    lines = ["", "| whole run | against | ratio to reach | ratio | spread | peak memory, over ours | repeats |"]
    lines.append("|---|---|---|---|---|---|---|")
    to_reach, covers = "-" if is_gpu(record) else f"{RUN_TO_REACH:.2f}", dict[str, None]()
    for name, found in record["runs"].items():
        for competitor, run in found.items():
            covers[run.get("covers", TRAINING_ALONE)] = None
            if competitor != OURS:
                figures = f"{run['ratio']:.2f} | {run['spread']:.0%} | {run['peak_memory_ratio']:.2f}"
                lines.append(f"| {name} | {competitor} | {to_reach} | {figures} | {run.get('count', '-')} |")
    return [*lines, "", f"A whole run: {'; '.join(covers)}. Its spread is from the least to the largest."]


def without_gpu() -> list[str]:
    """The GPU's targets, where no GPU was measured."""
    lines = [
        "## GPU",
        "",
        "| workload | floor (H200) | time to reach | reached | ratios to reach | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in target.gpu.items()) or "-"
        to_reach = duration(target.gpu_seconds) if target.gpu_seconds else "-"
        floor = duration(target.gpu_floor) if target.gpu_floor else "-"
        lines.append(f"| {target.shown} | {floor} | {to_reach} | {NOT_MEASURED} | {ratios} | {NOT_MEASURED} |")
    return [*lines, ""]


def results(folder: Path) -> str:
    """The whole text."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    # Accuracy (quality.json) lies in the same folder; speed is a device's.
    records = [record for record in records if "device" in record]
    lines = [
        "# Measured speed",
        "",
        "Written by `python benchmarks/make_results.py` from `benchmarks/results/*.json`, which",
        "`pytest benchmarks --benchmark-only` records; not edited by hand. A ratio is the competitor's time over ours",
        "in the same run: above 1 ours is faster. *At the ceiling*: the ratio had ours taken no more than its matrix",
        "products at the rate measured in the run; a ratio to reach above that is out of reach on the device. Times",
        "are kept from GPUs only. A reverse chain is of one stage, and its times to reach are half of what was asked",
        "of both. Each record is of the commit that it names; operations may have been rewritten since. Long calls are",
        "repeated less often than short ones; a dash stands where a record does not say how often.",
        "",
    ]
    if not any(is_gpu(record) for record in records):
        lines += without_gpu()
    if all(is_gpu(record) for record in records):
        lines += ["## CPU", "", f"{NOT_MEASURED.capitalize()}.", ""]
    for record in records:
        lines += section(record)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is out of date")
    arguments = parser.parse_args()
    file, text = HERE / "RESULTS.md", results(HERE / "results")
    if arguments.check:
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            print(f"{file} is not what the records give; run python benchmarks/make_results.py", file=sys.stderr)
            return 1
        return 0
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
