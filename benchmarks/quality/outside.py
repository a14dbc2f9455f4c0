"""Paired sets that no published table is of: pictures with words, made from packages that anyone can load.

`python -m benchmarks.quality.outside PACKAGES OUT` writes ``OUT/NAME.npz``, as `python -m seda_fast.train --data`
takes them. In PACKAGES lie, unpacked, ``emoji-datasource-google`` and ``openmoji`` (npm), ``openclipart``, the folder
of that name in Debian's openclipart-png and openclipart-svg, ``tuxpaint``, that in tuxpaint-stamps-default,
``oxygen``, that in oxygen-icon-theme, or ``tabler-icons`` and ``tabler-icons-png`` (npm, @tabler); what is absent is
named and left out.

Features are plain: gradients' orientations and colours of an image, then principal components; weighted counts of a
text's words, then singular vectors. All are fitted on the training part, 70 % of each class's images.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from seda_fast.nn.copies import first_copies

Float = NDArray[np.float32]
Found = tuple[Path, str, str]  # an image, its text, its class

SIDE, CELL, ORIENTATIONS = 64, 8, 9
VISUAL_DIM, TEXT_DIM = 256, 128
# Of a folder of clip art so many at most are drawn: some hold hundreds of variants of one.
MOST_OF_CLASS = 220
# Line icons are alike in style and many: so few of a class keep a comparison of methods to minutes.
MOST_LINE_ICONS_OF_CLASS = 80
# Some flags have 169 million, and take longer than all other images together.
MOST_PIXELS = 2**24


def image_features(file: Path) -> Float:
    """(2212,): oriented gradients of 7 x 7 blocks (Dalal & Triggs 2005), colours of 4 quarters, and 8 x 8 pixels."""
    with Image.open(file) as opened:
        drawn = opened.convert("RGBA")
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side), "white")
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2), drawn)
    image = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32) / 255
    levels = np.minimum((4 * pixels).astype(int), 3) @ (16, 4, 1)
    half = SIDE // 2
    quarters = [levels[i : i + half, j : j + half].ravel() for i in (0, half) for j in (0, half)]
    colours = [np.sqrt(np.bincount(quarter, minlength=64) / half**2) for quarter in quarters]
    small = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32).ravel() / 255
    return np.concatenate([_oriented_gradients(pixels.mean(2)) / 7, *colours, small / 4]).astype(np.float32)


def _oriented_gradients(grey: Float) -> Float:
    down, right = np.gradient(grey)
    strength, angle = np.hypot(right, down), np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS
    low, share = np.floor(angle).astype(int), angle - np.floor(angle)
    row, column = (index // CELL for index in np.indices(grey.shape))
    cells = np.zeros((SIDE // CELL, SIDE // CELL, ORIENTATIONS), np.float32)
    np.add.at(cells, (row, column, low % ORIENTATIONS), strength * (1 - share))
    np.add.at(cells, (row, column, (low + 1) % ORIENTATIONS), strength * share)
    blocks = [cells[i : i + 2, j : j + 2].ravel() for i in range(len(cells) - 1) for j in range(len(cells) - 1)]
    return np.concatenate([block / np.sqrt(np.square(block).sum() + 1e-4) for block in blocks])


def emoji(packages: Path, grouping: str) -> Iterator[Found]:
    """Google's emoji with their names and OpenMoji's annotations and tags; ``grouping`` names the class."""
    folder = packages / "emoji-datasource-google"
    annotated = json.loads((packages / "openmoji" / "data" / "openmoji.json").read_text(encoding="utf-8"))
    known = {entry["hexcode"]: entry for entry in annotated}
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        file, code = folder / "img" / "google" / "64" / entry["image"], entry["unified"]
        if not file.is_file() or entry["category"] == "Component":
            continue
        other = known.get(code) or known.get(entry["non_qualified"] or "") or known.get(code.replace("-FE0F", ""), {})
        words = [entry["name"].lower(), *(name.replace("_", " ") for name in entry["short_names"])]
        words += [other.get(name, "") for name in ("annotation", "tags", "openmoji_tags")]
        yield file, " ".join(words), entry[grouping]


def clip_art(packages: Path) -> Iterator[Found]:
    """Clip art with its file's name, title, key words and description; the class is two folders' names."""
    root = packages / "openclipart"
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for file in sorted((root / "png").rglob("*.png")):
        name = file.relative_to(root / "png").with_suffix("")
        drawings = [root / "svg" / f"{name}{end}" for end in (".svg", ".svgz")]
        group = "/".join(name.parts[:-1][:2])
        if name.parts[0] not in ("unsorted", "special") and group != "shapes/stars":
            groups.setdefault(group, []).extend((file, drawing) for drawing in drawings if drawing.is_file())
    rng = np.random.default_rng(0)
    for group, files in sorted(groups.items()):
        for i in rng.permutation(len(files))[:MOST_OF_CLASS]:
            file, drawing = files[i]
            if _is_of_sensible_size(file):
                yield file, _text_of_drawing(file, drawing), group


def stamps(packages: Path) -> Iterator[Found]:
    """Stamps of a drawing program with the sentence that it says of them; the class is two folders' names."""
    root = packages / "tuxpaint" / "stamps"
    for file in sorted(root.rglob("*.png")):
        said, folders = file.with_suffix(".txt"), file.relative_to(root).parts[:-1]
        if said.is_file() and _is_of_sensible_size(file):
            english = said.read_text(encoding="utf-8").partition("\n")[0]
            yield file, f"{re.sub(r'[_0-9-]+', ' ', file.stem)} {english}".lower(), "/".join(folders[:2])


def icons(packages: Path) -> Iterator[Found]:
    """Icons of a desktop, in the largest of their sizes up to 128, with the words of their names; by purpose."""
    largest: dict[tuple[str, str], Path] = {}
    for side in (16, 22, 32, 48, 64, 128):
        for file in sorted((packages / "oxygen" / "base" / f"{side}x{side}").glob("*/*.png")):
            if not file.is_symlink():
                largest[file.parent.name, file.stem] = file
    for (purpose, name), file in sorted(largest.items()):
        yield file, re.sub(r"[_.+-]+", " ", name).lower(), purpose


def line_icons(packages: Path) -> Iterator[Found]:
    """Tabler's icons, black lines on white, with their names and tags; the class is their category."""
    known = json.loads((packages / "tabler-icons" / "icons.json").read_text(encoding="utf-8"))
    groups: dict[str, list[tuple[Path, str]]] = {}
    for name, entry in sorted(known.items()):
        file = packages / "tabler-icons-png" / "icons" / "outline" / f"{name}.png"
        if entry.get("category") and file.is_file():
            text = " ".join([name.replace("-", " "), *map(str, entry["tags"])]).lower()
            groups.setdefault(entry["category"], []).append((file, text))
    rng = np.random.default_rng(0)
    for group, found in sorted(groups.items()):
        for i in rng.permutation(len(found))[:MOST_LINE_ICONS_OF_CLASS]:
            yield *found[i], group


def _is_of_sensible_size(file: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                return image.width * image.height <= MOST_PIXELS
        except Image.DecompressionBombError:
            return False


def _text_of_drawing(file: Path, drawing: Path) -> str:
    raw = drawing.read_bytes()
    source = (gzip.decompress(raw) if drawing.suffix == ".svgz" else raw).decode("utf-8", "ignore")
    tags = ("dc:title", "rdf:li", "dc:description")
    found = [text for tag in tags for text in re.findall(f"<{tag}>([^<]*)</{tag}>", source)]
    return " ".join([re.sub(r"[_\d-]+", " ", file.stem), *found]).lower()


def write(out: Path, found: Iterator[Found], least: int) -> str:
    """The set as a file, of classes of at least ``least`` images; says how large it is."""
    entries = list(found)
    sizes = Counter(name for *_, name in entries)
    names = sorted(name for name, size in sizes.items() if size >= least)
    kept = [entry for entry in entries if entry[2] in names]
    labels = np.array([names.index(name) for *_, name in kept])
    visual = np.stack([image_features(file) for file, *_ in kept])
    test = _held_out(visual, labels)
    visual = PCA(min(VISUAL_DIM, *visual[~test].shape), random_state=0).fit(visual[~test]).transform(visual)
    texts = [text for _, text, _ in kept]
    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english")
    counts.fit([text for text, held in zip(texts, test, strict=True) if not held])
    words = counts.transform(texts)
    text = TruncatedSVD(min(TEXT_DIM, words.shape[1] - 1), random_state=0).fit(words[~test]).transform(words)
    arrays = {"visual": visual.astype(np.float32), "text": text.astype(np.float32), "label": labels}
    parts = {f"{k}_{part}": v[rows] for k, v in arrays.items() for part, rows in (("train", ~test), ("test", test))}
    np.savez(out, **parts, class_names=np.array(names))
    return f"{out.name}: {(~test).sum()} and {test.sum()} rows, {len(names)} classes"


def _held_out(visual: Float, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A mask of 30 % of each class's images; rows of one image, which may lie in several folders, go together."""
    rng, images = np.random.default_rng(0), first_copies(torch.from_numpy(visual)).numpy()
    test = np.zeros(len(labels), dtype=bool)
    for label in range(int(labels.max()) + 1):
        of_class = rng.permutation(np.unique(images[labels == label]))
        test |= np.isin(images, of_class[: max(1, round(0.3 * len(of_class)))])
    return test


def main(argv: list[str] | None = None) -> int:
    """Entry point; 2 where no package lies in the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.outside", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("out", type=Path, help="folder for the sets")
    chosen = parser.parse_args(argv)
    needed = (
        "emoji-datasource-google",
        "openmoji",
        "openclipart",
        "tuxpaint",
        "oxygen",
        "tabler-icons",
        "tabler-icons-png",
    )
    absent = [name for name in needed if not (chosen.packages / name).is_dir()]
    for name in absent:
        print(f"benchmarks.quality.outside: {chosen.packages} has no folder {name}", file=sys.stderr)
    chosen.out.mkdir(parents=True, exist_ok=True)
    written = []
    if not {"emoji-datasource-google", "openmoji"} & set(absent):
        for name, grouping, least in (("emoji_categories", "category", 50), ("emoji_subcategories", "subcategory", 14)):
            written.append(write(chosen.out / f"{name}.npz", emoji(chosen.packages, grouping), least))
    for package, found, least in (("openclipart", clip_art, 35), ("tuxpaint", stamps, 14), ("oxygen", icons, 40)):
        if package not in absent:
            written.append(write(chosen.out / f"{package}.npz", found(chosen.packages), least))
    if not {"tabler-icons", "tabler-icons-png"} & set(absent):
        written.append(write(chosen.out / "tabler.npz", line_icons(chosen.packages), 40))
    print("\n".join(written))
    return 0 if written else 2


if __name__ == "__main__":
    sys.exit(main())
