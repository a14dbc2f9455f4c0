"""What ``pip install`` compiles: each mode from a clean copy, the wheel's content, the stable ABI, damaged files."""

import ctypes
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

NVCC = shutil.which("nvcc")
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
TORCH = Path(torch.__file__).parent
PROBE = """
import json, sys, warnings
# An editable install of this environment would lend its own _C to a copy that has none.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from seda_fast import ops
ids = torch.arange(3)
x = ops.q_sample(torch.zeros(3, 4), ids, torch.ones(3), torch.ones(3), seed=1, step=2, sample_ids=ids)
print(json.dumps({
    "backend": ops.choose("q_sample", "cpu")[0],
    "torch": torch.__version__,
    "status": ops.cpp_status(),
    "cuda": ops.cuda_status(),
    "sum": x.double().sum().item(),
    "warnings": [str(w.message) for w in caught if "seda_fast" in str(w.message)],
}))
"""


@pytest.fixture(scope="module")
def build_module(repository: Path) -> Iterator[ModuleType]:
    """csrc/seda_fast_build.py, as setup.py imports it."""
    sys.path.insert(0, str(repository / "csrc"))
    try:
        import seda_fast_build

        yield seda_fast_build
    finally:
        sys.path.remove(str(repository / "csrc"))


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, as in a fresh clone."""
    if shutil.which("git") is None or not (repository / ".git").exists():
        pytest.skip("tests/test_build.py needs git and a clone: it builds from the tracked files alone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True)
    folder = tmp_path_factory.mktemp("checkout")
    for name in listed.stdout.split("\0"):
        if name and (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, folder / name)
    return folder


def build(checkout: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` without isolation: setuptools, pybind11 and ninja come from this environment."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    return subprocess.run(
        command, cwd=checkout, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )


def unpack(out: Path) -> Path:
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def probe(site: Path, python: str = sys.executable, script: str = PROBE) -> dict[str, object]:
    done = subprocess.run(
        [python, "-c", script],
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def compiled(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked wheel of SEDA_FAST_BUILD=cpu, compiled with every warning an error."""
    if COMPILER is None:
        pytest.skip("tests/test_build.py needs a C++ compiler for this test")
    out = tmp_path_factory.mktemp("compiled")
    done = build(checkout, out, SEDA_FAST_BUILD="cpu", CXXFLAGS="-O1 -Wall -Wextra -Werror")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return unpack(out)


@pytest.fixture(scope="module")
def compiled_cuda(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked wheel of SEDA_FAST_BUILD=cuda for one architecture, which needs neither a GPU nor a PyTorch for one."""
    if COMPILER is None or NVCC is None:
        pytest.skip("tests/test_build.py needs a C++ compiler and nvcc for this test")
    out = tmp_path_factory.mktemp("compiled_cuda")
    switches = {"SEDA_FAST_BUILD": "cuda", "SEDA_FAST_CUDA_ARCHS": "80", "CXXFLAGS": "-O0"}
    done = build(checkout, out, **switches, NVCC_APPEND_FLAGS="-Xptxas=-O0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return unpack(out)


def test_wheel_holds_libraries_and_kernels_but_no_sources_or_objects(compiled: Path, checkout: Path) -> None:
    names = {file.relative_to(compiled).as_posix() for file in compiled.rglob("*") if file.is_file()}
    expected = {f"seda_fast/_C{EXTENSION_SUFFIXES[0]}", "seda_fast/libseda_fast_cpu.so", "seda_fast/_build.json"}
    assert expected <= names
    assert {f"seda_fast/kernels/{file.name}" for file in (checkout / "kernels").glob("*.py")} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"seda_fast"}
    assert not [name for name in names if re.search(r"\.(o|d|cpp|cu|h|ninja)$|(^|/)tests?/", name)]


def test_compiled_package_serves_the_cpu_and_tells_its_build(compiled: Path) -> None:
    found = probe(compiled)
    assert (found["backend"], found["warnings"]) == ("cpp", [])
    status = found["status"]
    assert isinstance(status, dict)
    report = status["build"]
    assert report["torch_headers"] == torch.__version__
    assert report["torch_abi"] == "0x020a000000000000"
    assert "-Werror" in report["flags"]
    assert report["libraries"] == ["libseda_fast_cpu.so"]
    assert report["missing"] == {"cuda": "SEDA_FAST_BUILD=cpu asks for the CPU alone"}
    assert json.loads((compiled / "seda_fast/_build.json").read_text()).items() >= report.items()


def test_the_module_itself_tells_the_build_that_the_file_beside_it_does(compiled: Path) -> None:
    script = PROBE.partition("with ")[0] + 'import importlib\nmodule = importlib.import_module("seda_fast._C")\n'
    found = probe(compiled, script=script + "print(json.dumps(module.build_report()))")
    written = json.loads((compiled / "seda_fast/_build.json").read_text())
    # A file's size is known when it is linked, and the module is one of them.
    assert set(written.pop("bytes")) == {f"_C{EXTENSION_SUFFIXES[0]}", "libseda_fast_cpu.so"}
    assert found == written


COMPARED = """
import json, torch
from seda_fast import ops
ids = torch.arange(37)
key = dict(seed=torch.tensor(1), step=torch.tensor(2), sample_ids=ids)
torch.manual_seed(0)
h, gate, *tables = (torch.randn(37, n) for n in (20, 36, 20, 20, 20))
weights = torch.randn(36, 20), torch.randn(36), torch.randn(20, 36), torch.randn(20)
x0, table = torch.randn(37, 22), torch.rand(37)
found = {}
for backend in ("cpp", "reference"):
    with ops.use_backend(backend):
        noised = ops.q_sample(x0, ids, table, table, **key)
        block = ops.interaction_block(h, gate, ids, *tables, *weights, dropout=0.3, **key)
        found[backend] = noised, block
apart = max((a - b).abs().max().item() for a, b in zip(found["cpp"], found["reference"]))
print(json.dumps({"apart": apart, "build": ops.cpp_status()["build"]["compiler"]}))
"""


def test_clang_s_library_computes_what_the_reference_does(checkout: Path, tmp_path: Path) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("test_clang_s_library_computes_what_the_reference_does needs clang++")
    done = build(checkout, tmp_path, SEDA_FAST_BUILD="cpu", CXX="clang++")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = probe(unpack(tmp_path), script=COMPARED)
    assert "clang" in str(found["build"])
    assert float(str(found["apart"])) < 1e-4


def test_the_cuda_half_is_built_without_a_gpu_and_loaded_only_where_pytorch_has_cuda(compiled_cuda: Path) -> None:
    assert (compiled_cuda / "seda_fast/libseda_fast_cuda.so").is_file()
    found = probe(compiled_cuda)
    assert found["warnings"] == []
    cuda = found["cuda"]
    assert isinstance(cuda, dict)
    assert cuda["build"]["architectures"] == ["80"]
    assert "release" in cuda["build"]["compiler"]
    expected = "this PyTorch was built without CUDA" if torch.version.cuda is None else None
    assert (cuda["available"], cuda["reason"]) == (expected is None, expected)


def test_architectures_are_checked_and_the_lowest_serves_later_gpus(
    build_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    for listed, expected in (
        (("75", "80", "90", "100", "120"), ["80", "90a", "100"]),
        # CUDA 12.4's, and one that does not say.
        (("50", "80", "86", "90"), ["80", "90a"]),
        ((), ["80", "90a", "100"]),
    ):
        nvcc.write_text("#!/bin/sh\necho\n" + "".join(f"echo compute_{name}\n" for name in listed))
        nvcc.chmod(0o755)
        assert build_module.cuda_architectures(str(nvcc)) == expected
    flags = build_module.architecture_flags(["100", "90a", "80"])
    assert [flag for flag in flags if "code=compute" in flag] == ["-gencode=arch=compute_80,code=compute_80"]
    only = build_module.architecture_flags(["90a"])
    assert only == ["-gencode=arch=compute_90a,code=sm_90a", "-DSEDA_CODE_FOR_90A"]
    assert "-DSEDA_CODE_FOR_90A" not in build_module.architecture_flags(["80", "90"])
    for wrong in ("75", "ninety", "80;", "80 90"):
        monkeypatch.setenv("SEDA_FAST_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match="SEDA_FAST_CUDA_ARCHS must list architectures from 80 on"):
            build_module.cuda_architectures("nvcc")


def test_a_missing_nvcc_is_named(build_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    with pytest.raises(build_module.CannotBuildError, match=r"no CUDA compiler was found \(looked for no-such-nvcc\)"):
        build_module.find_nvcc()


def test_without_nvcc_the_log_and_info_say_so_and_nobody_is_warned(
    checkout: Path, compiled: Path, tmp_path: Path, fake_compiler: Path
) -> None:
    out = tmp_path / "out"
    done = package(checkout, "wheel", out, SEDA_FAST_BUILD="auto", CXX=f"'{fake_compiler}'", NVCC="no-such-nvcc")
    assert done.returncode == 0, done.stderr[-2000:]
    cause = "no CUDA compiler was found (looked for no-such-nvcc)"
    assert f"seda_fast is built without its CUDA library: {cause}" in done.stdout + done.stderr
    assert "Warning: seda_fast" not in done.stdout + done.stderr
    report = json.loads((unpack(out) / "seda_fast/_build.json").read_text())
    assert report["libraries"] == ["libseda_fast_cpu.so"]
    assert report["missing"] == {"cuda": cause}
    # The same of a build that can be loaded, with PyTorch for the CPU and for CUDA.
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    file = site / "seda_fast/_build.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"missing": report["missing"]}))
    for before in ("", "import torch; torch.version.cuda = '13.0'"):
        assert "".join(f"CUDA: not built: {cause}".split()) in info_of(site, before)
    assert probe(site)["warnings"] == []


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_an_nvcc_that_fails_leaves_the_cpu_half(checkout: Path, tmp_path: Path, mode: str) -> None:
    if COMPILER is None:
        pytest.skip("test_an_nvcc_that_fails_leaves_the_cpu_half needs a C++ compiler")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    nvcc.chmod(0o755)
    done = build(checkout, tmp_path, SEDA_FAST_BUILD=mode, NVCC=str(nvcc), CXXFLAGS="-O0")
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (mode == "auto"), said[-2000:]
    assert "this compiler is broken" in said
    if mode == "cuda":
        assert "SEDA_FAST_BUILD=cuda: nvcc fails" in said
        return
    assert len(re.findall(r"UserWarning: seda_fast is installed without its CUDA library", said)) == 1
    found = probe(unpack(tmp_path))
    assert (found["backend"], found["warnings"]) == ("cpp", [])


ODD_FOLDER = "Eve's files: $HOME & more"


def odd_environment(
    build_module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = ODD_FOLDER
) -> dict[str, Path]:
    """Folders of PyTorch, pybind11, Python and nvcc that no shell and no ninja may take apart."""
    odd = folder / name
    for part in ("torch/include", "torch/lib", "pybind11", "python"):
        (odd / part).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: str(odd / "pybind11")))
    told = SimpleNamespace(get_paths=lambda: {"include": str(odd / "python")})
    monkeypatch.setattr(build_module, "sysconfig", told)
    monkeypatch.chdir(folder)
    return {part: odd / part for part in ("torch", "pybind11", "python", "nvcc")}


def test_every_path_reaches_the_compilers_whole(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = odd_environment(build_module, tmp_path, monkeypatch)
    monkeypatch.setattr(build_module, "CSRC", odd["torch"].parent / "csrc")
    shutil.copytree(Path(build_module.__file__).parent, build_module.CSRC)
    targets = [build_module.cpu_target(odd["torch"]), build_module.cuda_target(odd["torch"], ["80"])]
    targets.append(build_module.module_target("_C.so", {}))
    compiler = f"ccache {shlex.quote(str(odd['python'] / 'g++'))} -m64"
    (tmp_path / "build.ninja").write_text(build_module.ninja_file(compiler, targets, str(odd["nvcc"])))
    command = [build_module.find_ninja(), "-t", "commands"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # Of all sources, and what links them.
    assert len(listed) >= sum(len(target.sources) + 1 for target in targets)
    for words in map(shlex.split, listed):
        # Whatever holds a part of the folder's name holds the whole of it.
        told = [word for word in words if any(part in word for part in ("Eve", "files:", "$HOME", "more"))]
        assert told and all(ODD_FOLDER in word for word in told), words
        if words[0] == str(odd["nvcc"]):
            assert words[1:3] == ["-ccbin", str(odd["python"] / "g++")]
        else:
            assert words[:3] == ["ccache", str(odd["python"] / "g++"), "-m64"]
        if any(word.endswith("module.cpp") for word in words):
            included = [after for word, after in itertools.pairwise(words) if word == "-isystem"]
            assert included == [str(odd["pybind11"]), str(odd["python"])]


@pytest.mark.parametrize("suffix", [".cpp", ".cu"])
def test_a_library_is_built_from_and_against_a_folder_of_an_odd_name(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    if COMPILER is None or (suffix == ".cu" and NVCC is None):
        pytest.skip(f"test_a_library_is_built_from_and_against_a_folder_of_an_odd_name[{suffix}] needs a compiler")
    # nvcc itself hands its host compiler other signs than spaces in a way that loses them.
    name = "Eve and more" if suffix == ".cu" else ODD_FOLDER
    odd = odd_environment(build_module, tmp_path, monkeypatch, name)["torch"]
    (odd / "include/answer.h").write_text('extern "C" int answer();\n')
    (odd / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libanswer.so", str(odd / "answer.cpp")]
    command += ["-o", str(odd / "lib/libanswer.so")]
    subprocess.run(command, check=True)
    source = odd / f"asks{suffix}"
    source.write_text(
        '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int asked() { return answer(); }\n'
    )
    flags = (f"-isystem {build_module.quoted(odd / 'include')}",)
    library = build_module.Target(
        "libasks.so", [(source, "asks.o", flags)], linker="nvlink" if suffix == ".cu" else "link"
    )
    library.link = (f"-L{build_module.quoted(odd / 'lib')}", "-lanswer")
    Path("build.ninja").write_text(build_module.ninja_file(COMPILER, [library], NVCC))
    assert build_module.run_ninja(build_module.find_ninja()) is None
    ctypes.CDLL(str(odd / "lib/libanswer.so"), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(tmp_path / "libasks.so")).asked() == 42


def listed_commands(build_module: ModuleType, *targets: object) -> list[list[str]]:
    """What ninja would run in the current folder, each command as the shell takes it apart."""
    build_module.write_ninja("g++", list(targets))
    command = [build_module.find_ninja(), "-t", "commands"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [shlex.split(line) for line in listed]


def test_threads_are_asked_for_where_it_is_compiled_and_where_it_is_linked(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = listed_commands(build_module, build_module.cpu_target(TORCH))
    compiled = [words for words in commands if "-c" in words]
    (linked,) = [words for words in commands if "-shared" in words]
    assert len(compiled) == len(commands) - 1 > 10
    assert all("-pthread" in words for words in [*compiled, linked])


def test_no_flag_of_the_environment_takes_the_standard_or_the_next_line(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXXFLAGS", "-fno-plt  -std=c++17\n  -O1\n")
    monkeypatch.setenv("LDFLAGS", "-Wl,-O1\r\n\t-Wl,--as-needed\n")
    commands = listed_commands(build_module, build_module.cpu_target(TORCH))
    for words in commands:
        assert [word for word in words if word.startswith("-std=")] == ["-std=c++17", "-std=c++20"]
        assert words.index("-O3") < words.index("-O1")
    assert commands[-1][-2:] == ["-Wl,-O1", "-Wl,--as-needed"]
    told = build_module.compile_flags()
    assert told.startswith("-O3 ") and told.endswith(" -fno-plt  -std=c++17 -O1 -std=c++20")


def test_a_folder_whose_name_is_no_text_is_built_from(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if COMPILER is None:
        pytest.skip("test_a_folder_whose_name_is_no_text_is_built_from needs a C++ compiler")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("test_a_folder_whose_name_is_no_text_is_built_from: this file system takes names of text alone")
    (folder / "answer.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    monkeypatch.chdir(tmp_path)
    library = build_module.Target("libanswers.so", [(folder / "answer.cpp", "answer.o", ())])
    build_module.write_ninja(COMPILER, [library])
    assert build_module.run_ninja(build_module.find_ninja()) is None
    assert ctypes.CDLL(str(tmp_path / "libanswers.so")).answer() == 42


def test_what_ninja_itself_complains_of_is_told_and_odd_signs_are_no_error(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_module.write_ninja("g++", [])
    assert "unknown target 'nothing'" in build_module.run_ninja(build_module.find_ninja(), "nothing")
    broken = tmp_path / "ninja"
    broken.write_text("#!/bin/sh\nprintf 'caf\\351 cannot be compiled'\nexit 1\n")
    broken.chmod(0o755)
    assert "cannot be compiled" in build_module.run_ninja(str(broken))
    with pytest.raises(build_module.CannotBuildError, match="--version fails"):
        build_module.compiler_version(str(broken))


def test_only_a_package_that_has_ninja_in_it_is_taken_for_it(
    build_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = tmp_path / "path" / "ninja"
    on_path.parent.mkdir()
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", str(on_path.parent))
    for stranger in (None, SimpleNamespace(), SimpleNamespace(BIN_DIR=str(tmp_path)), SimpleNamespace(BIN_DIR=None)):
        monkeypatch.setitem(sys.modules, "ninja", stranger)
        assert build_module.find_ninja() == str(on_path)
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=str(on_path.parent)))
    monkeypatch.setenv("PATH", "")
    assert build_module.find_ninja() == str(on_path)
    monkeypatch.delitem(sys.modules, "ninja")
    (tmp_path / "ninja.py").write_text("raise RuntimeError('settings are not configured')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(build_module.CannotBuildError, match="ninja was not found, neither in the package of that name"):
        build_module.find_ninja()


def test_a_launcher_and_flags_beside_the_compiler_are_not_taken_for_it(build_module: ModuleType) -> None:
    for command, program in (
        ("g++", "g++"),
        ("ccache g++", "g++"),
        ("distcc ccache clang++ -m64 -isystem /usr/local/include", "clang++"),
        ("'/opt/my tools/g++' -m64", "/opt/my tools/g++"),
    ):
        assert build_module.host_compiler(command) == program


def test_a_compiler_that_cannot_be_run_or_says_nothing_of_itself(
    build_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quiet, other, short = (tmp_path / name for name in ("quiet", "of another machine", "nvcc"))
    quiet.write_text("#!/bin/sh\n")
    other.write_bytes(b"\x7fELFnothing")
    short.write_text("#!/bin/sh\necho one line\n")
    for file in (quiet, other, short):
        file.chmod(0o755)
    assert build_module.compiler_version(str(quiet)) == str(quiet)
    assert build_module.compiler_version(str(short), line=-2) == str(short)
    with pytest.raises(build_module.CannotBuildError, match=r"of another machine' cannot be run: Exec format error"):
        build_module.compiler_version(f"'{other}'")
    monkeypatch.setenv("NVCC", str(other))
    with pytest.raises(build_module.CannotBuildError, match=r"of another machine cannot be run: Exec format error"):
        build_module.find_nvcc()
    monkeypatch.setenv("NVCC", str(short))
    assert build_module.find_nvcc() == str(short)


def test_what_cannot_be_read_in_a_switch_is_named(build_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("abc", "0", "-2", "1.5"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS must be a whole number from 1 on, not '{wrong}'"):
            build_module.jobs()
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(SystemExit, match=r"CXX must be a command, not .*: No closing quotation"):
        build_module.find_compiler()
    monkeypatch.setenv("CXX", " ")
    assert build_module.find_compiler() in ("c++", "g++", "clang++")


def shim_functions() -> set[str]:
    """Names that PyTorch's stable C headers declare."""
    folders = TORCH / "include/torch/csrc"
    headers = [*(folders / "stable/c").glob("*.h"), *(folders / "inductor/aoti_torch/c").glob("shim*.h")]
    headers += (folders / "inductor/aoti_torch/generated").glob("c_shim_aten.h")
    return {name for header in headers for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", header.read_text())}


@pytest.mark.parametrize("library", ["libseda_fast_cpu.so", "libseda_fast_cuda.so"])
def test_operators_use_nothing_of_pytorch_but_the_stable_abi(library: str, request: pytest.FixtureRequest) -> None:
    if shutil.which("nm") is None:
        pytest.skip("test_operators_use_nothing_of_pytorch_but_the_stable_abi needs nm")
    site: Path = request.getfixturevalue("compiled_cuda" if "cuda" in library else "compiled")
    command = ["nm", "-D", "--undefined-only", str(site / "seda_fast" / library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    torch_symbols = {name for name in wanted if re.match(r"(aoti_)?torch_|_ZN\w*(2at|3c10|5torch|6caffe2)", name)}
    assert len(torch_symbols) > 10
    assert torch_symbols <= shim_functions()
    # The oldest PyTorch that the package admits has them all: what 2.10.0's headers declare and its libraries export.
    oldest = set((Path(__file__).parent / "stable_abi_2_10.txt").read_text(encoding="utf-8").split())
    assert torch_symbols <= oldest


# Macros of the oldest PyTorch that the package admits; STABLE_TORCH_ERROR_CODE_CHECK, for one, came with 2.13.
MACROS = {
    *("STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX"),
    *("TORCH_ABI_VERSION", "TORCH_ERROR_CODE_CHECK"),
}


def operators_sources(repository: Path) -> list[Path]:
    return sorted(file for file in (repository / "csrc").rglob("*") if file.suffix in (".h", ".cpp"))


def test_the_sources_use_the_oldest_pytorch_s_macros_alone(repository: Path) -> None:
    texts = [file.read_text() for file in operators_sources(repository)]
    used = {name for text in texts for name in re.findall(r"\b(?:STABLE_)?TORCH_[A-Z_]+\b", text)}
    assert used == MACROS


def test_the_sources_compile_with_another_pytorch_s_headers(repository: Path, build_module: ModuleType) -> None:
    headers = os.environ.get("SEDA_FAST_OTHER_HEADERS")
    if headers is None or COMPILER is None:
        pytest.skip(
            "test_the_sources_compile_with_another_pytorch_s_headers: SEDA_FAST_OTHER_HEADERS must name the include "
            "folder of another PyTorch"
        )
    flags = [
        "-fsyntax-only",
        *build_module.FLAGS,
        build_module.STANDARD,
        f"-DTORCH_TARGET_VERSION={build_module.TARGET_VERSION}",
    ]
    flags += ["-DUSE_CUDA", "-isystem", headers]
    for source in operators_sources(repository):
        if source.suffix == ".cpp" and source.parent.name in ("cpu", "cuda"):
            done = subprocess.run([COMPILER, *flags, str(source)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{source}: {done.stderr[:1000]}"


def test_the_cuda_library_names_pytorch_s_for_the_loader(compiled_cuda: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("test_the_cuda_library_names_pytorch_s_for_the_loader needs readelf")
    command = ["readelf", "-d", str(compiled_cuda / "seda_fast/libseda_fast_cuda.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Without the second name the stream's symbol is not found; CUDA's own runtime is inside.
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if "cudart" in name]
    assert not list(compiled_cuda.rglob("libtorch_cuda.so"))


def test_what_one_pytorch_built_another_loads(compiled_cuda: Path) -> None:
    python = os.environ.get("SEDA_FAST_OTHER_PYTHON")
    if python is None:
        pytest.skip(
            "test_what_one_pytorch_built_another_loads: SEDA_FAST_OTHER_PYTHON must name a Python with another PyTorch"
        )
    found = probe(compiled_cuda, python)
    assert found["torch"] != torch.__version__
    assert (found["backend"], found["warnings"]) == ("cpp", [])
    assert found["sum"] == pytest.approx(probe(compiled_cuda)["sum"], rel=1e-6)
    assert isinstance(found["cuda"], dict)
    assert found["cuda"]["reason"] in (None, "this PyTorch was built without CUDA")


def info_of(site: Path, before: str = "") -> str:
    """What ``python -m seda_fast.info`` prints in an installed copy, after the statements ``before``; no white space,
    as lines are folded where they are long."""
    code = f"{PROBE.partition('with ')[0]}{before}\nfrom seda_fast import info\nsys.exit(info.main([]))"
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, env=environment, capture_output=True, text=True, check=True
    )
    return "".join(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("libseda_fast_cpu.so", lambda data: data[:1000]),
        ("libseda_fast_cpu.so", lambda data: b"\0" * len(data)),
        ("_build.json", lambda data: data[:100]),
        ("_build.json", lambda data: b"\xff" + data),
        ("_build.json", lambda data: b"[]"),
        ("_build.json", lambda data: b'{"bytes": 3}'),
    ],
    ids=["cut short", "garbled", "report cut short", "report garbled", "report a list", "report of numbers"],
)
def test_a_damaged_file_is_one_warning_with_its_cause(
    compiled: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    file = site / "seda_fast" / name
    file.write_bytes(damage(file.read_bytes()))
    found = probe(site)
    assert found["backend"] == "reference"
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert "runs without its C++ operators" in warning
    assert name in warning
    assert isinstance(found["status"], dict)
    assert found["status"]["reason"] in warning
    assert "".join(found["status"]["reason"].split()) in info_of(site)


def test_a_damaged_report_keeps_the_cuda_library_out_too(compiled: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    (site / "seda_fast/_build.json").write_text("{")
    (site / "seda_fast/libseda_fast_cuda.so").write_bytes(b"not a library")
    script = "import warnings, torch; torch.version.cuda = '13.0'\n" + PROBE
    found = probe(site, script=script)
    assert found["backend"] == "reference"
    assert len(found["warnings"]) == 1  # type: ignore[arg-type]
    assert isinstance(found["cuda"], dict)
    assert "_build.json is damaged" in found["cuda"]["reason"]


def test_a_cuda_library_that_cannot_be_loaded_is_one_warning_and_the_cpu_half_serves(
    compiled: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    library, file = site / "seda_fast/libseda_fast_cuda.so", site / "seda_fast/_build.json"
    library.write_bytes(b"not a library")
    report = json.loads(file.read_text())
    report["bytes"][library.name] = library.stat().st_size
    del report["missing"]["cuda"]
    file.write_text(json.dumps(report))
    before = "import torch; torch.version.cuda = '13.0'"
    found = probe(site, script=f"{before}\n{PROBE}")
    assert found["backend"] == "cpp"
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert "runs without its CUDA C++ operators" in warning
    assert isinstance(found["cuda"], dict)
    assert not found["cuda"]["available"]
    assert "it cannot be loaded: " in found["cuda"]["reason"]
    assert library.name in found["cuda"]["reason"]
    assert found["cuda"]["reason"] in warning
    assert "".join(found["cuda"]["reason"].split()) in info_of(site, before)


BUILT = (f"_C{EXTENSION_SUFFIXES[0]}", "libseda_fast_cpu.so", "libseda_fast_cuda.so", "_build.json")


@pytest.fixture
def built_before(checkout: Path, tmp_path: Path) -> Path:
    """A checkout in which an earlier editable install left a CPU and a CUDA library."""
    folder = tmp_path / "built before"
    shutil.copytree(checkout, folder)
    for name in BUILT:
        (folder / "seda_fast" / name).write_text('{"cuda": {"compiler": "an earlier build"}}')
    return folder


def package(
    checkout: Path, what: str, out: Path, settings: dict[str, str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One hook of setuptools, "sdist", "wheel" or "editable", as pip calls it."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r}, {settings!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=os.environ | environment, capture_output=True, text=True
    )


def test_no_archive_takes_what_an_earlier_build_left_in_the_checkout(built_before: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for what in ("sdist", "wheel"):
        done = package(built_before, what, out, SEDA_FAST_BUILD="none")
        assert done.returncode == 0, done.stderr[-2000:]
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [Path(name).name for name in archive.getnames()]
    site = unpack(out)
    names += [file.name for file in site.rglob("*")]
    assert "__init__.py" in names
    assert not set(BUILT) & set(names)
    assert "anearlierbuild" not in info_of(site)


@pytest.fixture
def fake_compiler(tmp_path: Path) -> Path:
    """In place of g++ and nvcc: tells a version and writes an empty file where it should compile or link."""
    script = tmp_path / "fake compiler"
    script.write_text(
        """#!/bin/sh
        case "$1" in --version|--list-gpu-arch) echo release 1; echo compute_80; exit;; esac
        while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
        """
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("mode", "made"),
    [
        ("cpu", BUILT[:2]),
        ("cuda", BUILT[:3]),
        ("auto", BUILT[:3]),
        ("none", ()),
        ("auto without a compiler", ()),
    ],
)
def test_an_editable_install_leaves_nothing_of_an_earlier_one(
    built_before: Path, tmp_path: Path, fake_compiler: Path, mode: str, made: tuple[str, ...]
) -> None:
    mode, _, without = mode.partition(" ")
    tools = {"CXX": "no-such-compiler" if without else f"'{fake_compiler}'", "NVCC": str(fake_compiler)}
    done = package(built_before, "editable", tmp_path, SEDA_FAST_BUILD=mode, **tools)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: (built_before / "seda_fast" / name) for name in BUILT}
    assert [name for name in BUILT[:3] if found[name].exists()] == list(made)
    assert all("earlier" not in file.read_text() for file in found.values() if file.exists())
    assert found["_build.json"].exists() == (mode != "none")


@pytest.mark.parametrize(
    ("mode", "made"),
    [("cpu", BUILT[:2]), ("cuda", BUILT[:3]), ("auto", BUILT[:3]), ("auto without a compiler", ())],
)
def test_a_strict_editable_install_links_to_all_that_was_built(
    checkout: Path, tmp_path: Path, fake_compiler: Path, mode: str, made: tuple[str, ...]
) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    mode, _, without = mode.partition(" ")
    tools = {"CXX": "no-such-compiler" if without else f"'{fake_compiler}'", "NVCC": str(fake_compiler)}
    done = package(folder, "editable", tmp_path, {"editable_mode": "strict"}, SEDA_FAST_BUILD=mode, **tools)
    assert done.returncode == 0, done.stderr[-2000:]
    (tree,) = (folder / "build").glob("__editable__*/seda_fast")
    assert (tree / "__init__.py").samefile(folder / "seda_fast/__init__.py")
    assert [name for name in BUILT if (tree / name).exists()] == [*made, "_build.json"]
    for name in (*made, "_build.json"):
        assert (tree / name).samefile(folder / "seda_fast" / name)


@pytest.mark.parametrize("report", ["whole", "damaged", "of another kind"])
def test_the_module_of_another_python_stays_of_the_build(
    checkout: Path, tmp_path: Path, fake_compiler: Path, report: str
) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    package_folder = folder / "seda_fast"
    kept, cut, gone = (f"_C.cpython-{version}-x86_64-linux-gnu.so" for version in (399, 398, 397))
    for name in (kept, cut):
        (package_folder / name).write_text("seven b")
    sizes = {kept: 7, cut: 8, gone: 7, BUILT[0]: 7, "libseda_fast_cpu.so": 7, "libseda_fast_cuda.so": 7}
    told = {"whole": json.dumps({"bytes": sizes}), "damaged": "{", "of another kind": "[]"}
    (package_folder / "_build.json").write_text(told[report])
    done = package(folder, "editable", tmp_path, SEDA_FAST_BUILD="cpu", CXX=f"'{fake_compiler}'")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((package_folder / "_build.json").read_text())
    expected = {BUILT[0]: 0, "libseda_fast_cpu.so": 0}
    assert found["bytes"] == expected | ({kept: 7} if report == "whole" else {})
    assert found["libraries"] == ["libseda_fast_cpu.so"]


def test_a_module_of_an_earlier_build_serves_beside_the_libraries_of_the_last(compiled: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    file = site / "seda_fast/_build.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"compiler": "a later one"}))
    found = probe(site)
    assert (found["backend"], found["warnings"]) == ("cpp", [])
    assert "a later one" in str(found["status"])


def test_a_library_that_the_report_does_not_list_is_not_loaded(compiled: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(compiled, site)
    file = site / "seda_fast/_build.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"missing": {"cpu": "no C++ compiler was found", "cuda": "nor that"}}))
    found = probe(site)
    assert (found["backend"], found["warnings"]) == ("reference", [])
    assert "it was not built: no C++ compiler was found" in str(found["status"])
    del whole["bytes"]["libseda_fast_cpu.so"]
    file.write_text(json.dumps(whole))
    found = probe(site)
    assert found["backend"] == "reference"
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert "libseda_fast_cpu.so is not of the build that _build.json beside it tells of" in warning
    # The same of the CUDA library, where PyTorch has CUDA.
    whole["missing"] = {}
    file.write_text(json.dumps(whole))
    (site / "seda_fast/libseda_fast_cuda.so").write_bytes(b"of an earlier build")
    found = probe(site, script="import torch; torch.version.cuda = '13.0'\n" + PROBE)
    assert "libseda_fast_cuda.so is not of the build" in str(found["cuda"])


def test_none_builds_a_pure_wheel(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, tmp_path, SEDA_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [wheel.name.partition("-py3-")[2] for wheel in tmp_path.glob("*.whl")] == ["none-any.whl"]
    found = probe(unpack(tmp_path))
    assert (found["backend"], found["warnings"]) == ("reference", [])


def test_without_a_compiler_the_install_is_pure_with_one_warning(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.findall(r"UserWarning: (seda_fast is installed without .*)", done.stdout + done.stderr)
    assert len(said) == 1
    assert "no C++ compiler was found (looked for no-such-compiler)" in said[0]
    found = probe(unpack(tmp_path))
    assert (found["backend"], found["warnings"]) == ("reference", [])
    assert "no C++ compiler was found" in str(found["status"])


def test_cpu_mode_without_a_compiler_fails_with_the_reason(checkout: Path, tmp_path: Path) -> None:
    done = build(checkout, tmp_path, SEDA_FAST_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "SEDA_FAST_BUILD=cpu: no C++ compiler was found" in done.stdout + done.stderr


def test_an_unknown_mode_fails_with_the_known_ones(build_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEDA_FAST_BUILD", "gpu")
    with pytest.raises(SystemExit, match=r"SEDA_FAST_BUILD must be one of auto, .*, not 'gpu'"):
        build_module.build_mode()


def test_torch_is_found_without_importing_it_and_an_old_one_is_refused(
    build_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build_module.find_torch() == TORCH
    old = tmp_path / "torch"
    (old / "include/torch/csrc/stable").mkdir(parents=True)
    (old / "include/torch/csrc/stable/library.h").touch()
    (old / "version.py").write_text("__version__ = '2.9.1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(build_module.CannotBuildError, match=r"PyTorch 2\.9\.1 is older than 2\.10"):
        build_module.find_torch()
    monkeypatch.setattr(sys, "path", [])
    user = build_module.sysconfig.get_preferred_scheme("user")
    monkeypatch.setattr(build_module.sysconfig, "get_path", lambda part, scheme: "/")
    with pytest.raises(build_module.CannotBuildError, match="headers were not found"):
        build_module.find_torch()
    # A user's own packages, which pip's isolated builds do not see.
    (old / "version.py").write_text("__version__ = '2.11.0'\n")
    own = {user: str(tmp_path)}
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(build_module.sysconfig, "get_path", lambda part, scheme: own.get(scheme, "/"))
    assert build_module.find_torch() == old
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    with pytest.raises(build_module.CannotBuildError, match="headers were not found"):
        build_module.find_torch()


@pytest.mark.parametrize("where", ["base", "user"])
def test_a_virtual_environment_that_sees_the_base_s_packages_builds_against_its_torch(
    build_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    torch_folder = tmp_path / where / "torch"
    (torch_folder / "include/torch/csrc/stable").mkdir(parents=True)
    (torch_folder / "include/torch/csrc/stable/library.h").touch()
    (torch_folder / "version.py").write_text("__version__ = '2.11.0'\n")
    user = build_module.sysconfig.get_preferred_scheme("user")
    own = {user: str(tmp_path / "user")}
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setattr(build_module.sysconfig, "get_path", lambda part, scheme: own.get(scheme, "/"))
    base = {sys.base_prefix: str(tmp_path / "base")}
    monkeypatch.setattr("site.getsitepackages", lambda prefixes: [base[prefix] for prefix in prefixes])
    (tmp_path / "environment").mkdir()
    for text in (None, "include-system-site-packages = false\n", "home = /usr\n"):
        if text is not None:
            (tmp_path / "environment/pyvenv.cfg").write_text(text)
        with pytest.raises(build_module.CannotBuildError, match="headers were not found"):
            build_module.find_torch()
    (tmp_path / "environment/pyvenv.cfg").write_text("home = /usr\nInclude-System-Site-Packages = True\n")
    assert build_module.find_torch() == torch_folder


def test_jobs_are_bounded_by_memory(build_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    for free, expected in ((100 * 2**30, 3), (3 * 2**30, 2), (2**20, 1), (-5, 1), (None, 3)):
        monkeypatch.setattr(build_module, "free_memory", lambda free=free: free)
        assert build_module.jobs() == expected


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max\n", "5\n", 3 * 2**30), ("9000\n", "2000\n", 7000), (None, None, 3 * 2**30)]
)
def test_the_memory_of_a_container_counts(
    build_module: ModuleType, tmp_path: Path, limit: str | None, used: str | None, free: int
) -> None:
    for name, text in (
        ("proc/meminfo", f"MemAvailable:   {3 * 2**20} kB\n"),
        ("sys/fs/cgroup/memory.max", limit),
        ("sys/fs/cgroup/memory.current", used),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    assert build_module.free_memory(tmp_path) == free
    assert build_module.free_memory(tmp_path / "nothing") is None
