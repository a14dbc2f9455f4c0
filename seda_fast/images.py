"""Image files: read whatever kind they are into RGB, or say in a word why not, and scale them for an encoder."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .files import DataError

# What photographs and drawings come in; others (EPS runs a program, FITS holds no picture) are not tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow itself refuses twice its own limit before it decodes anything.
LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
_ORIENTATION = 0x0112
_LARGEST_SIDE = 4096

Resampling = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class BadImage(Exception):
    """An image that cannot be used; ``reason`` is one of a few words that a summary counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Scaling:
    """How an encoder wants its images: the middle ``height`` x ``width`` of an image scaled to ``resize`` pixels on the
    side that must fit, the shorter one where both are alike; around it, where that is smaller, the colour ``fill``.

    squash: each side is scaled by itself, so that proportions change. border: the longer side must fit, so that
    nothing is cut off. mean, std: of a channel in 0 .. 1.
    """

    height: int
    width: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Resampling = "bicubic"
    squash: bool = False
    border: bool = False
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        sizes, values = (self.height, self.width, self.resize), (*self.mean, *self.std)
        if not all(1 <= size <= _LARGEST_SIDE for size in sizes):
            raise DataError(
                f"images of {self.height} x {self.width} pixels are asked for; 1 .. {_LARGEST_SIDE} can be made"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, values)) or min(self.std) <= 0:
            raise DataError("the mean and deviation of three colours are needed, to tell how images are normalised")


def read_image(path: Path, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame as an 8-bit RGB image, and what it had to be converted from.

    Transparency is laid on white, 16 bits are scaled to 8, an EXIF rotation is carried out. The notes are of
    "animated", "rotated", "16-bit", "alpha", "CMYK" and "other colours".

    Raises:
        BadImage: "missing", "cannot be read" (no right to), "not an image", "too large" (told from the header, before
            decoding), "damaged" (truncated, too) or "unknown pixels".
    """
    _refuse_no_file(path)
    try:
        opened = Image.open(path, formats=FORMATS)
    except PermissionError as error:
        raise BadImage("cannot be read", str(error.strerror)) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large", f"more than {LARGEST} pixels") from error
    except Exception as error:
        raise BadImage("not an image") from error
    with opened:
        if opened.width * opened.height > max_pixels:
            raise BadImage("too large", f"{opened.width} x {opened.height} pixels")
        try:
            return _converted(opened)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage("damaged", str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _refuse_no_file(path: Path) -> None:
    """A pipe would be waited for without end, and a name may be one that no file can have."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except OSError as error:  # the name is too long, or a folder on the way may not be entered
        raise BadImage("cannot be read", str(error.strerror)) from error
    raise BadImage("not an image", "not a file") if there else BadImage("missing")


def _converted(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    notes = ["animated"] if getattr(image, "is_animated", False) else []
    if image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        notes.append("16-bit")
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        notes.append("rotated")
    upright = ImageOps.exif_transpose(image)
    mode = upright.mode
    if mode.startswith("I"):
        upright = _eight_bits(np.asarray(upright))
    elif mode == "F":
        raise BadImage("unknown pixels", "floating point")
    elif mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        notes.append("alpha")
        coloured = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    elif mode not in ("1", "L", "P", "RGB"):
        notes.append("CMYK" if mode == "CMYK" else "other colours")
    return upright.convert("RGB"), tuple(notes)


def _eight_bits(pixels: NDArray[np.integer]) -> Image.Image:
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise BadImage("unknown pixels", f"values from {low} to {high}")
    return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def scaled(image: Image.Image, scaling: Scaling) -> NDArray[np.uint8]:
    """An RGB image as (height, width, 3) uint8.

    The middle is cut out and scaled in one resampling, so a very long image never becomes a huge one.
    """
    size = (scaling.width, scaling.height)
    share = min(size) / scaling.resize
    # Pixels of the image a pixel of the result, along each side.
    steps = [share * whole / made for whole, made in zip(image.size, size, strict=True)]
    if not scaling.squash:
        steps = [max(steps) if scaling.border else min(steps)] * 2
    # What the image covers of the result, but for a hair of rounding; the rest stays in the colour of the border.
    shown = [min(made, max(1, round(whole / step))) for whole, made, step in zip(image.size, size, steps, strict=True)]
    cut = [min(whole, part * step) for whole, part, step in zip(image.size, shown, steps, strict=True)]
    left, top = ((whole - part) / 2 for whole, part in zip(image.size, cut, strict=True))
    # Rounding may reach a hair beyond the edge, which Pillow refuses.
    box = (left, top, min(image.width, left + cut[0]), min(image.height, top + cut[1]))
    found = image.resize((shown[0], shown[1]), Image.Resampling[scaling.interpolation.upper()], box=box)
    if found.size != size:
        canvas = Image.new("RGB", size, scaling.fill)
        canvas.paste(found, ((size[0] - shown[0]) // 2, (size[1] - shown[1]) // 2))
        found = canvas
    return np.array(found)


def probe_image() -> Image.Image:
    """A picture of smooth slopes whose sides, directions and colours all differ, to compare two preparations on."""
    x, y = np.meshgrid(np.linspace(0, 1, 333), np.linspace(0, 1, 251))
    return Image.fromarray((np.stack([x, y * y, y * (np.sin(9 * x) + 1) / 2], axis=2) * 255).astype(np.uint8))


def find_images(folder: Path) -> list[str]:
    """Paths of all image files below ``folder`` by their suffix, relative to it, sorted. Links are followed, and a
    folder that several lead to is read once.

    Raises:
        DataError: a folder below cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}")

    found: list[str] = []
    seen: set[str] = set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:
            below.clear()
            continue
        seen.add(here)
        below.sort()
        paths = (Path(place, name) for name in names)  # dead links, too, which a summary then counts
        found += [path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found)


def shorter_side(crop: int, share: float) -> int:
    """The shorter side before cutting out ``crop`` pixels that are ``share`` of it, as timm rounds it."""
    return math.floor(crop / share)
