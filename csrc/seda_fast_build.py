"""How ``pip install`` compiles csrc/: ninja builds ``seda_fast._C`` and the operator libraries beside it.

Nothing here imports torch: an isolated build has none. The operators use only PyTorch's stable C ABI, so its headers
and the name of its library are enough; they are found in the environment that pip installs into. CUDA needs nvcc but
neither a GPU nor a PyTorch that has CUDA in it. Switches:

    SEDA_FAST_BUILD       auto (default: what this machine can build), cpu, cuda (both halves), none
    SEDA_FAST_CUDA_ARCHS  80;90a;100 by default, as far as nvcc knows them; PTX of the lowest one serves later GPUs
    MAX_JOBS              compilers at a time; fewer run where memory is short
    CXX, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME    as everywhere

In auto mode a part that cannot be built is left out with one warning. A machine without nvcc is an ordinary one: the
CUDA library is left out with a line in the build's log. ``python -m seda_fast.info`` tells the reason of either.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
CPU_LIBRARY = "libseda_fast_cpu.so"
CUDA_LIBRARY = "libseda_fast_cuda.so"
CUDA_STUB = "libtorch_cuda.so"
REPORT = "_build.json"

OLDEST_TORCH = (2, 10)
TARGET_VERSION = "0x020a000000000000"
GIB_PER_COMPILER = 1.5
CUDA_ARCHITECTURES = "80;90a;100"

STANDARD = "-std=c++20"
# Before 2.34 glibc has its threads in a library of their own, which -pthread links.
FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread")
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
# One translation unit of the row kernels for each: csrc/cpu/simd.
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
        # GCC 12's own AVX-512 header trips these warnings where it is used.
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
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
    linker: str = "link"


def build_mode() -> str:
    """What SEDA_FAST_BUILD asks for."""
    mode = os.environ.get("SEDA_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"SEDA_FAST_BUILD must be one of {', '.join(MODES)}, not {mode!r}")
    return mode


def extensions() -> list[Extension]:
    """For ``setup(ext_modules=...)``; optional, so that an install without it still succeeds."""
    return [] if build_mode() == "none" else [Extension("seda_fast._C", sources=[], optional=True)]


def variable(name: str) -> str:
    """What an environment variable says, in one line: a line of a ninja file ends where the text does."""
    return " ".join(line.strip() for line in os.environ.get(name, "").splitlines()).strip()


def compile_flags() -> str:
    """The compiler's flags as the shell reads them. Conda's CXXFLAGS, say, name a standard; the last one counts."""
    return " ".join(filter(None, [*FLAGS, variable("CXXFLAGS"), STANDARD]))


def words(command: str) -> list[str]:
    """A command such as CXX as the shell reads it."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise SystemExit(f"CXX must be a command, not {command!r}: {error}") from None


def find_compiler() -> str:
    """The C++ compiler's command as the shell reads it: CXX, which may begin with a launcher or end in flags."""
    named = variable("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(words(command)[0]):
            return command
    raise CannotBuildError(f"no C++ compiler was found (looked for {named or 'c++, g++ and clang++'})")


def torch_version(home: Path) -> str:
    stated = re.search(r"^__version__ = '(\d+\.\d+[^']*)'", (home / "version.py").read_text(), re.M)
    if stated is None:
        raise CannotBuildError(f"the version of PyTorch cannot be read from {home / 'version.py'}")
    return stated[1]


def sees_base_packages() -> bool:
    """Whether this is a virtual environment made with ``--system-site-packages``."""
    try:
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^\s*include-system-site-packages\s*=\s*true\s*$", text, re.M | re.I) is not None


def package_folders() -> list[str]:
    """Where the environment's packages lie; pip's isolated builds see none of them."""
    schemes, base = [sysconfig.get_default_scheme()], []
    alone = sys.prefix == sys.base_prefix
    if not alone and sees_base_packages():
        base = site.getsitepackages([sys.base_prefix])
    if alone or base:
        # What pip installs for the user.
        schemes.append(sysconfig.get_preferred_scheme("user"))
    paths = [sysconfig.get_path(part, scheme) for scheme in schemes for part in ("purelib", "platlib")]
    return [*sys.path, *paths, *base]


def find_torch() -> Path:
    """Folder of the installed torch package, without importing it."""
    for home in (Path(folder or ".") / "torch" for folder in package_folders()):
        if not (home / "include/torch/csrc/stable/library.h").is_file():
            continue
        version = torch_version(home)
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            raise CannotBuildError(f"PyTorch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        return home
    raise CannotBuildError(
        "PyTorch's headers were not found in the environment that is installed into; install torch first, and where it "
        "is there, add --no-build-isolation"
    )


def find_ninja() -> str:
    """The program of the package ninja, or else the one on the path."""
    try:
        import ninja

        packaged = shutil.which(os.path.join(ninja.BIN_DIR, "ninja"))
    except Exception:  # noqa: BLE001 - Django's ninja bears the name, too, and raises what its settings lack
        packaged = None
    found = packaged or shutil.which("ninja")
    if found is None:
        raise CannotBuildError("ninja was not found, neither in the package of that name nor on the path")
    return found


def jobs() -> int:
    """MAX_JOBS or the processors, and no more than memory has room for."""
    named = os.environ.get("MAX_JOBS", "").strip()
    if named and not (named.isdecimal() and int(named) > 0):
        raise SystemExit(f"MAX_JOBS must be a whole number from 1 on, not {named!r}")
    asked = int(named or os.cpu_count() or 1)
    free = free_memory()
    return asked if free is None else max(1, min(asked, int(free / 2**30 / GIB_PER_COMPILER)))


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are free on the machine, or in the container that this is, whichever are fewer; None if unknown."""
    found = []
    try:
        told = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.M)
        found += [int(told[1]) * 2**10] if told else []
    except OSError:
        pass
    try:
        limit, used = ((root / f"sys/fs/cgroup/memory.{what}").read_text().strip() for what in ("max", "current"))
        found += [int(limit) - int(used)] if limit != "max" else []
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def instruction_sets() -> list[str]:
    return list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def quoted(path: str | Path) -> str:
    """A path as one word of a command that the shell reads."""
    return shlex.quote(str(path))


def cpu_target(torch: Path) -> Target:
    """The operators on the CPU, against PyTorch's stable C ABI."""
    target = Target(CPU_LIBRARY)
    stable = (f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-isystem {quoted(torch / 'include')}")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        target.sources.append((source, f"cpu_{source.stem}.o", stable))
    for name in instruction_sets():
        flags = (f"-DSEDA_ISA={name}", *INSTRUCTION_SETS[name])
        target.sources.append((CSRC / "cpu/simd/kernels.cpp", f"cpu_kernels_{name}.o", flags))
    # libtorch_cpu is in the process before this library is loaded: its name, not its place, is recorded.
    target.link = (f"-L{quoted(torch / 'lib')}", "-ltorch_cpu", "-Wl,-z,defs", "-Wl,--allow-shlib-undefined")
    return target


def find_nvcc() -> str:
    """The CUDA compiler: NVCC, CUDA_HOME's, or the one on the path."""
    named, home = os.environ.get("NVCC"), os.environ.get("CUDA_HOME")
    looked = named or (str(Path(home) / "bin/nvcc") if home else "nvcc")
    found = shutil.which(looked)
    if found is None:
        raise CannotBuildError(f"no CUDA compiler was found (looked for {looked})")
    try:
        subprocess.run([found, "--version"], capture_output=True, check=False)
    except OSError as error:  # a file of another machine, say
        raise CannotBuildError(f"{found} cannot be run: {error.strerror}") from error
    return found


def known_architectures(nvcc: str) -> set[str]:
    """Numbers of the architectures that nvcc has code for, as ``90``; empty where it does not say."""
    done = spoken([nvcc, "--list-gpu-arch"])
    return set(re.findall(r"^compute_(\d+)$", done.stdout, re.M))


def cuda_architectures(nvcc: str) -> list[str]:
    """What SEDA_FAST_CUDA_ARCHS lists, as ``80`` or ``90a``; by default those of the usual ones that nvcc knows."""
    listed = (os.environ.get("SEDA_FAST_CUDA_ARCHS") or CUDA_ARCHITECTURES).split(";")
    if not os.environ.get("SEDA_FAST_CUDA_ARCHS") and (known := known_architectures(nvcc)):
        # CUDA 12.4, say, has none of 100, and would refuse the others with it.
        listed = [name for name in listed if name.rstrip("af") in known]
    for name in listed:
        if re.fullmatch(r"\d{2,3}[af]?", name) is None or int(name.rstrip("af")) < 80:
            raise SystemExit(f"SEDA_FAST_CUDA_ARCHS must list architectures from 80 on, as in 80;90a, not {name!r}")
    return listed


def architecture_flags(names: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the lowest that later GPUs can translate for themselves."""
    portable = [name for name in names if name.isdigit()]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    flags += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in sorted(portable, key=int)[:1]]
    # Some kernels have code for this one alone; the host must not start them without it.
    return [*flags, "-DSEDA_CODE_FOR_90A"] if "90a" in names else flags


def cuda_target(torch: Path, architectures: list[str]) -> Target:
    """The operators on CUDA: kernels by nvcc, which sees no header of PyTorch, and their checks by the C++ compiler."""
    target = Target(CUDA_LIBRARY, linker="nvlink")
    # The shim declares its CUDA functions only under this macro; the symbols are PyTorch's, found when it is loaded.
    stable = (f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", "-DUSE_CUDA", f"-isystem {quoted(torch / 'include')}")
    for source in sorted((CSRC / "cuda").glob("*.cpp")):
        target.sources.append((source, f"cuda_{source.stem}.o", stable))
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        target.sources.append((source, f"cuda_{source.stem}.cu.o", tuple(architecture_flags(architectures))))
    # An empty library of the name that PyTorch's CUDA half bears, for that name to be recorded: the one for the CPU
    # alone has none, and symbols of a library that is not recorded are not found.
    stub = "-L. -Xlinker=--no-as-needed -ltorch_cuda"
    target.link = (f"-L{quoted(torch / 'lib')}", "-ltorch_cpu", "-Xlinker=--allow-shlib-undefined", stub)
    return target


def module_target(output: str, report: dict[str, object]) -> Target:
    """``seda_fast._C``: the build report and what the CPU can do."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuildError("pybind11 was not found") from None
    python = tuple(
        f"-isystem {quoted(folder)}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    text = json.dumps(json.dumps(report))  # JSON inside a C string literal
    Path("build_report.h").write_text(f"#define SEDA_BUILD_REPORT {text}\n", encoding="utf-8")
    return Target(output, [(CSRC / "module.cpp", "module.o", (*python, "-I."))])


def host_compiler(compiler: str) -> str:
    """The program itself of a command such as ``ccache g++ -m64``: nvcc takes one word, and knows no launcher."""
    return list(takewhile(lambda word: not word.startswith("-"), words(compiler)))[-1]


def for_ninja(command: str) -> str:
    """A command for the shell inside a ninja file, which has variables of its own."""
    return command.replace("$", "$$")


def nvcc_rules(nvcc: str, compiler: str) -> list[str]:
    command = for_ninja(f"{quoted(nvcc)} -ccbin {quoted(host_compiler(compiler))}")
    return [
        "rule nvcompile",
        f"  command = {command} {' '.join(NVCC_FLAGS)} $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        # nvcc adds its own runtime as an archive: PyTorch's may be of another version.
        "rule nvlink",
        f"  command = {command} -shared $in -o $out $extra",
        "  description = $out",
        "rule stub",
        f"  command = {for_ninja(compiler)} -shared -Wl,-soname,$out -x c++ /dev/null -o $out",
        "  description = $out",
        f"build {CUDA_STUB}: stub",
    ]


def ninja_file(compiler: str, targets: list[Target], nvcc: str | None = None) -> str:
    """The rules, run from the folder that the objects go to."""
    command = for_ninja(compiler)
    lines = [
        f"flags = {for_ninja(compile_flags())}",
        f"ldflags = {for_ninja(variable('LDFLAGS'))}",
        "rule compile",
        f"  command = {command} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {command} -shared $flags $in -o $out $extra $ldflags",
        "  description = $out",
    ]
    if nvcc is not None:
        lines += nvcc_rules(nvcc, compiler)
    for target in targets:
        for source, built, extra in target.sources:
            escaped = for_ninja(str(source)).replace(" ", "$ ").replace(":", "$:")
            rule = "nvcompile" if source.suffix == ".cu" else "compile"
            lines += [f"build {built}: {rule} {escaped}", f"  extra = {for_ninja(' '.join(extra))}"]
        objects = " ".join(built for _, built, _ in target.sources)
        stub = f" | {CUDA_STUB}" if target.linker == "nvlink" else ""
        lines += [
            f"build {target.output}: {target.linker} {objects}{stub}",
            f"  extra = {for_ninja(' '.join(target.link))}",
        ]
    return "\n".join(lines) + "\n"


def write_ninja(compiler: str, targets: list[Target], nvcc: str | None = None) -> None:
    """`ninja_file` in the current folder; a path in it has the bytes that it has on disk, text or not."""
    Path("build.ninja").write_bytes(os.fsencode(ninja_file(compiler, targets, nvcc)))


def spoken(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command run to its end; what it says and is no text does not stop the build."""
    return subprocess.run(command, text=True, errors="replace", capture_output=True, check=False)


def compiler_version(compiler: str, line: int = 0) -> str:
    """A line of what a command, as the shell reads it, says of its version; its name where it says nothing."""
    try:
        done = spoken([*words(compiler), "--version"])
    except OSError as error:  # a file of another machine, say
        raise CannotBuildError(f"{compiler} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise CannotBuildError(f"{compiler} --version fails: {done.stderr.strip()[-300:]}")
    lines = done.stdout.splitlines()
    return lines[line] if -len(lines) <= line < len(lines) else compiler


def run_ninja(ninja: str, *outputs: str) -> str | None:
    """Build what is named; the end of the compiler's output, and of ninja's own, where that fails."""
    done = spoken([ninja, f"-j{jobs()}", *outputs])
    if done.returncode == 0:
        return None
    said = done.stdout + done.stderr
    sys.stderr.write(said)
    return said.strip()[-500:]


def products() -> tuple[str, ...]:
    """Names of all files that a build for this Python can make."""
    suffix = os.environ.get("SETUPTOOLS_EXT_SUFFIX") or sysconfig.get_config_var("EXT_SUFFIX")
    return f"_C{suffix}", CPU_LIBRARY, CUDA_LIBRARY, REPORT


def clear(package: Path) -> None:
    """Delete what an earlier build for this Python left in a folder."""
    for name in products():
        (package / name).unlink(missing_ok=True)


def modules_of_other_pythons(package: Path) -> dict[str, int]:
    """The modules ``_C`` in a folder that its report lists and this Python's build does not make, and their bytes.

    The operators' libraries know no Python, so these modules go with those of the next build.
    """
    try:
        listed = json.loads((package / REPORT).read_text(encoding="utf-8")).get("bytes", {}).items()
    except (OSError, ValueError, AttributeError):  # there is none, or none that can be read
        return {}
    others = {name: size for name, size in listed if name.startswith("_C.") and name not in products()}
    return {name: size for name, size in others.items() if length(package / name) == size}


def length(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


class BuildExtension(build_ext):
    """``build_ext`` that hands the work to ninja and leaves a report of what was built and what was not."""

    def build_extension(self, ext: Extension) -> None:
        final = Path(self.get_ext_fullpath(ext.name)).resolve()
        final.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier build left here would go into this wheel.
        clear(final.parent)
        try:
            report = self._compile(final)
        except CannotBuildError as reason:
            if build_mode() != "auto":
                raise SystemExit(f"SEDA_FAST_BUILD={build_mode()}: {reason}") from None
            warnings.warn(f"seda_fast is installed without its C++ half: {reason}.", stacklevel=2)
            report = {"missing": {"cpu": str(reason), "cuda": str(reason)}}
        (final.parent / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _compile(self, final: Path) -> dict[str, object]:
        """Build into build_temp, then put the results where setuptools expects the extension."""
        if sys.platform != "linux":
            raise CannotBuildError(f"it is built on Linux only, and this is {sys.platform}")
        compiler, torch, ninja = find_compiler(), find_torch(), find_ninja()
        report: dict[str, object] = {
            "compiler": compiler_version(compiler),
            "flags": compile_flags(),
            "architectures": [platform.machine()],
            "instruction_sets": instruction_sets(),
            "torch_headers": torch_version(torch),
            "torch_abi": TARGET_VERSION,
        }
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        here = Path.cwd()
        os.chdir(folder)
        try:
            libraries, about_cuda = self._build_libraries(compiler, torch, ninja)
            report |= {"libraries": libraries} | about_cuda
            module = module_target(final.name, report)
            write_ninja(compiler, [module])
            if (failure := run_ninja(ninja)) is not None:
                raise CannotBuildError(f"the compiler fails; the end of its output: {failure}")
            outputs = [module.output, *libraries]
            for name in outputs:
                shutil.copy2(name, final.parent / name)
            sizes = {name: Path(name).stat().st_size for name in outputs}
        finally:
            os.chdir(here)
        return report | {"bytes": sizes}

    def _build_libraries(self, compiler: str, torch: Path, ninja: str) -> tuple[list[str], dict[str, object]]:
        """The operators' libraries in the current folder; what the report says of CUDA."""
        cpu = cpu_target(torch)
        if build_mode() == "cpu":
            nvcc, missing = None, "SEDA_FAST_BUILD=cpu asks for the CPU alone"
        else:
            try:
                nvcc, missing = find_nvcc(), ""
            except CannotBuildError as reason:
                nvcc, missing = None, str(reason)
        targets = [cpu]
        if nvcc is not None:
            architectures = cuda_architectures(nvcc)
            targets.append(cuda_target(torch, architectures))
        elif build_mode() == "cuda":
            raise CannotBuildError(missing)
        else:
            print(f"seda_fast is built without its CUDA library: {missing}", file=sys.stderr)
        write_ninja(compiler, targets, nvcc)
        # Both at once fill the processors; where one fails, a second run tells which.
        if (failure := run_ninja(ninja, "-k0")) is None:
            built = [target.output for target in targets]
        elif nvcc is None or run_ninja(ninja, CPU_LIBRARY) is not None:
            raise CannotBuildError(f"the compiler fails; the end of its output: {failure}")
        elif build_mode() == "cuda":
            raise CannotBuildError(f"nvcc fails; the end of the output: {failure}")
        else:
            missing = f"nvcc fails; the end of the output: {failure}"
            warnings.warn(f"seda_fast is installed without its CUDA library: {missing}", stacklevel=2)
            nvcc, built = None, [CPU_LIBRARY]
        if nvcc is None:
            return built, {"missing": {"cuda": missing}}
        return built, {
            "missing": {},
            "cuda": {
                "compiler": compiler_version(quoted(nvcc), line=-2),
                "flags": " ".join(NVCC_FLAGS),
                "architectures": architectures,
            },
        }

    def copy_extensions_to_source(self) -> None:
        """For an editable install: everything that lies beside ``_C`` goes into the checkout, too."""
        package = self._package()
        others = modules_of_other_pythons(package)
        # This build may have made less than an earlier one; and who has a library open keeps it as it was.
        clear(package)
        for built in self._made():
            shutil.copy2(built, package / built.name)
        if others:
            report = json.loads((package / REPORT).read_text(encoding="utf-8"))
            report["bytes"] = report.get("bytes", {}) | others
            (package / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        """Files of the build; setuptools would name ``_C`` alone, and also where it was not made."""
        return list(map(str, self._made()))

    def get_output_mapping(self) -> dict[str, str]:
        """Each file of an editable install's build to its place in the checkout, which a strict one links to."""
        return {str(built): str(self._package() / built.name) for built in self._made()} if self.inplace else {}

    def _package(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("seda_fast"))

    def _made(self) -> list[Path]:
        files = (Path(self.build_lib) / "seda_fast" / name for name in products())
        return [file for file in files if file.is_file()]


class BuildPython(build_py):
    """``build_py`` that makes an editable install without a compiled half one, too, where an earlier one had it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode and build_mode() == "none":
            clear(Path(self.get_package_dir("seda_fast")))
