"""Fixtures that all tests share: seeds, the shared real data, and skips that name the test they skip."""

import json
import os
import random
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Busy machines stall, so an example has no deadline; on CI a red test must be red again when repeated.
hypothesis.settings.register_profile("seda_fast", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("seda_fast")


def slow_last(items: list[pytest.Item], workers: int, first: int = 0) -> list[pytest.Item]:
    """``items`` so that each of pytest-xdist's workers, which are given equal stretches of them, ends with slow ones.

    Where time is up before all have run it is slow ones that are left out, and no quick one waits for them. The slow
    ones begin with the one of number ``first``, after the last comes the first again: others are left out each time.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow = slow[(start := first % max(1, len(slow))) :] + slow[:start]
    quick = [item for item in items if not item.get_closest_marker("slow")]

    def share(part: list[pytest.Item], worker: int) -> list[pytest.Item]:
        return part[len(part) * worker // workers : len(part) * (worker + 1) // workers]

    return [item for worker in range(workers) for item in share(quick, worker) + share(slow, worker)]


@pytest.hookimpl(trylast=True)  # after pytest has put together what shares a fixture
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones last; skips of what this machine cannot run name the test, so that pytest -ra lists each one."""
    workers, first = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"), os.environ.get("SLOW_TESTS_FROM", "0")
    items[:] = slow_last(items, int(workers), int(first))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA device"))
        if "shared_data" in getattr(item, "fixturenames", ()) and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs ../shared/data"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No slow test begins that would not end before ``SLOW_TESTS_UNTIL``, a second of the epoch; unset, all run."""
    until, slow = os.environ.get("SLOW_TESTS_UNTIL"), item.get_closest_marker("slow")
    if until and slow and time.time() + slow.kwargs.get("seconds", 0) > float(until):
        pytest.skip(f"{item.nodeid} is slow, and the time that SLOW_TESTS_UNTIL gives is over")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the checkout that the tests lie in."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder ``../shared/data`` of real paired sets; tests that ask for it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():  # asked for inside a test, which is not known when tests are collected
        pytest.skip("needs ../shared/data")
    return SHARED_DATA


@dataclass(frozen=True)
class Shown:
    """What a phone's browser, 390 pixels wide, made of a page: its headings that have a size, the widest that it can
    be scrolled to, what it asked for beyond itself, and the share of dark pixels of each stretch of 844 that holds
    part of the page."""

    titles: list[str]
    width: int
    requests: list[str]
    dark: list[float]


# A window of Chromium's is 500 pixels wide at least, whatever is asked for; a frame in it is as narrow as it is told.
PROBE = """<!DOCTYPE html><iframe width=390 height=844 style="border:0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, shown = view.document;
  const seen = [...shown.querySelectorAll("h2")].filter(h => h.getBoundingClientRect().height > 0);
  const asked = view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
  const told = {titles: seen.map(h => h.textContent), width: shown.documentElement.scrollWidth, requests: asked,
                height: Math.ceil(shown.body.getBoundingClientRect().height), inner: view.innerWidth};
  const kept = document.createElement("pre"); kept.id = "told"; kept.textContent = JSON.stringify(told);
  document.querySelector("iframe").replaceWith(kept);
})</script>"""


@pytest.fixture
def phone(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[Path], Shown]:
    """Shows a page in headless Chromium as a phone would; the test is skipped where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip(f"{request.node.nodeid} needs chromium")
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def chromium(*arguments: str) -> str:
        done = subprocess.run([*common, *arguments], check=True, capture_output=True, text=True, timeout=300)
        return done.stdout

    def show(page: Path) -> Shown:
        # A copy that may ask for anything; what is folded is opened, as it must not stick out either.
        content = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
        content = content.replace("<details>", "<details open>")
        probe = tmp_path / "probe.html"
        probe.write_text(PROBE.replace("{page}", escape(content)), encoding="utf-8")
        written = chromium("--hide-scrollbars", "--dump-dom", probe.as_uri())
        found = re.search(r'<pre id="told">(.*?)</pre>', written, flags=re.S)
        assert found is not None
        told = json.loads(unescape(found[1]))
        assert told["inner"] == 390
        shot, height = tmp_path / "shot.png", 844 * -(-min(told["height"], 12_000) // 844)
        chromium(f"--window-size=390,{height}", "--hide-scrollbars", f"--screenshot={shot}", page.as_uri())
        with Image.open(shot) as image:
            assert image.size == (390, height)
            pixels = np.asarray(image.convert("L"))
        used = np.flatnonzero((pixels < 128).any(1)).max() + 1
        dark = [float((pixels[top : top + 844] < 128).mean()) for top in range(0, used, 844)]
        return Shown(told["titles"], told["width"], told["requests"], dark)

    return show


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed in [0, 2**32) of this test: another for each test and parameter, the same on every run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy generator, seeded for this test."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _seed_global_generators(request: pytest.FixtureRequest) -> None:
    """Seed the generators that libraries use behind a test's back."""
    value = zlib.crc32(request.node.name.encode())
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - scikit-learn falls back to this generator
    torch.manual_seed(value)
