"""Image files: read whatever kind they are into RGB, or say in a word why not, and scale them for an encoder."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .files import DataError

# What photographs and drawings come in; others (EPS runs a program, FITS holds no picture) are not tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
# Pillow itself refuses twice its own limit before it decodes anything.
LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
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
        # Not by its name: of that Pillow 13 maps an uncompressed TIFF, and by the sides that a rotation will give it.
        file = path.open("rb")
    except OSError as error:
        raise BadImage("cannot be read", str(error.strerror)) from error
    with file:
        return _read(file, max_pixels)


def _read(file: BinaryIO, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
    try:
        opened = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too large", f"more than {LARGEST} pixels") from error
    except Exception as error:
        raise BadImage("not an image") from error
    with opened:
        if opened.width * opened.height > max_pixels:
            raise BadImage("too large", f"{opened.width} x {opened.height} pixels")
        try:
            return _converted(opened)
        except (BadImage, MemoryError):  # what runs out is no fault of the image
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
    stored = str(getattr(image, "tile", ""))
    if image.mode.startswith("I") or ";16" in stored or _is_wide_ppm(image):
        notes.append("16-bit")
    turned = _orientation(image)  # a TIFF forgets it when its pixels are read
    turned_white = image.format == "TIFF" and dict(getattr(image, "tag_v2", {})).get(_PHOTOMETRIC) == 0
    image.load()
    if turned or _orientation(image):
        notes.append("rotated")
    upright = ImageOps.exif_transpose(image) if _orientation(image) else image
    mode, clear = upright.mode, upright.info.get("transparency")
    if mode.startswith("I"):
        pixels = _in_sixteen_bits(np.asarray(upright), stored, turned_white)
        upright = _eight_bits(pixels)
        if isinstance(clear, int):
            notes.append("alpha")
            upright = Image.fromarray(np.where(pixels == clear, np.uint8(255), np.asarray(upright)))
        return upright.convert("RGB"), tuple(notes)
    if clear is not None and upright.format in (None, "PNG"):
        upright.info["transparency"] = _as_decoded(clear, stored)
    if mode == "F":
        raise BadImage("unknown pixels", "floating point")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        notes.append("alpha")
        coloured = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    elif mode not in ("1", "L", "P", "RGB"):
        notes.append("CMYK" if mode == "CMYK" else "other colours")
    return upright.convert("RGB"), tuple(notes)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 2 .. 8, or 0 where there is nothing to turn; unreadable EXIF turns nothing."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 0
    return found if isinstance(found, int) and 2 <= found <= 8 else 0


def _is_wide_ppm(image: Image.Image) -> bool:
    """Whether a PPM or PGM has values beyond 255, which Pillow brings to 8 bits by itself."""
    maximum = [part for tile in getattr(image, "tile", ()) for part in _parts(tile) if isinstance(part, int)]
    return image.format == "PPM" and max(maximum, default=0) > 255


def _parts(tile: Any) -> tuple[Any, ...]:
    return tile.args if isinstance(getattr(tile, "args", None), tuple) else ()


def _as_decoded(clear: Any, stored: str) -> Any:
    """The transparent colour of a PNG in the eight bits that Pillow decodes pixels of 2, 4 and 16 bits to."""
    if isinstance(clear, tuple) and ";16" in stored:
        return tuple(value >> 8 for value in clear)
    wider = {"L;2": 85, "L;4": 17}
    return clear * next((wider[mode] for mode in wider if mode in stored), 1) if isinstance(clear, int) else clear


def _in_sixteen_bits(pixels: NDArray[np.integer[Any]], stored: str, white_is_zero: bool) -> NDArray[np.integer[Any]]:
    """Of 12 bits Pillow gives the values as they are, and of a TIFF whose white is 0, too, unless it has 8 bits."""
    if "I;12" in stored:
        pixels = pixels.astype(np.uint32) * 65535 // 4095
    return 65535 - pixels.astype(np.int64) if white_is_zero else pixels


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
