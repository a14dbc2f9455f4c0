"""``python -m benchmarks.quality``: measure SeDA, its ablations and the baselines in every regime.

Each training is written down when it ends; repeated, the command goes on where it was stopped. It then writes
``quality.json``, ``docs/quality.md`` and its pictures from all that is known. ``--quick`` measures anew, into a folder
of its own, and needs no data; into another are sets measured that are not the published ones (``--data FOLDER --sets
NAME``).
"""

from __future__ import annotations

import argparse
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
from .regimes import EMBEDDED, REGIMES, SETS, is_embedded, load
from .runs import CHOICE, FRESH, TEST, Job, Runs, earlier_recipe, other_file
from .selection import Selected

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PUBLISHED = {"runs": "benchmarks/results/quality_runs.jsonl", "out": "benchmarks/results/quality.json", "docs": "docs",
             "selected": "benchmarks/results/quality_selected.json"}  # fmt: skip
FILES = {"runs": "runs.jsonl", "out": "quality.json", "docs": "", "selected": "selected.json"}
OWN_FILES = {name: f"runs/quality_own/{file}" for name, file in FILES.items()}
QUICK_FILES = {name: f"runs/quality_quick/{file}" for name, file in FILES.items()} | {"selected": PUBLISHED["selected"]}
# What is measured where nothing is said of it.
USUAL = {"sets": list(SETS), "regimes": list(REGIMES), "methods": list(METHODS), "seeds": 5}
QUICK = {"sets": ["wikipedia", "cub10"], "regimes": ["full", "labels-4"], "methods": ["seda", "linear", "mlp"],
         "seeds": 1}  # fmt: skip
# The least of each count.
LEAST = {"seeds": 1, "select": 0, "folds": 2, "cross_validate": 0, "repeats": 1, "workers": 1}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help=f"folder of the paired sets (default: {DATA})")
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(SETS)} (default: these), or others whose NAME.npz lies in --data, as seda_fast.train takes "
        f"them, or {EMBEDDED}, which needs no file: measured for themselves, into runs/quality_own",
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, help="seeds of each training on a test part's set (default: 5)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"the embedded {EMBEDDED}, or {' and '.join(QUICK['sets'])} of --data, two regimes, three methods and one "
        "seed, unless told otherwise, all anew, into runs/quality_quick",
    )
    parser.add_argument(
        "--select",
        type=int,
        default=0,
        metavar="N",
        help="first choose settings among N by folds; SeDA's only where no set is one's own",
    )
    parser.add_argument("--folds", type=int, default=selection.FOLDS, help="folds of a partition")
    parser.add_argument(
        "--cross-validate",
        type=int,
        default=0,
        metavar="N",
        help="measure N folds of fresh partitions of the training parts, not the test parts",
    )
    parser.add_argument(
        "--repeats", type=int, default=selection.REPEATS, help="partitions into folds of the choice's last round"
    )
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
    return completed(parser, parser.parse_args(argv))


def completed(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> argparse.Namespace:
    """With the defaults of what was not given, which depend on what was; leaves where a count is too small."""
    if chosen.quick and chosen.sets is None and (why := _why_embedded(chosen.data)):
        chosen.sets = [EMBEDDED]
        print(f"benchmarks.quality: {why}", file=sys.stderr)
    chosen.data = chosen.data or DATA
    for name, value in (QUICK if chosen.quick else USUAL).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    for name, least in LEAST.items():
        if getattr(chosen, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(chosen, name)}")
    # Only its own records are thrown away, never a file that was named.
    chosen.anew = chosen.quick and chosen.runs is None
    chosen.own = not set(chosen.sets) <= set(SETS)
    places = QUICK_FILES if chosen.quick else OWN_FILES if chosen.own else PUBLISHED
    # Settings that are chosen quickly are its own, and the published ones stay; they are of no other sets.
    if chosen.quick and (chosen.select or chosen.own):
        places = places | {"selected": f"runs/quality_quick/{FILES['selected']}"}
    for name, place in places.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, ROOT / place)
    return chosen


def _why_embedded(folder: Path | None) -> str:
    """Why a quick command measures the set that needs no file, in one sentence; empty where it has its usual ones."""
    files = [f"{SETS[name]}.npz" for name in QUICK["sets"]]
    if folder is None:
        return f"--quick measures the embedded {EMBEDDED}; --data FOLDER has it measure {' and '.join(files)} of FOLDER"
    missing = [file for file in files if not (folder / file).is_file()]
    return f"{folder} has no {missing[0]}; --quick measures the embedded {EMBEDDED}" if missing else ""


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
        missing = any(job.key not in runs.records and job.method == SEDA for job in wanted)
        if missing and not chosen.own and earlier_recipe(r for r in runs if r.job.part.startswith(CHOICE)):
            raise DataError(f"{chosen.runs} has SeDA's choice of an earlier recipe; name another file by --runs")
        for job, reason in workers.make(runs, wanted, chosen.data, chosen.workers, "selection"):
            raise DataError(f"no settings can be chosen: {told(job, reason)}")
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
    selected = selection.merged(read_selected(chosen.selected), found)
    chosen.selected.parent.mkdir(parents=True, exist_ok=True)
    chosen.selected.write_text(json.dumps(selected, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return selected


def read_selected(file: Path) -> Selected:
    """What earlier selections chose; nothing where there was none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _command(chosen: argparse.Namespace) -> str:
    """What makes the page again."""
    files = not all(is_embedded(name, chosen.data) for name in chosen.sets)
    own = [*(["--data", str(chosen.data)] if files else []), "--sets", *chosen.sets] if chosen.own else []
    return shlex.join(["python", "-m", "benchmarks.quality", *own])


def _refusal(chosen: argparse.Namespace) -> str:
    """Why the sets cannot be measured, in one sentence."""
    for name in chosen.sets:
        if not is_embedded(name, chosen.data) and not (chosen.data / f"{SETS.get(name, name)}.npz").is_file():
            return f"{chosen.data} has no {SETS.get(name, name)}.npz; give --data"
        try:
            load(name, chosen.data)
        except DataError as error:
            return str(error)
    return ""


def main(argv: list[str] | None = None) -> int:
    """Entry point; 2 with one sentence where the data is missing or refused."""
    chosen = arguments(argv)
    runs, selected = Runs(chosen.runs), read_selected(chosen.selected)
    if not chosen.report_only:
        refusal = _refusal(chosen)
        if chosen.anew and not refusal:
            chosen.runs.unlink(missing_ok=True)
            runs = Runs(chosen.runs)
        refusal = refusal or other_file(runs, chosen.sets, chosen.data, bool(chosen.select or chosen.cross_validate))
        if refusal:
            return _refused(refusal)
        if chosen.select:
            try:
                selected = select(chosen, runs)
            except DataError as error:
                return _refused(str(error))
        title = "folds" if chosen.cross_validate else "test parts"
        for job, reason in workers.make(runs, jobs(chosen, selected), chosen.data, chosen.workers, title):
            print(f"benchmarks.quality: left out: {told(job, reason)}", file=sys.stderr)
    print(_written(chosen, runs, selected))
    return 0


def told(job: Job, reason: str) -> str:
    """What could not be trained, and why."""
    return f"{job.method} on {job.set} in the regime {job.regime}, seed {job.seed}: {reason}"


def _refused(sentence: str) -> int:
    print(f"benchmarks.quality: {sentence}", file=sys.stderr)
    return 2


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
