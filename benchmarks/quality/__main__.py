"""``python -m benchmarks.quality``: measure SeDA, its ablations and the baselines in every regime.

Each training is written down when it ends; repeated, the command goes on where it was stopped. It then writes
``quality.json``, ``docs/quality.md`` and its pictures from all that is known. ``--quick`` measures anew, into a folder
of its own; so are sets measured that are not the published ones (``--data FOLDER --sets NAME``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from seda_fast.files import DataError

from . import selection, summary, workers
from .methods import ABLATIONS, METHODS, MLP_PSEUDO, SEDA
from .page import markdown
from .plots import plot
from .regimes import REGIMES, SETS, load
from .runs import FRESH, TEST, Job, Runs
from .selection import Selected

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {"runs": "benchmarks/results/quality_runs.jsonl", "out": "benchmarks/results/quality.json", "docs": "docs",
             "selected": "benchmarks/results/quality_selected.json"}  # fmt: skip
FILES = {"runs": "runs.jsonl", "out": "quality.json", "docs": "", "selected": "selected.json"}
OWN_FILES = {name: f"runs/quality_own/{file}" for name, file in FILES.items()}
QUICK_FILES = {name: f"runs/quality_quick/{file}" for name, file in FILES.items()} | {"selected": PUBLISHED["selected"]}
QUICK = {"sets": ["wikipedia", "cub10"], "regimes": ["full", "labels-4"], "methods": ["seda", "linear", "mlp"]}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the paired sets")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=list(SETS),
        metavar="NAME",
        help=f"{', '.join(SETS)} (default: these), or others whose NAME.npz lies in --data, as seda_fast.train takes "
        "them: measured for themselves, into runs/quality_own",
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each training on a test part's set")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two small sets, two regimes, three methods, one seed, all anew, into runs/quality_quick",
    )
    parser.add_argument(
        "--select",
        type=int,
        default=0,
        metavar="N",
        help="first choose settings among N by folds; SeDA's only where no set is one's own",
    )
    parser.add_argument("--folds", type=int, default=3, help="folds of a partition")
    parser.add_argument(
        "--cross-validate",
        type=int,
        default=0,
        metavar="N",
        help="measure N folds of fresh partitions of the training parts, not the test parts",
    )
    parser.add_argument("--repeats", type=int, default=2, help="partitions into folds of that choice's last round")
    parser.add_argument(
        "--select-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of SeDA's trainings for that choice; bf16 takes half the time on CPUs that have it",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="trainings at a time, which share the cores"
    )
    for name, what in (
        ("selected", "settings chosen"),
        ("runs", "records"),
        ("out", "table as JSON"),
        ("docs", "folder of quality.md and its pictures"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=f"{what} (default: {PUBLISHED[name]})")
    parser.add_argument("--report-only", action="store_true", help="train nothing, write from what is known")
    chosen = parser.parse_args(argv)
    if chosen.workers < 1:
        parser.error(f"--workers must be at least 1, not {chosen.workers}")
    if chosen.quick:
        for name, value in QUICK.items():
            setattr(chosen, name, value)
        chosen.seeds = 1
    # Only its own records are thrown away, never a file that was named.
    chosen.anew = chosen.quick and chosen.runs is None
    chosen.own = not set(chosen.sets) <= set(SETS)
    for name, place in (QUICK_FILES if chosen.quick else OWN_FILES if chosen.own else PUBLISHED).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, ROOT / place)
    return chosen


def jobs(chosen: argparse.Namespace, selected: Selected) -> list[Job]:
    """Every training that is to be measured, seeds or folds outermost, so that a stopped command leaves a whole table.

    Baselines have the settings that selection chose for the set; SeDA always has its defaults, the same for all sets:
    where selection finds better ones, it is the defaults that must change. Ablations are measured on the full set and
    with few labels, where the parts that they remove matter.
    """
    found = []
    parts = [(TEST, seed) for seed in range(chosen.seeds)]
    if chosen.cross_validate:
        parts = [(f"{FRESH} {k}/{chosen.folds}", k) for k in range(chosen.cross_validate)]
    for part, seed in parts:
        for name in chosen.sets:
            for regime in chosen.regimes:
                for method in chosen.methods:
                    if method in ABLATIONS and regime not in ("full", "labels-8"):
                        continue
                    if method == MLP_PSEUDO and not regime.startswith("labels"):
                        continue  # nothing is unlabelled, so it is the MLP itself
                    settings = {} if method.startswith(SEDA) else selection.settings_of(selected, method, name, regime)
                    found.append(Job(name, regime, method, part, seed, settings))
    return found


def select(chosen: argparse.Namespace, runs: Runs) -> Selected:
    """Choose settings by cross-validation and write them down beside those of other sets."""

    def ready(wanted: Sequence[Job]) -> Runs:
        workers.make(runs, wanted, chosen.data, chosen.workers, "selection")
        return runs

    found = selection.select(
        chosen.sets,
        chosen.select,
        chosen.folds,
        chosen.repeats,
        ready,
        chosen.select_precision,
        # On a set of one's own SeDA has its defaults whatever others would give: only its time is needed.
        ours=1 if chosen.own else None,
        methods=chosen.methods,
    )
    selected = {**read_selected(chosen.selected), **found}
    chosen.selected.parent.mkdir(parents=True, exist_ok=True)
    chosen.selected.write_text(json.dumps(selected, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return selected


def read_selected(file: Path) -> Selected:
    """What earlier selections chose; nothing where there was none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _command(chosen: argparse.Namespace) -> str:
    """What makes the page again."""
    own = ["--data", str(chosen.data), "--sets", *chosen.sets] if chosen.own else []
    return shlex.join(["python", "-m", "benchmarks.quality", *own])


def _refusal(chosen: argparse.Namespace) -> str:
    """Why the sets cannot be measured, in one sentence."""
    for name in chosen.sets:
        if not (chosen.data / f"{SETS.get(name, name)}.npz").is_file():
            return f"{chosen.data} has no {SETS.get(name, name)}.npz; give --data"
        try:
            load(name, chosen.data)
        except DataError as error:
            return str(error)
    return ""


def _other_file(chosen: argparse.Namespace, runs: Runs) -> str:
    """Why records of sets of one's own are not of the files that are there now, in one sentence; else notes these.

    Records are found by a set's name, and a table of two files would lie.
    """
    place = chosen.runs.with_suffix(".files.json")
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    measured = {record.job.set for record in runs}
    for name in set(chosen.sets) - set(SETS):
        file = chosen.data / f"{name}.npz"
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if name in measured and known.get(name, digest) != digest:
            return f"{chosen.runs} has records of another {name}.npz than {file}; name another file by --runs"
        known[name] = digest
    if chosen.own:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return ""


def main(argv: list[str] | None = None) -> int:
    """Entry point; 2 with one sentence where the data is missing or refused."""
    chosen = arguments(argv)
    runs, selected = Runs(chosen.runs), read_selected(chosen.selected)
    if not chosen.report_only:
        refusal = _refusal(chosen) or _other_file(chosen, runs)
        if refusal:
            print(f"benchmarks.quality: {refusal}", file=sys.stderr)
            return 2
        if chosen.anew:
            chosen.runs.unlink(missing_ok=True)
            runs = Runs(chosen.runs)
        if chosen.select:
            selected = select(chosen, runs)
        title = "folds" if chosen.cross_validate else "test parts"
        workers.make(runs, jobs(chosen, selected), chosen.data, chosen.workers, title)
    print(_written(chosen, runs, selected))
    return 0


def _written(chosen: argparse.Namespace, runs: Runs, selected: Selected) -> str:
    """Write the table, the page and the pictures; returns the page."""
    rows, cost = summary.summarise(list(runs), selected), summary.cost_of_selection(runs)
    folds = summary.cross_validated(runs, selected)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    table = {"selected": selected, "rows": rows, "cross_validated": folds}
    chosen.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    chosen.docs.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, selected, _command(chosen), cost, folds)
    (chosen.docs / "quality.md").write_text(text, encoding="utf-8")
    plot(rows, chosen.docs / "quality")
    return text


if __name__ == "__main__":
    sys.exit(main())
