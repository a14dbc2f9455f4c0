"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer with random arguments: refused or right."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from seda_fast.ops import cpp_status

pytestmark = pytest.mark.slow


def cpu_features() -> dict[str, bool]:
    """Instruction sets that the row kernels have code for, and whether this CPU has each."""
    known: dict[str, bool] = cpp_status().get("cpu_features", {"baseline": True})
    return known


class Library(NamedTuple):
    """One half's operators, "cpp" or "cuda", and where they lie."""

    half: str
    file: Path


# Runs under the sanitizers: any report of theirs ends the process. A refusal must be a Python error that names one of
# the operator's arguments; a call that is not refused must return tensors.
FUZZ = r'''
import json, random, re, sys, tempfile, torch
torch.ops.load_library(sys.argv[1])
rng = random.Random(int(sys.argv[3]))
torch.manual_seed(0)
half = sys.argv[4]
ops = getattr(torch.ops, "seda_fast_" + half)
SIZES = (0, 1, 2, 3, 5, 16, 17, 33, 40)
FILE = tempfile.TemporaryFile()
FILE.write(bytes(2000))
FILE.flush()


def odd(t):
    """The tensor, or something near it that the operator should refuse or read through its strides."""
    kind = rng.randrange(ODDS)
    if kind == 0:
        return t.double() if t.is_floating_point() else t.int()
    if kind == 1:
        return t.unsqueeze(0)
    if kind == 2 and t.dim():
        return t[: t.shape[0] // 2]
    if kind == 3 and t.dim() == 2:
        return t.t().contiguous().t()
    if kind == 4 and t.dim():
        return torch.cat((t, t[:1]))
    if kind == 5 and t.dim() == 2:
        return torch.stack((t, t), 1)[:, 1]
    if kind == 6 and t.dim() and t.shape[0]:
        return t[:1].expand(t.shape)
    if kind == 7 and t.numel():
        raw = torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8).numpy().data
        return torch.frombuffer(raw, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    if kind == 8 and t.dtype == torch.uint8:
        return t.int()
    if kind == 8:
        return t.to(torch.bfloat16) if t.is_floating_point() else t + rng.choice((-7, 10**6, 2**40))
    if kind == 9 and t.is_floating_point():
        return t * rng.choice((1e30, float("inf"), float("nan"), 0.0))
    if kind == 10:
        return t.to("meta")
    if kind == 11 and t.numel():
        freed = t.clone()
        freed.untyped_storage().resize_(0)
        return freed
    if kind == 12 and t.numel():
        # At a multiple of the elements' size, not of what a kernel reads at a time.
        raw = torch.zeros(t.numel() + 1, dtype=t.dtype)
        return raw[1:].view(t.shape).copy_(t)
    if kind == 13 and t.dim():
        return t.to_sparse()
    return t


def value(name, kind):
    """An argument by the kind that its schema gives: right in most cases."""
    if kind == "float":
        return rng.choice((0.1, 0.1, 0.1, 0.5, 0.999999, 0.0, 1.0, -1.0, float("nan"), 1e300))
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "int":
        usual = {"stream": (6, 6, 6, 6, 0, 255, 256, -1), "first_class": (0, 0, 0, 0, 0, 1, -1, 2**62),
                 "classes": (K, K, K, K, K, 0, -5, 2**62, -(2**63)), "threads": (1, 1, 2, 3, 7, 0, 65, -1),
                 "file": (FILE.fileno(),) * 8 + (-1, 10**6, 2**40), "start": (0, 0, 0, 128, 1999, -1, 2**63 - 1),
                 # Of chain_fits and chain_splits.
                 **dict.fromkeys(("dim", "condition_dim", "width", "hidden", "blocks", "steps"), (64, 1, 0, -1, 2**62)),
                 "rows": (1, 16, 128, 0, -1, 2**62)}
        return rng.choice(usual.get(name, (0, 2, -100, 2**63 - 1)))
    shapes = {
        "x0": (B, D), "h": (B, D), "grad": (B, D), "grad_z": (B, D), "residual": (B, D), "pre": (B, D), "gate": (B, D),
        "grad_hidden": (B, D), "features": (B, D), "grad_features": (B, D), "centres": (K, D), "logits": (B, K),
        "shift": (T, D), "scale": (T, D), "alpha": (T, D), "signal": (T,), "noise": (T,), "state": (B, 4),
        "log_normaliser": (B,), "initial": (B, D), "source": (B, D), "condition": (B, C), "coefficients": (S, 5),
        "modulation": (S if CHAIN else T, L, 3, W), "x": (B, D), "prediction": (B, D),
        "norm": (), "w_x": (W, D), "b_x": (W,), "w_c": (W, C), "b_c": (W,), "w_g": (L * M, W),
        "left": (B, C), "right": (C, D), "bias": (D,), "out": (B, D),
        "b_g": (L * M,), "w_y": (D, W), "b_y": (D,), "w_h": (M, W), "b_h": (M,), "w_o": (W, M), "b_o": (W,),
    }
    if kind == "Tensor[]":
        return optimised(name) if UPDATE else many(name)
    if name in ("seed", "step"):
        return odd(torch.tensor(rng.choice((0, 3, -(2**63), 2**63 - 1))))
    if name == "rows":
        return odd(torch.randint(0, 50, (B,)))
    if name == "target":
        return odd(torch.zeros(B, D, dtype=torch.uint8))
    if name == "words":
        return odd(torch.randint(0, 2**24, (B, 2), dtype=torch.int32))
    if name in ("timesteps", "labels", "sample_ids"):
        high = {"timesteps": T, "labels": K, "sample_ids": 2**55}[name]
        return odd(torch.randint(0, max(high, 1), (B,)))
    return odd(drawn(shapes[name], name))


def drawn(shape, name):
    t = torch.randn(shape)
    return t if name in TABLES else t.to(STORAGE)


def optimised(name):
    """A list of the optimiser's: like the weights, which are of any shape."""
    shapes = [(D,), (B, D), ()] if name != "steps" else [()] * 3
    return [odd(drawn(shape, "state")) for shape in shapes[: rng.choice((3,) * 20 + (2, 0))]]


def many(name):
    """A list of tensors: a network's weights, its condition in two parts, what it keeps, its gradients."""
    per_block = {"w_h": (M, W), "b_h": (M,), "w_o": (W, M), "b_o": (W,)}
    if name in per_block:
        return [odd(drawn(per_block[name], name)) for _ in range(rng.choice((L,) * 20 + (0, L + 1)))]
    widths = ((C // 2, C - C // 2),) * 9 + ((), (C, 1))
    conditions = [(B, c) for c in (WIDTHS if rng.random() < 0.95 else rng.choice(widths))]
    if name == "conditions":
        return [odd(drawn(shape, name)) for shape in conditions]
    if name == "saved":
        shapes = [(B, W), (B, W), (B, L * M), (L * B, M), (L * B, M), (L * B, W), ((L + 1) * B, W), ((L + 1) * B, W)]
        return [odd(drawn(shape, name)) for shape in shapes[: rng.choice((8,) * 20 + (7, 0))]]
    wide = [(B, D), (W, D), (W, C), (L * M, W), (D, W)]
    if rng.random() < 0.5:
        wide[0] = (0,)
    narrow = [(T, L, 3, W), (W,), (W,), (L * M,), (D,)]
    # In the operator's order: x, modulation, then each weight and its bias.
    grads = [t for a, b in zip(wide, narrow) for t in (drawn(a, "x"), drawn(b, "b_x"))]
    grads += [drawn(per_block[k], k) for k in per_block for _ in range(L)]
    grads += [drawn((0,) if rng.random() < 0.3 else shape, "x") for shape in conditions]
    return [odd(t) for t in grads][: len(grads) - rng.choice((0,) * 20 + (1,))]


TABLES = {"shift", "scale", "alpha", "signal", "noise", "state", "log_normaliser", "coefficients", "modulation",
          "grad_features", "norm"} | ({"b_x", "b_c", "b_g", "b_h", "b_o", "b_y"} if half == "cpp" else set())
names = sys.argv[5:]
served = dict.fromkeys(names, 0)


def call(op, given):
    """Without a GPU the kernel that is registered for CUDA takes tensors of the CPU (tests/cuda/host.cpp)."""
    if half == "cpp" or not any(isinstance(g, torch.Tensor) for g in given):
        return op(*given)
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *given)


refused = 0
for _ in range(int(sys.argv[2])):
    B, D, K, T, C, W, M = (rng.choice(SIZES) for _ in range(7))
    S, L = rng.choice((0, 1, 3)), rng.choice((1, 2))
    STORAGE = rng.choice((torch.float32, torch.bfloat16))
    op = getattr(ops, rng.choice(names)).default
    arguments = op._schema.arguments
    UPDATE = op._schema.name.endswith(("gradient_norm", "weight_update"))
    if op._schema.name.endswith("matrix_product"):
        # Left operands of several panels, sums of more than a part, float32 alone.
        C, STORAGE = rng.choice((*SIZES, 513)), torch.float32
    CHAIN, WIDTHS = "coefficients" in [a.name for a in arguments], (C // 2, C - C // 2)
    if CHAIN and half == "cuda":
        # The kernel's own sizes, mostly.
        D, C = (rng.choice((8, 8, 40, 64, 64, 7, 0)) for _ in range(2))
        W, M = (rng.choice((64, 64, 128, 128, 192, 40)) for _ in range(2))
        S, STORAGE = rng.choice((1, 3)), torch.bfloat16
        if rng.random() < 0.9:
            D, C, W, M = (max(64, n // 64 * 64) for n in (D, C, W, M))
    lists = sum(str(a.type) == "List[Tensor]" for a in arguments)
    ODDS = 15 * (len(arguments) + 6 * lists)  # about one odd argument a call
    given = [value(a.name, str(a.type).replace("List[Tensor]", "Tensor[]")) if str(a.type) != "Optional[Tensor]"
             else (None if rng.random() < 0.3 else value(a.name, "Tensor")) for a in arguments]
    try:
        results = call(op, given)
        served[op._schema.name.partition("::")[2]] += 1
    except (RuntimeError, NotImplementedError) as error:
        refused += 1
        # Whole words: a name of one letter is part of nearly every sentence.
        named = any(re.search(rf"\b{re.escape(a.name)}\b", str(error)) for a in arguments)
        assert named, f"{op}: {error}"
    else:
        for result in results if isinstance(results, tuple) else [results]:
            assert result is None or isinstance(result, (torch.Tensor, bool, int))
print(json.dumps([served, refused]))
'''


def _build_module(repository: Path) -> ModuleType:
    sys.path.insert(0, str(repository / "csrc"))
    try:
        return importlib.import_module("seda_fast_build")
    finally:
        sys.path.remove(str(repository / "csrc"))


@pytest.fixture(scope="module", params=["cpp", "cuda"])
def sanitized(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """One half's operators, compiled with both sanitizers; of the CUDA half what runs on the host."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("ninja") is None:
        pytest.skip("tests/test_fuzz.py needs g++ and ninja")
    build, half = _build_module(repository), request.param
    folder = tmp_path_factory.mktemp("sanitized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all")
        patch.setenv("LDFLAGS", "-fsanitize=address,undefined -Wl,-z,undefs")
        target = build.cpu_target(Path(torch.__file__).parent)
        if half == "cuda":
            flags = (*target.sources[0][2], "-DUSE_CUDA", f"-I{repository / 'csrc/cuda'}")
            files = [*sorted((repository / "csrc/cuda").glob("*.cpp")), repository / "tests/cuda/host.cpp"]
            target.sources = [(file, f"{file.stem}.o", flags) for file in files]
            target.link = (*target.link, "-Wl,-Bsymbolic")
        (folder / "build.ninja").write_text(build.ninja_file(compiler, [target]))
    subprocess.run([build.find_ninja()], cwd=folder, check=True, capture_output=True, timeout=900)
    return Library(half, folder / target.output)


def fuzz(sanitized: Library, folder: Path, calls: int, seed: int, **variables: str) -> tuple[dict[str, int], int]:
    """So many calls under the sanitizers: how many each operator served, and how many were refused."""
    names = sorted(set(operators(sanitized.half)))
    told = watched(sanitized, folder, FUZZ, str(calls), str(seed), sanitized.half, *names, **variables)
    served, refused = json.loads(told)
    assert sum(served.values()) + refused == calls
    assert refused > calls // 5
    return served, refused


def watched(sanitized: Library, folder: Path, script: str, *arguments: str, **variables: str) -> str:
    """What a script prints that runs under the sanitizers, with the library and the arguments told to it."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    file = folder / "script.py"
    file.write_text(script)
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        # Python and PyTorch leave memory to the end of the process; that is not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, str(file), str(sanitized.file), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]
    return done.stdout


def test_random_arguments_are_refused_by_name_or_served(sanitized: Library, tmp_path: Path, seed: int) -> None:
    served, _ = fuzz(sanitized, tmp_path, 2000, seed)
    assert min(served.values()) > 5, f"some operators saw too few arguments that fit: {served}"


@pytest.mark.parametrize("sanitized", ["cpp"], indirect=True)
@pytest.mark.parametrize("instruction_set", [name for name, has in cpu_features().items() if has])
def test_every_instruction_set_s_kernels_stay_inside_their_operands(
    sanitized: Library, tmp_path: Path, seed: int, instruction_set: str
) -> None:
    served, _ = fuzz(sanitized, tmp_path, 600, seed, SEDA_FAST_CPU_ISA=instruction_set)
    assert sum(served.values()) > 100


@pytest.mark.parametrize("sanitized", ["cpp"], indirect=True)
def test_the_instruction_set_that_is_named_is_the_one_that_runs(sanitized: Library, tmp_path: Path, seed: int) -> None:
    with pytest.raises(AssertionError, match="SEDA_FAST_CPU_ISA=mmx is not one of"):
        fuzz(sanitized, tmp_path, 50, seed, SEDA_FAST_CPU_ISA="mmx")


# Sizes of a chain by the letters that FUZZ gives them; prints what the operator says of them, "" where it serves them.
CHAIN = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
size = dict(B=2, D=64, C=64, W=64, M=64, L=1, S=1) | json.loads(sys.argv[2])
B, D, C, W, M, L, S = size.values()
ones, half = torch.ones, torch.bfloat16
rows = [ones(B, n, dtype=half) for n in (D, D, C)]
w_x, w_c, w_g, w_h, w_o, w_y = (ones(n, m, dtype=half) for n, m in ((W, D), (W, C), (L * M, W), (M, W), (W, M), (D, W)))
b_x, b_c, b_g, b_h, b_o, b_y = (ones(len(w), dtype=half) for w in (w_x, w_c, w_g, w_h, w_o, w_y))
network = w_x, b_x, w_c, b_c, w_g, b_g, [w_h] * L, [b_h] * L, [w_o] * L, [b_o] * L, w_y, b_y
key = torch.tensor(1), torch.tensor(2), torch.arange(B), 6, True
said = ""
try:
    torch.ops.seda_fast_cuda.reverse_chain.default.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *rows, ones(S, 5), ones(S, L, 3, W), *network, *key
    )
except RuntimeError as error:
    said = str(error)
print(json.dumps(said))
"""


@pytest.mark.parametrize("sanitized", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({}, ""),
        ({"B": 0, "D": 8, "C": 8, "W": 1024}, ""),
        ({"D": 12}, "initial must have a positive multiple of 8 columns, not 12"),
        ({"D": 0}, "initial must have a positive multiple of 8 columns, not 0"),
        ({"C": 12}, "condition must have a positive multiple of 8 columns, not 12"),
        ({"W": 96}, "w_x must have a positive multiple of 64 rows, not 96"),
        ({"W": 1088}, "w_x must have at most 1024 rows, not 1088"),
        ({"M": 40, "L": 3}, "w_h[0] must have a positive multiple of 64 rows, not 40"),
        ({"S": 0}, "coefficients must have at least one row"),
        ({"L": 33}, "w_h must hold at most 32 tensors"),
    ],
    ids=str,
)
def test_sizes_that_no_chain_s_kernel_has_are_refused_by_their_argument(
    sanitized: Library, tmp_path: Path, sizes: dict[str, int], sentence: str
) -> None:
    said = json.loads(watched(sanitized, tmp_path, CHAIN, json.dumps(sizes)))
    assert said.partition("\n")[0] == sentence


def operators(half: str) -> tuple[str, ...]:
    """Names of all operators of one half, read from the sources that register them."""
    folder = {"cpp": "csrc/cpu", "cuda": "csrc/cuda"}[half]
    sources = (Path(__file__).resolve().parents[1] / folder).glob("*.cpp")
    return tuple(name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text()))
