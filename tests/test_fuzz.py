"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer with random arguments: refused or right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

# Runs under the sanitizers: any report of theirs ends the process. A refusal must be a Python error that names one of
# the operator's arguments; a call that is not refused must return tensors.
FUZZ = r'''
import json, random, sys, torch
torch.ops.load_library(sys.argv[1])
rng = random.Random(int(sys.argv[3]))
torch.manual_seed(0)
cpp = torch.ops.seda_fast_cpp
SIZES = (0, 1, 2, 3, 5, 16, 17, 33, 40)


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
    if kind == 8:
        return t.to(torch.bfloat16) if t.is_floating_point() else t + rng.choice((-7, 10**6, 2**40))
    if kind == 9 and t.is_floating_point():
        return t * rng.choice((1e30, float("inf"), float("nan"), 0.0))
    if kind == 10:
        return t.to("meta")
    return t


def value(name, kind):
    """An argument by the kind that its schema gives: right in most cases."""
    if kind == "float":
        return rng.choice((0.1, 0.1, 0.1, 0.5, 0.999999, 0.0, 1.0, -1.0, float("nan"), 1e300))
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "int":
        usual = {"stream": (6, 6, 6, 6, 0, 255, 256, -1), "first_class": (0, 0, 0, 0, 0, 1, -1, 2**62),
                 "classes": (K, K, K, K, K, 0, -5, 2**62)}
        return rng.choice(usual.get(name, (0, 2, -100, 2**63 - 1)))
    shapes = {
        "x0": (B, D), "h": (B, D), "grad": (B, D), "grad_z": (B, D), "residual": (B, D), "pre": (B, D), "gate": (B, D),
        "grad_hidden": (B, D), "features": (B, D), "grad_features": (B, D), "centres": (K, D), "logits": (B, K),
        "shift": (T, D), "scale": (T, D), "alpha": (T, D), "signal": (T,), "noise": (T,), "state": (B, 4),
        "log_normaliser": (B,), "initial": (B, D), "source": (B, D), "condition": (B, C), "coefficients": (S, 5),
        "modulation": (S, L, 3, W), "w_x": (W, D), "b_x": (W,), "w_c": (W, C), "b_c": (W,), "w_g": (L * M, W),
        "b_g": (L * M,), "w_y": (D, W), "b_y": (D,), "w_h": (M, W), "b_h": (M,), "w_o": (W, M), "b_o": (W,),
    }
    if name in ("seed", "step"):
        return odd(torch.tensor(rng.choice((0, 3, -(2**63), 2**63 - 1))))
    if name == "words":
        return odd(torch.randint(0, 2**24, (B, 2), dtype=torch.int32))
    if name in ("timesteps", "labels", "sample_ids"):
        high = {"timesteps": T, "labels": K, "sample_ids": 2**55}[name]
        return odd(torch.randint(0, max(high, 1), (B,)))
    t = torch.randn(shapes[name])
    if STORAGE is not torch.float32 and name not in TABLES:
        t = t.to(STORAGE)
    if kind == "Tensor[]":
        return [odd(t.clone()) for _ in range(rng.choice((L,) * 20 + (0, L + 1)))]
    return odd(t)


TABLES = {"shift", "scale", "alpha", "signal", "noise", "state", "log_normaliser", "coefficients", "modulation",
          "grad_features", "b_x", "b_c", "b_g", "b_h", "b_o", "b_y"}
names = sys.argv[4:]
served = dict.fromkeys(names, 0)
refused = 0
for _ in range(int(sys.argv[2])):
    B, D, K, T, C, W, M = (rng.choice(SIZES) for _ in range(7))
    S, L = rng.choice((0, 1, 3)), rng.choice((1, 2))
    STORAGE = rng.choice((torch.float32, torch.bfloat16))
    op = getattr(cpp, rng.choice(names)).default
    arguments = op._schema.arguments
    ODDS = 12 * len(arguments)  # about one odd argument a call
    given = [value(a.name, str(a.type).replace("List[Tensor]", "Tensor[]")) if str(a.type) != "Optional[Tensor]"
             else (None if rng.random() < 0.3 else value(a.name, "Tensor")) for a in arguments]
    try:
        results = op(*given)
        served[op._schema.name.partition("::")[2]] += 1
    except (RuntimeError, NotImplementedError) as error:
        refused += 1
        known = [a.name for a in arguments] + ["columns", "meta", "Meta", "columns do not fit", "hold one tensor"]
        assert any(word in str(error) for word in known), f"{op}: {error}"
    else:
        for result in results if isinstance(results, tuple) else [results]:
            assert result is None or isinstance(result, torch.Tensor)
print(json.dumps([served, refused]))
'''


@pytest.fixture(scope="module")
def sanitized(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators' library, compiled with both sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("ninja") is None:
        pytest.skip("tests/test_fuzz.py needs g++ and ninja")
    sys.path.insert(0, str(repository / "csrc"))
    try:
        import seda_fast_build
    finally:
        sys.path.remove(str(repository / "csrc"))
    folder = tmp_path_factory.mktemp("sanitized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all")
        patch.setenv("LDFLAGS", "-fsanitize=address,undefined -Wl,-z,undefs")
        target = seda_fast_build.cpu_target(Path(torch.__file__).parent)
        (folder / "build.ninja").write_text(seda_fast_build.ninja_file(compiler, [target]))
    subprocess.run([seda_fast_build.find_ninja()], cwd=folder, check=True, capture_output=True, timeout=500)
    return folder / target.output


def test_random_arguments_are_refused_by_name_or_served(sanitized: Path, tmp_path: Path, seed: int) -> None:
    names = sorted(set(operators()))
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    script = tmp_path / "fuzz.py"
    script.write_text(FUZZ)
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        # Python and PyTorch leave memory to the end of the process; that is not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(sanitized), "2000", str(seed), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]
    served, refused = json.loads(done.stdout)
    assert sum(served.values()) + refused == 2000
    assert refused > 400
    assert min(served.values()) > 5, f"some operators saw too few arguments that fit: {served}"


def operators() -> tuple[str, ...]:
    """Names of all C++ operators, read from the sources that register them."""
    sources = (Path(__file__).resolve().parents[1] / "csrc/cpu").glob("*.cpp")
    return tuple(name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text()))
