"""``make``: set-up happens when what it depends on has changed, and ``make clean`` leaves nothing of a build."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(folder: Path, *arguments: str) -> str:
    """What ``make`` says in ``folder``, also where a ``make`` with its own variables, such as VENV, runs the tests."""
    inherited = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """A checkout of few files in which set-up is done."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "setup.py"):
        shutil.copy(repository / name, tmp_path)
    for name in ("csrc/cpu/noising.cpp", "csrc/seda_fast_build.py", "seda_fast/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(shutil.which("true") or "/bin/true")
    stamp = tmp_path / ".venv" / ".seda_fast_installed"
    stamp.touch()
    os.utime(stamp, times=(time.time() + 60, time.time() + 60))
    return tmp_path


@pytest.mark.parametrize("name", ["csrc/cpu/noising.cpp", "csrc/seda_fast_build.py", "setup.py", "requirements.lock"])
def test_what_the_libraries_are_made_of_is_built_anew(checkout: Path, name: str) -> None:
    assert "pip install" not in make(checkout, "-n", "test")
    os.utime(checkout / name, times=(time.time() + 120, time.time() + 120))
    assert "pip install" in make(checkout, "-n", "test")


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_text("\n".join(["#!/bin/sh", 'echo "$@" >> "$0.log"', *lines]) + "\n")
    file.chmod(0o755)
    return file


def logged(file: Path) -> list[str]:
    log = file.with_name(f"{file.name}.log")
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("kind", ["made by uv", "interrupted", "none", "whole"])
def test_an_environment_without_pip_is_repaired(checkout: Path, tmp_path: Path, kind: str) -> None:
    python = tmp_path / ".venv/bin/python"
    (tmp_path / ".venv/.seda_fast_installed").unlink()
    pip = tmp_path / "pip"
    no_pip = f'case "$2" in pip) test -e {pip};; ensurepip)'
    whole = script(tmp_path / "made", "true")
    if kind == "made by uv":  # its Python has the module that brings pip, and keeps what else is installed
        script(python, f"{no_pip} touch {pip};; esac")
    elif kind == "interrupted":
        script(python, f"{no_pip} false;; esac")
    elif kind == "none":
        python.unlink()
    else:
        script(python, "true")
    base = script(
        tmp_path / "base",
        f'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp -f {whole} "$3/bin/python"; touch {pip}; fi',
    )
    make(checkout, "lint", f"PYTHON={base}")
    remade = any(line.startswith("-m venv") for line in logged(base))
    assert remade == (kind in ("interrupted", "none"))
    assert any(line.startswith("-m ensurepip") for line in logged(python)) == (kind in ("made by uv", "interrupted"))
    assert any(line.startswith("-m pip install") for line in logged(python))
    assert (tmp_path / ".venv/.seda_fast_installed").exists()


def test_what_python_keeps_of_a_build_is_no_source(checkout: Path) -> None:
    kept = checkout / "csrc" / "__pycache__" / "seda_fast_build.cpython-311.pyc"
    kept.parent.mkdir()
    kept.touch()
    os.utime(kept, times=(time.time() + 120, time.time() + 120))
    assert "pip install" not in make(checkout, "-n", "test")


def test_clean_leaves_nothing_of_a_build_and_needs_no_tests(checkout: Path) -> None:
    """An unpacked source archive has no tests."""
    left = ["_C.cpython-311-x86_64-linux-gnu.so", "libseda_fast_cpu.so", "libseda_fast_cuda.so", "_build.json"]
    for name in left:
        (checkout / "seda_fast" / name).touch()
    (checkout / "csrc" / "__pycache__").mkdir()
    (checkout / "runs").mkdir()
    make(checkout, "clean")
    assert {path.name for path in (checkout / "seda_fast").iterdir()} == {"__init__.py"}
    assert not (checkout / "csrc" / "__pycache__").exists()
    assert not (checkout / ".venv").exists()
    assert (checkout / "runs").is_dir()
