"""``docs/quality.md``: what the records say, written for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .methods import ABLATIONS, BASELINES, BRIDGE, DCSL_ONLY, ONE_STEP_MSE, SEDA
from .regimes import ABOUT, ABOUT_TAIL, REGIMES, SETS
from .selection import FOLDS, REPEATS, Selected
from .summary import targets

# Shown of full sets beside top-1. Calibration: how far a probability lies from the share of right answers.
_METRICS = {"top5": "top-5", "balanced_accuracy": "balanced accuracy", "ece": "expected calibration error"}


def markdown(
    rows: Sequence[dict[str, Any]],
    selected: Selected,
    command: str,
    cost: tuple[int, float],
    folds: Sequence[dict[str, Any]] = (),
) -> str:
    """``docs/quality.md``; ``cost`` and ``folds`` as of `summary.cost_of_selection` and `summary.cross_validated`."""
    sets = dict.fromkeys(row["set"] for row in rows)
    published = sets.keys() <= SETS.keys()
    lines = [
        "# When SeDA helps and when it does not",
        "",
        "<!-- Written by `python -m benchmarks.quality`; edit that, not this. -->",
        "",
        f"Top-1 on the test parts in percent, mean ± standard deviation over seeds; made by `{command}`, which keeps",
        "what it has and goes on where it was stopped. *Difference* is SeDA minus the row's best baseline, with its",
        "paired bootstrap 95 % interval over test rows: how far other rows would move it, not other seeds. Baselines",
        "get the unlabelled pairs too (`one_step` by its squared error, `mlp_pseudo`, the MLP with its settings, by",
        "labels that a text classifier gives them).",
        "",
        *(
            f"- **{name}**: {about}{ABOUT_TAIL if published and name == 'tail' else ''}"
            for name, about in ABOUT.items()
            if any(name in (row["regime"], row["regime"].rpartition("-")[0] + "-N") for row in rows)
        ),
        "",
    ]
    lines += [*_where_it_helps(rows), *(_target_table(rows) if published else []), *_fold_table(folds, command)]
    for name in sets:
        of_set = [row for row in rows if row["set"] == name]
        if of_set:
            lines += [f"## {name}", "", *_accuracy_table(of_set), ""]
            lines += _metric_table(of_set)
            lines += _alignment_table(of_set)
            lines += _ablation_table(of_set)
    lines += [
        *_pictures(rows),
        *_command_table(rows, _choice(command, selected), command, cost),
        *_selection_table(selected, published),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _regimes(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each regime's rows, regimes in their usual order."""
    found = {regime: [row for row in rows if row["regime"] == regime] for regime in REGIMES}
    return {regime: of_regime for regime, of_regime in found.items() if of_regime}


def _where_it_helps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """By regime, from the intervals of the differences."""
    lines = [
        "## Where it helps, and where not",
        "",
        "SeDA minus the best of all other methods on the test part, in points. A set counts as *better* or *worse*",
        "where the interval leaves out 0. The best of the others is picked by the same test part, which favours them.",
        "",
        "Of the others the linear probe and the MLP see no text and learn from the labelled rows alone. The last",
        "column is SeDA minus the better of these two, with its interval. That is not what texts give by themselves,",
        "as SeDA has also another model.",
        "",
        "| regime | mean over sets | better | worse | no difference seen | minus the best without text |",
        "|---|---|---|---|---|---|",
    ]
    for regime, of_regime in _regimes(rows).items():
        known = [row for row in of_regime if "difference" in row]
        if not known:
            continue
        mean = sum(row["difference"] for row in known) / len(known)
        better = [r["set"] for r in known if r["interval"][0] > 0]
        worse = [r["set"] for r in known if r["interval"][1] < 0]
        same = [r["set"] for r in known if r["set"] not in better + worse]
        cells = (", ".join(names) or "-" for names in (better, worse, same))
        gains = ", ".join(f"{r['set']} {_gap_cell(r['text_gain'])}" for r in known if "text_gain" in r)
        lines.append(f"| {regime} | {mean:+.1f} | " + " | ".join(cells) + f" | {gains or '-'} |")
    return [*lines, ""]


def _gap_cell(found: Mapping[str, Any]) -> str:
    """A difference with its interval; nothing where there is none."""
    if "interval" not in found:
        return "-"
    low, high = found["interval"]
    return f"{found['difference']:+.1f} ({low:+.1f} .. {high:+.1f})"


def _target_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was asked beforehand, and what came of it."""
    lines = ["## What was asked of it", "", "| asked, in points or percent | found | reached |", "|---|---|---|"]
    lines += [f"| {t.asked} | {t.found} | {'yes' if t.reached else 'no'} |" for t in targets(rows)]
    return [*lines, ""]


def _fold_table(folds: Sequence[dict[str, Any]], command: str) -> list[str]:
    """SeDA beside the others on folds of the training parts, which have more rows to tell methods apart by."""
    if not folds:
        return []
    sizes = dict.fromkeys(row["of"] for row in folds)
    commands = ", ".join(_fold_command([row for row in folds if row["of"] == size], command) for size in sizes)
    lines = [
        "## On folds of the training parts",
        "",
        "Some test parts have few rows. Here training parts are divided, in partitions that no setting was chosen on,",
        "and each fold is told by trainings on the others. Settings were chosen on other partitions of the same rows;",
        "SeDA's defaults, too, come of folds of these rows. Mean top-1, and SeDA minus the best of the others with its",
        f"standard error over folds ({commands}):",
        "",
        "| set and regime | " + " | ".join([SEDA, *BASELINES]) + " | difference | folds |",
        "|" + "---|" * (len(BASELINES) + 4),
    ]
    for row in folds:
        cells = [f"{row['top1'][m]:.1f}" if m in row["top1"] else "-" for m in (SEDA, *BASELINES)]
        count = str(row["folds"]) if len(sizes) == 1 else f"{row['folds']}, of 1/{row['of']} each"
        cells += [f"{row['difference']:+.1f} ± {row['standard_error']:.1f}", count]
        lines.append(f"| {row['set']} {row['regime']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _fold_command(folds: Sequence[dict[str, Any]], command: str) -> str:
    """What measures these folds, all of one size."""
    count, regimes = max(row["folds"] for row in folds), " ".join(dict.fromkeys(row["regime"] for row in folds))
    size = "" if folds[0]["of"] == FOLDS else f" --folds {folds[0]['of']}"
    return f"`{command} --cross-validate {count}{size} --regimes {regimes}`"


def _pictures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return ["## Pictures", "", *(f"![{regime}](quality/{regime}.png)" for regime in _regimes(rows)), ""]


def _choice(command: str, selected: Selected) -> str:
    """What makes the choice of settings again."""
    of_seda = selected.get(SEDA, {})
    usual = {"select-precision": "fp32", "folds": FOLDS, "repeats": REPEATS}
    given = {name: of_seda.get(name.removeprefix("select-"), value) for name, value in usual.items()}
    options = "".join(f" --{name} {value}" for name, value in given.items() if value != usual[name])
    return f"{command} --select {max((found['tried'] for found in selected.values()), default=0)}{options}"


def _command_table(rows: Sequence[dict[str, Any]], choice: str, command: str, cost: tuple[int, float]) -> list[str]:
    """How to make each regime's rows again, and what their trainings took."""
    lines = [
        "## Making it again",
        "",
        "Minutes are those of the trainings one after the other, by the median of a method's seeds, as they were",
        "recorded two at a time on two cores that had other work as well. What is recorded is not trained again; to",
        "measure a line anew and leave this page as it is, add `--runs again/runs.jsonl --out again/quality.json",
        "--docs again`. `--quick` tries the embedded digits, or two small sets of `--data FOLDER`, in a few minutes,",
        "in `runs/quality_quick`.",
        "",
        "| command | trainings | minutes |",
        "|---|---|---|",
    ]
    for regime, of_regime in _regimes(rows).items():
        found = [m for row in of_regime for m in row["methods"].values()]
        minutes = sum(m["seeds"] * m["median_seconds"] for m in found) / 60
        lines.append(f"| `{command} --regimes {regime}` | {sum(m['seeds'] for m in found)} | {minutes:.0f} |")
    trainings, minutes = cost
    if trainings:
        lines.append(f"| `{choice}`, which chooses the settings below | {trainings} | {minutes:.0f}, their sum |")
    return [*lines, ""]


def _selection_table(selected: Selected, published: bool) -> list[str]:
    if not selected:
        return ["## Settings", "", "Selection was not run: every method has its defaults.", ""]
    lines = [
        "## Settings",
        "",
        *_about_choice(selected, published),
        "",
        "| method and set | settings tried | defaults | best | gain | best settings |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(selected.items()):
        settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items()) or "the defaults"
        gain = f"{found['top1'] - found['default_top1']:+.1f} ± {found['standard_error']:.1f}"
        gain = gain if found["settings"] else "-"
        own, measured = found.get("sets", []), found.get("seconds", {})
        shown = f"{name}, on {', '.join(own)}" if own and set(own) < set(measured) else name
        cells = (shown, found["tried"], f"{found['default_top1']:.1f}", f"{found['top1']:.1f}", gain, settings)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, "", *_time_table(selected), *_weights_table(selected.get(SEDA, {}))]


def _about_choice(selected: Selected, published: bool) -> list[str]:
    """How settings were chosen: of the published sets among equally many of each method."""
    if not published:
        return [
            "Chosen by cross-validation of training parts (`--select`; the linear probe chooses its penalty itself):",
            "all on one fold, the default and the best quarter then on all folds, with every row labelled and with 8",
            "labels a class. SeDA has its defaults, and nothing else was tried of it;",
            f"{_kept(selected)}`mlp_pseudo` has the settings of `mlp`. Mean top-1 of the folds, and the best's gain",
            "with its standard error over folds:",
        ]
    return [
        "Chosen by cross-validation of training parts, equally many tried for each (`--select`; the linear probe",
        "chooses its penalty itself): all on one fold, the default and the best quarter then on all folds, with every",
        "row labelled and with 8 labels a class. SeDA is measured with its defaults whatever is chosen, one setting",
        f"is chosen for all sets; {_kept(selected)}`mlp_pseudo` has those of `mlp`. SeDA's defaults, the first of its",
        "20, come of earlier studies on folds of the same training parts (method.md, exploration.md): that favours its",
        "figures on folds. One choice looked at a test part: that `translator_dropout` falls with the rows was first",
        "seen on that of fashion_products, then on folds (method.md, section 4). SeDA's 20 had the teacher of pairs as",
        "it was before it drew each pair to its nearest ones and saw what the two spaces share, a textual head that",
        "started at random, and no kernel head.",
        "Features were standardised when this was chosen; the test parts are measured as method.md, section 8, scales",
        "them, which differs for the texts of fashion_products with 8 labels a class.",
        "What is chosen is the best top-1; the bridge's choice, the least diffusion offered, aligns worse than its",
        "default on two sets. Mean top-1 of the folds, and the best's gain with its standard error over folds:",
    ]


def _kept(selected: Selected) -> str:
    """Which methods nothing was chosen for; nothing where there are none."""
    found = [f"`{m}`" for m in (ONE_STEP_MSE, BRIDGE) if not any(name.startswith(f"{m} on ") for name in selected)]
    if not found:
        return ""
    return " and ".join(found) + (" keep their" if len(found) > 1 else " keeps its") + " defaults; "


def _time_table(selected: Selected) -> list[str]:
    """What the baselines gain from the time that a training of SeDA takes."""
    longer = {name: found for name, found in sorted(selected.items()) if "longer" in found}
    own = selected.get(SEDA, {})
    if "seconds" not in own:
        return []
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in own["seconds"].items())
    lines = [
        "These were offered the time of a training of SeDA: their best settings were also trained with 2, 4, 8, ...",
        "times the passes, the most that fit into SeDA's seconds with all labels, in float32 on the",
        f"same folds ({seconds}; the least of a setting's trainings is taken, as other work held some up). What is",
        "better is chosen above.",
        *_passes_table(longer, "longer", "that of the best with fewer"),
    ]
    few = {name: found for name, found in sorted(selected.items()) if "few_labels" in found}
    if few:
        lines += [
            "",
            "With few labels what learns from the labelled rows alone is done sooner, so what is chosen above was",
            "offered SeDA's time with 8 labels a class once more, on those folds alone. What is better there is what",
            "the regimes of few labels are measured with; `mlp_pseudo`, which learns from all rows, stays as it is.",
            *_passes_table(few, "few_labels", "that of what is chosen above"),
        ]
    same = own["float32"]
    gain = f"{same['gain']:+.2f} ± {same['standard_error']:.2f}"
    return [
        *lines,
        "",
        f"SeDA's defaults in float32 instead of {own['precision']}, on {same['trainings']} folds: {gain} points.",
        "",
    ]


def _passes_table(found: Mapping[str, Mapping[str, Any]], part: str, fewer: str) -> list[str]:
    """What more passes gave the methods and sets of ``found``, by its ``part``, beside ``fewer``."""
    lines = [
        "",
        f"| method and set | times the passes | seconds | mean top-1 | {fewer} |",
        "|---|---|---|---|---|",
    ]
    for name, method in found.items():
        more = method[part]
        cells = (name, more["factor"], f"{more['seconds']:.0f}", f"{more['top1']:.1f}", f"{more['shorter_top1']:.1f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _weights_table(seda: Mapping[str, Any]) -> list[str]:
    """What SeDA's trainings of the selection say of its visual head's weight."""
    if "visual_weights" not in seda:
        return []
    about = "" if seda["precision"] == "fp32" else f" SeDA was trained in {seda['precision']} for the choice."
    places = seda["visual_weights"]
    names = list(next(iter(places.values())))
    lines = [
        f"SeDA without kernel head, by the weight of its visual head; the other two share the rest.{about}",
        "",
        "| set and regime | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    lines += [f"| {place} | " + " | ".join(f"{by[n]:.1f}" for n in names) + " |" for place, by in places.items()]
    return [*lines, ""]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
    return f"{found['top1']:.1f}{deviation}"


def _accuracy_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [SEDA, *BASELINES]
    lines = ["| regime | " + " | ".join(shown) + " | difference | seeds |", "|" + "---|" * (len(shown) + 3)]
    for row in rows:
        cells = [_cell(row["methods"].get(m)) for m in shown]
        seeds = row["methods"][SEDA]["seeds"]
        lines.append(f"| {row['regime']} | " + " | ".join(cells) + f" | {_gap_cell(row)} | {seeds} |")
    return lines


def _metric_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What else is recorded of the predictions, every row labelled."""
    full = [row["methods"] for row in rows if row["regime"] == "full"]
    shown = [(m, methods[m]) for methods in full for m in (SEDA, *BASELINES) if m in methods]
    lines = []
    for key, label in _METRICS.items():
        cells = [found.get(key) for _, found in shown]
        if any(cell is not None for cell in cells):
            lines.append(f"| {label} | " + " | ".join("-" if cell is None else f"{cell:.1f}" for cell in cells) + " |")
    if not lines:
        return []
    head = ["| | " + " | ".join(m for m, _ in shown) + " |", "|" + "---|" * (len(shown) + 1)]
    return ["On the full set, in percent, the calibration error in points:", "", *head, *lines, ""]


def _alignment_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = ("frechet", "mmd", "cosine", "recall_at_1", "recall_at_5", "recall_at_10")
    lines = []
    for row in rows:
        if row["regime"] != "full":
            continue
        lines = ["Alignment with the test part's texts (full set):", "", "| | " + " | ".join(keys) + " |"]
        lines.append("|" + "---|" * (len(keys) + 1))
        for method, found in row["methods"].items():
            if method == DCSL_ONLY:
                continue  # its translator learned nothing
            for kind, label in (("alignment", method), ("alignment_point", f"{method}, point estimate")):
                values = found[kind]
                if values and (kind == "alignment" or values != found["alignment"]):
                    lines.append(f"| {label} | " + " | ".join(f"{values[k]:.3g}" for k in keys) + " |")
            if method == BRIDGE and "bridge_midway" in row:
                values, top1 = row["bridge_midway"]["alignment"], row["bridge_midway"]["top1"]
                label = f"{BRIDGE} started midway, its default, top-1 {top1:.1f}"
                lines.append(f"| {label} | " + " | ".join(f"{values[k]:.3g}" for k in keys) + " |")
        floor = row["methods"][SEDA]["alignment"]["frechet_floor"]
        lines += [
            "",
            f"The Frechet distance between two halves of the real texts is {floor:.3g}; fewer rows make it larger,",
        ]
        lines += ["so that of all mapped to all real texts can be below.", ""]
    return lines


def _ablation_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [row for row in rows if any(m in row["methods"] for m in ABLATIONS)]
    if not shown:
        return []
    seeds = sorted({row["methods"][m]["seeds"] for row in shown for m in ABLATIONS if m in row["methods"]})
    names = [SEDA, "its trained heads", *(n.removeprefix("seda:") for n in ABLATIONS), "visual head alone"]
    names.append("kernel head alone")
    lines = [
        f"Ablations, {' or '.join(map(str, seeds))} seeds, SeDA with the same. They change the networks, so they and",
        "*its trained heads* are the semantic, textual and visual head without the kernel head, which sees no network.",
        "The visual head alone is an MLP on what SeDA was taught, the teacher's labels of unlabelled pairs included:",
        "",
    ]
    lines += ["| regime | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in shown:
        own = row.get("seda_of_ablations")
        others = (row["methods"].get(m, {}) for m in ABLATIONS)
        of_own = own or {}
        cells = [own, of_own.get("three_heads"), *(found.get("three_heads") for found in others)]
        cells += [of_own.get("visual_head"), of_own.get("kernel_head")]
        lines.append(f"| {row['regime']} | " + " | ".join(map(_cell, cells)) + " |")
    return [*lines, ""]
