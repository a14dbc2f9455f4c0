"""The package as built and installed: what the archives hold, and whether each import finds each part."""

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXTENSION = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"

# Runs in the installed environment; names every part by the file that Python would load it from.
PROBE = """
import importlib.util, json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import seda_fast
    import seda_fast.kernels
def origin(name):
    spec = importlib.util.find_spec(name)
    return spec and spec.origin
print(json.dumps({
    "package": seda_fast.__file__,
    "kernels": seda_fast.kernels.__file__,
    "modules": {name: origin(f"seda_fast.kernels.{name}") for name in sys.argv[1:]},
    "extension": origin("seda_fast._C"),
    "stranger": origin("kernels"),
    "warnings": [str(w.message) for w in caught if "compiled extension" in str(w.message)],
}))
"""


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Output of a command that must succeed, run in ``folder`` without this process's import settings.

    What is built and installed here is the pure-Python package; tests/test_build.py compiles.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    inherited["SEDA_FAST_BUILD"] = "none"
    done = subprocess.run(command, cwd=folder, env=inherited | environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked_files(repository: Path) -> list[str]:
    if shutil.which("git") is None or not (repository / ".git").exists():
        pytest.skip("tests/test_install.py needs git and a clone: it builds from the tracked files alone")
    names = run(["git", "ls-files", "-z"], repository).split("\0")
    return [name for name in names if name and (repository / name).is_file()]


def copy_of(repository: Path, folder: Path) -> Path:
    """What a fresh clone would hold, with edits that are not committed yet."""
    for name in tracked_files(repository):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import folder in which torch cannot be imported, as in an isolated build."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ImportError('no torch in this environment')\n")
    return folder


@pytest.fixture(scope="module")
def archives(
    repository: Path, without_torch: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """(checkout, sdist, wheel): source archive of a clean checkout, and the wheel built from that archive."""
    checkout = copy_of(repository, tmp_path_factory.mktemp("source"))
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run([*command, dist, checkout], dist, PYTHONPATH=str(without_torch))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return checkout, sdist, wheel


def test_wheel_holds_package_and_kernels_and_nothing_else(archives: tuple[Path, Path, Path]) -> None:
    checkout, _, wheel = archives
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        (installed / file.relative_to(checkout / folder)).as_posix()
        for folder, installed in (("seda_fast", Path("seda_fast")), ("kernels", Path("seda_fast/kernels")))
        for file in (checkout / folder).rglob("*")
        if file.is_file()
    }
    assert "seda_fast/kernels/__init__.py" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/LICENSE") for name in names)


def test_source_archive_holds_what_a_build_needs_and_no_tests(archives: tuple[Path, Path, Path]) -> None:
    _, sdist, _ = archives
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "requirements.lock", "LICENSE", "kernels/__init__.py"} <= names
    assert not {name for name in names if re.match(r"(tests|benchmarks)(/|$)", name)}


def test_core_dependencies_are_few(archives: tuple[Path, Path, Path]) -> None:
    with zipfile.ZipFile(archives[2]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", wheel.read(metadata).decode(), re.M)
    assert sorted(required) == ["numpy", "safetensors", "torch", "tqdm"]


@dataclass(frozen=True)
class Installation:
    """One copy of the checkout, installed into one new environment."""

    kind: str
    checkout: Path
    python: Path
    site: Path

    def probe(self, folder: Path) -> dict[str, Any]:
        modules = [file.stem for file in (self.checkout / "kernels").glob("[!_]*.py")]
        output = run([self.python, "-c", PROBE, *modules], folder)
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    def package_from(self, where: str) -> Path:
        """Folder of the package that Python finds first."""
        return (self.checkout if self.kind == "editable" or where == "root" else self.site) / "seda_fast"

    def kernels_from(self, where: str) -> Path:
        package = self.package_from(where)
        return package / "kernels" if package.parent == self.site else self.checkout / "kernels"

    def extension_folder(self) -> Path:
        """Where a build leaves the extension: beside the sources when editable, else in site-packages."""
        return (self.checkout if self.kind == "editable" else self.site) / "seda_fast"


def borrow_libraries(folder: Path) -> None:
    """Link this environment's libraries into ``folder``; not seda_fast, it would hide the copy under test."""
    for site in (Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")):
        for entry in site.iterdir():
            hidden = re.match(r"(__editable__.*)?seda_fast|.*\.pth$", entry.name)
            if not hidden and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)


@pytest.fixture(scope="module", params=["plain", "editable"])
def installation(
    request: pytest.FixtureRequest,
    repository: Path,
    without_torch: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Installation:
    """``pip install .`` or ``pip install -e .`` into an environment that borrows this one's libraries."""
    checkout = copy_of(repository, tmp_path_factory.mktemp("checkout"))
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    libraries = tmp_path_factory.mktemp("libraries")
    borrow_libraries(libraries)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    editable = ["--editable"] if request.param == "editable" else []
    run([python, *install, *editable, checkout], home, PYTHONPATH=str(without_torch))
    return Installation(request.param, checkout, python, site)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_import_finds_package_and_kernels(installation: Installation, where: str, tmp_path: Path) -> None:
    found = installation.probe(installation.checkout if where == "root" else tmp_path)
    kernels = installation.kernels_from(where)
    assert found["package"] == str(installation.package_from(where) / "__init__.py")
    assert found["kernels"] == str(kernels / "__init__.py")
    assert found["modules"] == {name: str(kernels / f"{name}.py") for name in found["modules"]}
    if where == "elsewhere":
        assert found["stranger"] is None, "the folder kernels/ must not be importable as top-level kernels"


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_import_finds_the_extension(installation: Installation, where: str, tmp_path: Path) -> None:
    # An empty file will do: looking for a module does not load it.
    extension = installation.extension_folder() / EXTENSION
    extension.touch()
    try:
        found = installation.probe(installation.checkout if where == "root" else tmp_path)
    finally:
        extension.unlink()
    assert found["extension"] == str(extension)
    assert found["warnings"] == []


@pytest.mark.parametrize("installation", ["plain"], indirect=True)
def test_extension_of_another_version_is_left_out_with_one_warning(installation: Installation) -> None:
    extension = installation.extension_folder() / EXTENSION
    source = installation.checkout / "seda_fast" / "__init__.py"
    text = source.read_text()
    changed = re.sub(r'__version__ = ".*"', '__version__ = "999.0"', text)
    assert changed != text
    extension.touch()
    source.write_text(changed)
    try:
        found = installation.probe(installation.checkout)
    finally:
        source.write_text(text)
        extension.unlink()
    assert found["extension"] is None
    assert found["kernels"] == str(installation.checkout / "kernels" / "__init__.py")
    (warning,) = found["warnings"]
    assert "999.0" in warning
    assert str(extension.parent) in warning
