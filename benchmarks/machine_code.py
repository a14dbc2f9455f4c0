"""Compile every Triton kernel to machine code, without a GPU, and read what came out.

    python benchmarks/machine_code.py [--targets 80 90 100] [--json FILE] [--table FILE]

The kernels are compiled as the operations launch them for the default model: their launches are recorded on tensors
without data, tile sizes and all. Read from the code: the instructions of tensor cores, the width of global accesses,
registers, spilled bytes, shared memory. TRITON_INTERPRET must not be set.
"""

import argparse
import ast
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
# Found in the checkout that this file lies in.
from seda_fast.kernels import (  # noqa: E402
    interaction,
    interaction_network,
    noising,
    projection,
    reverse_chain,
    timesteps,
    tuning,
)
from seda_fast.kernels.tuning import Tile  # noqa: E402

TARGETS = (80, 90, 100)
# The default model: features, width, hidden, timesteps, rows of a batch; classes of a large head.
FEATURES, WIDTH, HIDDEN, STEPS, ROWS, CLASSES, LARGE = 768, 512, 1024, 1000, 16_384, 1000, 21_841
# Features of a text, blocks of a network, steps of a chain.
TEXT, BLOCKS, CHAIN = 384, 3, 3
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments' types, which are divisible by 16, its constants and options.

    ``tiles`` are those that its tile was chosen from, where there was a choice.
    """

    kernel: Any
    signature: dict[str, str]
    divisible: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, int]
    tiles: tuple[Tile, ...] = ()

    def runs_on(self, target: int) -> bool:
        """Whether compute capability ``target / 10`` launches it: with descriptors 9.0 alone does."""
        return target == 90 or not any(kind.startswith("tensordesc") for kind in self.signature.values())


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel for one target holds."""

    kernel: str
    dtype: str
    target: str
    tensor_core: str
    descriptors: int
    loads_16_bytes: int
    stores_16_bytes: int
    atomics: int
    double_precision: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    tile: str
    instructions_per_element: float


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call`` makes, none of which runs, each with the tiles that it was chosen from."""
    launches: list[Launch] = []
    offered: tuple[Tile, ...] = ()

    def run(kernel: Any, *arguments: Any, grid: object, warmup: bool, **keywords: Any) -> None:
        launch = as_launch(kernel, arguments, keywords)
        chosen = [tile for tile in offered if tile.sizes().items() <= launch.constants.items()]
        launches.append(replace(launch, tiles=offered if chosen else ()))

    def candidates(*arguments: Any, **keywords: Any) -> tuple[Tile, ...]:
        nonlocal offered
        offered = offer(*arguments, **keywords)
        return offered

    before, offer = triton.JITFunction.run, tuning.candidates
    triton.JITFunction.run, tuning.candidates = run, candidates
    try:
        call()
    finally:
        triton.JITFunction.run, tuning.candidates = before, offer
    return launches


def as_launch(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
    """Specialise as Triton does: an integer 1 becomes a constant, and divisibility by 16 is known to the compiler."""
    names = kernel.arg_names
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    given = dict(zip(names, arguments, strict=False)) | keywords
    signature, divisible, constants = {}, [], {}
    for place, name in enumerate(names):
        value = given[name]
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(place)
        elif kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(place)
    return Launch(kernel, signature, tuple(divisible), constants, options)


def compiled(launch: Launch, target: int) -> Any:
    """Triton's compilation result for compute capability ``target / 10``."""
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and spilled bytes, as ptxas tells when it assembles ``ptx``."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None, "PTX names no target"
    tool = triton.knobs.nvidia.ptxas_blackwell if "sm_10" in architecture[1] else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={architecture[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.findall(r"Used (\d+) registers", said)[-1]), spills


def instructions(cubin: bytes) -> int:
    """Instructions of the kernel's machine code, without the padding after its end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", said)
    return sum(name not in ("NOP", "BRA") for name in found)


def per_element(launch: Launch, result: Any) -> float:
    """Machine instructions for each element that noising writes; 0 for other kernels, whose loops a count misses."""
    if launch.kernel.__name__ != "noising_kernel":
        return 0.0
    elements = launch.constants["BLOCK_ROWS"] * launch.constants["BLOCK_FEATURES"]
    return round(instructions(result.asm["cubin"]) * 32 * result.metadata.num_warps / elements, 1)


def read(launch: Launch, target: int) -> Report:
    """Compile and read one launch."""
    result = compiled(launch, target)
    ptx = result.asm["ptx"]
    registers, spilled = resources(ptx)
    products = sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx)))
    sizes = [str(launch.constants[name]) for name in launch.kernel.arg_names if name.startswith("BLOCK")]
    kinds = [kind for kind in launch.signature.values() if kind in ("*bf16", "*fp16", "*fp32")]
    if launch.constants.get("PRECISION") == "tf32":
        kinds = ["*tf32"]
    return Report(
        kernel=launch.kernel.__name__,
        dtype=kinds[0][1:] if kinds else "int",
        target=f"sm_{target}",
        tensor_core=", ".join(products),
        descriptors=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        loads_16_bytes=len(
            re.findall(r"ld\.global\S*\.v4\.[bfu]32|ld\.global\S*\.v2\.[bfu]64|cp\.async\.cg\S* .*, 0x10", ptx)
        ),
        stores_16_bytes=len(re.findall(r"st\.global\S*\.v4\.[bfu]32|st\.global\S*\.v2\.[bfu]64", ptx)),
        atomics=len(re.findall(r"^\s*(?:@!?%\w+\s+)?(?:atom|red)\.", ptx, flags=re.MULTILINE)),
        double_precision=len(re.findall(r"\b(?:add|sub|mul|fma|div|rcp|neg|min|max|setp)\.(?:\w+\.)*f64", ptx)),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=result.metadata.shared,
        warps=result.metadata.num_warps,
        tile="x".join(sizes),
        instructions_per_element=per_element(launch, result),
    )


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def noising_launches(dtype: torch.dtype, features: int = FEATURES) -> list[Launch]:
    x0, tau, table, key = (
        empty(65_536, features, dtype=dtype),
        empty(65_536, dtype=torch.int64),
        empty(STEPS),
        empty(dtype=torch.int64),
    )
    forward = record(lambda: noising.q_sample(x0, tau, table, table, key, key, tau, 0))
    return forward + record(lambda: noising.q_sample_backward(x0, tau, table))


def timesteps_launches() -> list[Launch]:
    ids, key = empty(4096, dtype=torch.int64), empty(dtype=torch.int64)
    return record(lambda: timesteps.stratified_timesteps(key, key, ids, STEPS, 2, 0, 4096))


def interaction_launches(dtype: torch.dtype) -> list[Launch]:
    h, gate, tau, key = (
        empty(ROWS, WIDTH, dtype=dtype),
        empty(ROWS, HIDDEN, dtype=dtype),
        empty(ROWS, dtype=torch.int64),
        empty(dtype=torch.int64),
    )
    w_h, w_o = empty(HIDDEN, WIDTH, dtype=dtype), empty(WIDTH, HIDDEN, dtype=dtype)
    # Autocast casts them as well.
    table = empty(STEPS, WIDTH, dtype=dtype)
    b_h, b_o = empty(HIDDEN, dtype=dtype), empty(WIDTH, dtype=dtype)
    rest = (0.1, key, key, tau, 6)
    first = (h, gate, tau, table, table, table)

    def both() -> None:
        interaction.interaction_block(*first, w_h, b_h, w_o, b_o, *rest, None, True)
        interaction.interaction_block_backward(h, *first, w_h, w_o, h, gate, gate, *rest, empty(ROWS, 4, 2))

    return record(both)


def network_launches(dtype: torch.dtype) -> list[Launch]:
    """A network in training and a chain of it, as the default model's second stage has them."""

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return empty(*shape, dtype=kind)

    tau, key, gates = new(ROWS, kind=torch.int64), new(kind=torch.int64), BLOCKS * HIDDEN
    x, y, conditions, modulation = (
        new(ROWS, TEXT),
        new(ROWS, TEXT),
        new(ROWS, 2 * FEATURES),
        new(STEPS, BLOCKS, 3, WIDTH),
    )
    first = new(WIDTH, TEXT), new(WIDTH), new(WIDTH, 2 * FEATURES), new(WIDTH), new(gates, WIDTH), new(gates)
    inner = [[new(*shape)] * BLOCKS for shape in ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))]
    (w_x, _, w_c, _, w_g, b_g), last, rest = first, (new(TEXT, WIDTH), new(TEXT)), (0.1, key, key, tau, 6)

    def all_three() -> None:
        operands = (x, [conditions], tau, modulation)
        _, *saved = interaction_network.interaction_network(*operands, *first, *inner, *last, *rest)
        interaction_network.interaction_network_backward(
            y, *operands, w_x, w_c, w_g, b_g, *inner, last[0], *rest, saved, [False, True]
        )
        coefficients = new(CHAIN, 5, kind=torch.float32)
        few = modulation[:CHAIN]
        reverse_chain.reverse_chain(x, x, conditions, coefficients, few, *first, *inner, *last, key, key, tau, 6, True)

    return record(all_three)


def projection_launches(dtype: torch.dtype) -> list[Launch]:
    features, labels, loss = empty(ROWS, FEATURES, dtype=dtype), empty(ROWS, dtype=torch.int64), empty()

    def both(classes: int) -> None:
        weight, bias, centres = (
            empty(classes, FEATURES, dtype=dtype),
            empty(classes, dtype=dtype),
            empty(classes, FEATURES),
        )
        projection.semantic_projection(features, labels, centres, weight, bias, 1.0, 0.1, -100)
        projection.semantic_projection_backward(
            loss, loss, features, labels, centres, weight, bias, empty(ROWS), 1.0, 0.1, -100, True
        )

    launches = [launch for classes in (CLASSES, LARGE) for launch in record(functools.partial(both, classes))]
    return list({describe(launch): launch for launch in launches}.values())


def describe(launch: Launch) -> str:
    """What tells launches apart that need code of their own."""
    return f"{launch.kernel.__name__} {launch.signature} {launch.divisible} {launch.constants} {launch.options}"


def described_launches(dtype: torch.dtype) -> list[Launch]:
    """The projection's products through descriptors, as on compute capability 9."""
    before = projection.descriptors_on
    projection.descriptors_on = lambda device: True
    try:
        launches = projection_launches(dtype)
    finally:
        projection.descriptors_on = before
    return [launch for launch in launches if not launch.runs_on(80)]


def tf32_launches() -> list[Launch]:
    """The products of float32 operands on tensor cores, as PyTorch's switch asks for, and what agrees with them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        launches = [launch for maker in (interaction_launches, projection_launches) for launch in maker(torch.float32)]
    finally:
        torch.set_float32_matmul_precision(before)
    return [launch for launch in launches if launch.constants.get("PRECISION") == "tf32"]


def all_launches(dtypes: list[str]) -> list[Launch]:
    """Every kernel as the default model launches it, in each dtype; "tf32" is that of the products alone."""
    makers = (noising_launches, interaction_launches, network_launches, projection_launches, described_launches)
    plain = [getattr(torch, name) for name in dtypes if name != "tf32"]
    launches = [launch for dtype in plain for maker in makers for launch in maker(dtype)]
    launches += tf32_launches() if "tf32" in dtypes else []
    return [*launches, *timesteps_launches()]


def tiles_of(launch: Launch) -> list[Launch]:
    """The launch with every tile that it may get in place of the chosen one."""
    # Descriptors are of the chosen tile.
    if not launch.tiles or not launch.runs_on(80):
        return [launch]
    return [replace(launch, constants=launch.constants | t.sizes(), options=t.options()) for t in launch.tiles]


def with_ones(launch: Launch) -> Launch:
    """The launch with every size and stride 1, of which Triton makes constants."""
    ones = dict.fromkeys((name for name, kind in launch.signature.items() if kind in ("i32", "i64")), 1)
    signature = launch.signature | dict.fromkeys(ones, "constexpr")
    pointers = tuple(place for place in launch.divisible if launch.kernel.arg_names[place] not in ones)
    return replace(launch, signature=signature, constants=launch.constants | ones, divisible=pointers)


def with_doubles(launch: Launch) -> Launch:
    """The launch with its scalars that are no integers as doubles, which is how `torch.compile` passes them."""
    doubles = dict.fromkeys((name for name, kind in launch.signature.items() if kind == "fp32"), "fp64")
    return replace(launch, signature=launch.signature | doubles)


def as_table(reports: list[Report]) -> str:
    """A Markdown table, one line for each kernel and target."""
    rows = [list(asdict(reports[0])), *([str(value) for value in asdict(report).values()] for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def digest(folder: Path) -> str:
    """Of what the kernels' files do: the same when a comment, a docstring or the layout changes."""
    said = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not (isinstance(part, ast.Expr) and is_text(part.value))]  # type: ignore[attr-defined]
        said.update(file.name.encode() + ast.unparse(tree).encode())
    return said.hexdigest()[:16]


def is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def heading() -> str:
    """What stands above the table: versions, and which kernels these are."""
    kernels = digest(Path(__file__).resolve().parents[1] / "kernels")
    return f"Triton {triton.__version__}, kernels {kernels} as launched for the default model; compiled, not run."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities times ten")
    dtypes = ["bfloat16", "float16", "float32", "tf32"]
    usual = ["bfloat16", "float32", "tf32"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=usual, help="dtypes of the operands")
    parser.add_argument("--features", type=int, help="noising alone, of so many features a row")
    parser.add_argument("--every-tile", action="store_true", help="all tiles that a kernel may get, not the chosen one")
    parser.add_argument("--ones", action="store_true", help="every size and stride 1, as of the smallest operands")
    parser.add_argument("--doubles", action="store_true", help="kernels with scalars that are no integers: as doubles")
    parser.add_argument("--json", type=Path, help="write the reports here")
    parser.add_argument("--table", type=Path, help="write a Markdown table here")
    options = parser.parse_args()
    if options.features:
        stored = [getattr(torch, name) for name in options.dtypes if name != "tf32"]  # which noising does not know
        launches = [launch for dtype in stored for launch in noising_launches(dtype, options.features)]
    else:
        launches = all_launches(options.dtypes)
    if options.every_tile:
        launches = [variant for launch in launches for variant in tiles_of(launch)]
    if options.ones:
        launches = [with_ones(launch) for launch in launches]
    if options.doubles:
        launches = [with_doubles(launch) for launch in launches if "fp32" in launch.signature.values()]
    if not launches:
        parser.error("nothing is left of what was asked for")
    reports = list(dict.fromkeys(read(launch, t) for launch in launches for t in options.targets if launch.runs_on(t)))
    print(as_table(reports), end="")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    if options.table:
        options.table.write_text(f"{heading()}\n\n{as_table(reports)}")


if __name__ == "__main__":
    main()
