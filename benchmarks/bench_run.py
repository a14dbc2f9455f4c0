"""A whole training run by the default recipe, in processes of their own, against the same recipe in plain PyTorch."""

import sys
from pathlib import Path
from typing import Any

import pytest

# The size of fashion_products; its 20 passes.
ROWS, CLASSES = 5216, 28

RUN = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
who, rows, classes, epochs, small = sys.argv[2], *map(int, sys.argv[3:])
import torch
import bench_train
from seda_fast.engine import learning_rate_factor
from seda_fast.loop import Trainer
from seda_fast.measure import peak_memory_bytes
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = bench_train.SeDAConfig(**{**bench_train.SIZES, "n_classes": classes, **(bench_train.SMALL if small else {})})
data = bench_train.training_set(config, rows, device)
settings = bench_train.TrainConfig(epochs=epochs).for_rows(rows)
model = bench_train.SeDA(config).to(device)
if who == "eager":
    plain = bench_train.Plain(model, data, settings.batch_size, bench_train.plain_loss, settings)
    parts = -(-rows // settings.batch_size)
    for step in range(epochs * parts):
        if step % parts == 0:
            order = torch.randperm(rows).to(device)
        for group in plain.optimiser.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, epochs * parts, settings.warmup)
        done = plain.step(order[step % parts * settings.batch_size :][: settings.batch_size])
    assert torch.isfinite(done)
else:
    precision = "bf16" if device.type == "cuda" else "fp32"
    Trainer(model, data, settings, engine="auto", precision=precision).run()
if device.type == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - start, peak_memory_bytes(device))
"""


@pytest.mark.timeout(1800)
def bench_run(contest: Any, quick: bool, whole_run: Any) -> None:
    """From the start of the process to trained weights; both draw the same data."""
    rows, epochs = (64, 1) if quick else (ROWS, 20)
    sizes = [str(n) for n in (rows, CLASSES, epochs, int(quick))]
    commands = {
        name: [sys.executable, "-c", RUN, str(Path(__file__).parent), name, *sizes] for name in ("seda_fast", "eager")
    }
    whole_run(contest, f"a whole run, {rows} rows, {epochs} passes", commands, 1 if quick else 3)
