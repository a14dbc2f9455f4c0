"""How ``pip install`` compiles csrc/: ninja builds ``seda_fast._C`` and the operator libraries beside it.

Nothing here imports torch: an isolated build has none. The operators use only PyTorch's stable C ABI, so its headers
and the name of its library are enough; they are found in the environment that pip installs into. Switches:

    SEDA_FAST_BUILD       auto (default: what this machine can build), cpu, none
    MAX_JOBS              compilers at a time; fewer run where memory is short
    CXX, CXXFLAGS, LDFLAGS    as everywhere

In auto mode a part that cannot be built is left out with one warning, which ``python -m seda_fast.info`` repeats.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "none")
CPU_LIBRARY = "libseda_fast_cpu.so"
REPORT = "_build.json"

OLDEST_TORCH = (2, 10)
TARGET_VERSION = "0x020a000000000000"
GIB_PER_COMPILER = 1.5

FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# One translation unit of the row kernels for each: csrc/cpu/simd.
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
        # GCC 12's own AVX-512 header trips this warning at every use.
        "-Wno-maybe-uninitialized",
    ),
}


class CannotBuildError(Exception):
    """One sentence: what is missing."""


@dataclass
class Target:
    """One shared library of the build."""

    output: str
    sources: list[tuple[Path, str, tuple[str, ...]]] = field(default_factory=list)  # file, object, extra flags
    link: tuple[str, ...] = ()


def build_mode() -> str:
    """What SEDA_FAST_BUILD asks for."""
    mode = os.environ.get("SEDA_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"SEDA_FAST_BUILD must be one of {', '.join(MODES)}, not {mode!r}")
    return mode


def extensions() -> list[Extension]:
    """For ``setup(ext_modules=...)``; optional, so that an install without it still succeeds."""
    return [] if build_mode() == "none" else [Extension("seda_fast._C", sources=[], optional=True)]


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(command.split()[0]):
            return command
    raise CannotBuildError(f"no C++ compiler was found (looked for {named or 'c++, g++ and clang++'})")


def torch_version(home: Path) -> str:
    stated = re.search(r"^__version__ = '(\d+\.\d+[^']*)'", (home / "version.py").read_text(), re.M)
    if stated is None:
        raise CannotBuildError(f"the version of PyTorch cannot be read from {home / 'version.py'}")
    return stated[1]


def find_torch() -> Path:
    """Folder of the installed torch package, without importing it."""
    paths = sysconfig.get_paths()
    folders = [*sys.path, paths["purelib"], paths["platlib"]]
    for home in (Path(folder or ".") / "torch" for folder in folders):
        if not (home / "include/torch/csrc/stable/library.h").is_file():
            continue
        version = torch_version(home)
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            raise CannotBuildError(f"PyTorch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        return home
    raise CannotBuildError(
        "PyTorch's headers were not found in the environment that is installed into; install torch first"
    )


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CannotBuildError("ninja was not found") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def jobs() -> int:
    """MAX_JOBS or the processors, and no more than memory has room for."""
    asked = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    try:
        free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        free = None
    room = int(int(free[1]) / 2**20 / GIB_PER_COMPILER) if free else asked
    return max(1, min(asked, room))


def instruction_sets() -> list[str]:
    return list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def cpu_target(torch: Path) -> Target:
    """The operators on the CPU, against PyTorch's stable C ABI."""
    target = Target(CPU_LIBRARY)
    stable = (f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-isystem {torch / 'include'}")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        target.sources.append((source, f"cpu_{source.stem}.o", stable))
    for name in instruction_sets():
        flags = (f"-DSEDA_ISA={name}", *INSTRUCTION_SETS[name])
        target.sources.append((CSRC / "cpu/simd/kernels.cpp", f"cpu_kernels_{name}.o", flags))
    # libtorch_cpu is in the process before this library is loaded: its name, not its place, is recorded.
    target.link = (f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs", "-Wl,--allow-shlib-undefined")
    return target


def module_target(output: str, report: dict[str, object]) -> Target:
    """``seda_fast._C``: the build report and what the CPU can do."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuildError("pybind11 was not found") from None
    python = (f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}")
    text = json.dumps(json.dumps(report))  # JSON inside a C string literal
    Path("build_report.h").write_text(f"#define SEDA_BUILD_REPORT {text}\n", encoding="utf-8")
    return Target(output, [(CSRC / "module.cpp", "module.o", (*python, "-I."))])


def ninja_file(compiler: str, targets: list[Target]) -> str:
    """The rules, run from the folder that the objects go to."""
    lines = [
        f"flags = {' '.join(FLAGS)} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        f"  command = {compiler} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} -shared $flags $in -o $out $extra $ldflags",
        "  description = $out",
    ]
    for target in targets:
        for source, built, extra in target.sources:
            escaped = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            lines += [f"build {built}: compile {escaped}", f"  extra = {' '.join(extra)}"]
        objects = " ".join(built for _, built, _ in target.sources)
        lines += [f"build {target.output}: link {objects}", f"  extra = {' '.join(target.link)}"]
    return "\n".join(lines) + "\n"


def compiler_version(compiler: str) -> str:
    done = subprocess.run([*compiler.split(), "--version"], text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise CannotBuildError(f"{compiler} --version fails: {done.stderr.strip()[-300:]}")
    return done.stdout.splitlines()[0]


class BuildExtension(build_ext):
    """``build_ext`` that hands the work to ninja and leaves a report of what was built and what was not."""

    def build_extension(self, ext: Extension) -> None:
        final = Path(self.get_ext_fullpath(ext.name)).resolve()
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = self._compile(final)
        except CannotBuildError as reason:
            if build_mode() != "auto":
                raise SystemExit(f"SEDA_FAST_BUILD={build_mode()}: {reason}") from None
            warnings.warn(f"seda_fast is installed without its C++ half: {reason}.", stacklevel=2)
            report = {"missing": {"cpu": str(reason)}}
            # What an earlier build left here would go into this wheel.
            for stale in (final, final.parent / CPU_LIBRARY):
                stale.unlink(missing_ok=True)
        (final.parent / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _compile(self, final: Path) -> dict[str, object]:
        """Build into build_temp, then put the results where setuptools expects the extension."""
        if sys.platform != "linux":
            raise CannotBuildError(f"it is built on Linux only, and this is {sys.platform}")
        compiler, torch, ninja = find_compiler(), find_torch(), find_ninja()
        report: dict[str, object] = {
            "compiler": compiler_version(compiler),
            "flags": " ".join(filter(None, [*FLAGS, os.environ.get("CXXFLAGS")])),
            "architectures": [platform.machine()],
            "instruction_sets": instruction_sets(),
            "torch_headers": torch_version(torch),
            "torch_abi": TARGET_VERSION,
            "libraries": [CPU_LIBRARY],
            "missing": {},
        }
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        here = Path.cwd()
        os.chdir(folder)
        try:
            targets = [module_target(final.name, report), cpu_target(torch)]
            Path("build.ninja").write_text(ninja_file(compiler, targets), encoding="utf-8")
            done = subprocess.run([ninja, f"-j{jobs()}"], text=True, capture_output=True, check=False)
            if done.returncode != 0:
                sys.stderr.write(done.stdout + done.stderr)
                raise CannotBuildError(f"the compiler fails; the end of its output: {done.stdout.strip()[-500:]}")
            for target in targets:
                shutil.copy2(target.output, final.parent / target.output)
            sizes = {target.output: Path(target.output).stat().st_size for target in targets}
        finally:
            os.chdir(here)
        return report | {"bytes": sizes}

    def copy_extensions_to_source(self) -> None:
        """For an editable install: everything that lies beside ``_C`` goes into the checkout, too."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("seda_fast"))
        for built in sorted((Path(self.build_lib) / "seda_fast").glob("*")):
            if built.name == REPORT or built.name.startswith("libseda_fast_"):
                shutil.copy2(built, package / built.name)
