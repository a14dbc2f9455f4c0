"""Rules of the house that a machine can check: who imports whom, nothing private or unsafe in the files."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train", "evaluate", "predict", "extract", "export", "report", "info"}

# The formulas and kernels are reached through ops alone.
BEHIND_OPS = {"reference", "kernels", "_C"}
# What the lower rooms may import from the package, by first name.
LOWER = {
    "_layout": set(),
    "reference": set(),
    "kernels": {"kernels"},
    "config": set(),
    "files": set(),
    "ops": {"ops"} | BEHIND_OPS,
    "nn": {"nn", "ops", "config", "files"},
}
# What the middle rooms may not import, beside what lies behind ops.
MIDDLE = {"loop", "engine", "ranks", "checkpoint", "interrupt", "streaming", "data", "metrics", "prepare"}
UPPER = {"estimator", "baselines", "figures"}


@dataclass(frozen=True)
class Import:
    """One imported module of the package, by its name inside the package; "" is the package itself."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"seda_fast.{self.importer} imports seda_fast.{self.imported} in line {self.line}"


@cache
def sources() -> dict[str, Path]:
    """Modules of the package by dotted name without the leading ``seda_fast.``."""
    found = {}
    for top, prefix in ((ROOT / "seda_fast", ()), (ROOT / "kernels", ("kernels",))):
        for file in sorted(top.rglob("*.py")):
            parts = prefix + file.relative_to(top).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports_of(name: str, file: Path) -> Iterator[Import]:
    tree = tree_of(file)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["seda_fast", *package][: 1 + len(package) - node.level + 1] if node.level else []
            module = ".".join([*filter(None, base), *filter(None, [node.module])])
            targets = [f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        else:
            continue
        for target in targets:
            if target == "seda_fast" or target.startswith("seda_fast."):
                yield Import(name, module_in(target), node.lineno, id(node) in inside)


def module_in(target: str) -> str:
    """The longest leading part of ``seda_fast.x.y`` that is a module; the rest is a name in it."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in sources() and parts != ["_C"]:
        parts.pop()
    return ".".join(parts)


@cache
def all_imports() -> list[Import]:
    return [found for name, file in sources().items() for found in imports_of(name, file)]


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_import_reader_sees_imports() -> None:
    seen = {(found.importer, found.imported) for found in all_imports()}
    assert ("", "_layout") in seen
    assert ("ops.noising", "reference") in seen


def may_import(importer: str, imported: str) -> bool:
    if importer in LOWER:
        return imported in LOWER[importer]
    if importer in MIDDLE and imported in UPPER:
        return False
    return imported not in BEHIND_OPS or importer in COMMANDS


def test_each_module_imports_only_rooms_below_it() -> None:
    wrong = [str(f) for f in all_imports() if not may_import(top(f.importer), top(f.imported))]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_command() -> None:
    wrong = [str(found) for found in all_imports() if top(found.imported) in COMMANDS]
    assert not wrong, "\n".join(wrong)


def test_only_commands_import_the_package_by_its_public_face() -> None:
    allowed = COMMANDS | {"__main__"}
    wrong = [str(f) for f in all_imports() if not f.imported and top(f.importer) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_no_import_of_the_package_inside_a_function() -> None:
    wrong = [str(found) for found in all_imports() if found.in_function]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    below: dict[str, set[str]] = {name: set() for name in sources()}
    for found in all_imports():
        below[found.importer].add(found.imported)
    # Take away what imports nothing that is left; what remains at last stands on a cycle.
    left = dict(below)
    while leaves := [name for name, imported in left.items() if not (imported - {name}) & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_importing_kernels_costs_nothing() -> None:
    (docstring,) = tree_of(ROOT / "kernels" / "__init__.py").body
    assert isinstance(docstring, ast.Expr), "every import of seda_fast runs this file: keep Triton out of it"


@pytest.mark.parametrize("module", sorted(sources()))
def test_functions_fit_a_screen(module: str) -> None:
    lengths = {
        f"{node.name}, line {node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree_of(sources()[module]))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {place: length for place, length in lengths.items() if length > 70} == {}
    assert sources()[module].name != "utils.py", "utils says nothing: put each piece where it belongs"


@pytest.mark.parametrize("module", sorted(sources()))
def test_no_pickle_is_ever_read_or_written(module: str) -> None:
    wrong = []
    for node in ast.walk(tree_of(sources()[module])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [name for name in names if top(name) in {"pickle", "cloudpickle", "dill", "joblib"}]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call == "torch.save" or (call == "torch.load" and given.get("weights_only") != "True"):
                wrong.append(f"{call} in line {node.lineno}")
            if call in {"np.load", "numpy.load"} and given.get("allow_pickle") != "False":
                wrong.append(f"{call} without allow_pickle=False in line {node.lineno}")
    assert wrong == []


def test_no_path_of_this_machine_in_tracked_files() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("test_no_path_of_this_machine_in_tracked_files needs git and a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    private = [f"{folder}/".encode() for folder in (ROOT, ROOT.parent, Path.home()) if folder != Path("/")]
    private += [f"/{folder}/".encode() for folder in ("root", "work", "Users")]
    wrong = [
        f"{name} names {path.decode()}"
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file()
        for path in private
        if path in (ROOT / name).read_bytes()
    ]
    assert wrong == []


def test_import_is_quick_and_brings_no_optional_library() -> None:
    # torch first: its own time and what it imports are not ours to judge.
    probe = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import seda_fast
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    assert "seda_fast" in modules
    optional = {"sklearn", "scipy", "matplotlib", "torchmetrics", "triton", "xformers", "transformers"}
    assert optional & set(modules) == set()
    assert seconds < 2.0, f"import seda_fast takes {seconds:.2f} s of processor time beyond torch's own"
