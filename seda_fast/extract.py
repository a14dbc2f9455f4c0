"""``python -m seda_fast.extract``: features of images and captions, in the file that training reads.

With ``--captions`` the file holds what ``seda_fast.train`` takes; without, the features of all images below the folder,
for ``seda_fast.predict``. Beside it a file of the same name and ``.json`` says what became of every image. What is done
is kept in a hidden folder beside the result until all is, so a run that was ended goes on where it was.
"""

from __future__ import annotations

from . import _extract_extra  # noqa: F401 - checks first that what this needs is installed

# isort: split
import fcntl
import hashlib
import json
import os
import sys
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from .arrays import labelled_rows
from .captions import Captions, read_captions, read_class_texts
from .command import choose_device, progress, run, settings_of
from .config import ConfigError, check_given, check_range, check_types, setting
from .data import split_rows
from .encoders import TextEncoder, VisionEncoder, prepared, text_encoder, vision_encoder
from .files import STRINGS, DataError, atomic_path, output_file, printable, save_npz
from .images import LARGEST, BadImage, find_images, read_image, scaled

PROGRAM = "seda_fast.extract"
_THREADS = 8
_TEXTS = 1024  # of one part; the encoder sorts them by length and makes its own batches
_SHOWN = 5
_LOCK = "lock"
_HELD_OUT = 0.2  # of the images, as training does of the rows

Item = TypeVar("Item")
Result = TypeVar("Result")
Features = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is read, which models see it, and where the features go."""

    images: str = setting("", "folder of the images")
    captions: str = setting("", "a .csv file with the columns image, text, label and optionally split (train, test)")
    class_captions: str = setting("", "a .csv file with the columns label and text, one text a class, in place of text")
    label_separator: str = setting("", "what parts several classes in a label (multi-label); empty: one class a row")
    vision: str = setting("", "folder or cached name of a transformers, timm or open_clip model, or timm:NAME=FILE")
    text: str = setting("tfidf", "tfidf, or folder, cached name or package of a sentence-transformers model")
    text_dim: int = setting(256, "largest size of a tfidf feature")
    out: str = setting("", "a .npz or .safetensors file for the features")
    overwrite: bool = setting(False, "replace an earlier result")
    strict: bool = setting(False, "stop at the first image that cannot be used instead of leaving it out")
    batch_size: int = setting(64, "images or texts that a model sees at a time")
    max_pixels: int = setting(50_000_000, "images of more pixels are left out")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")

    def __post_init__(self) -> None:
        check_types(self)
        check_given(self, "images", "vision", "out")
        check_range(self, "text_dim", self.text_dim >= 1, "at least 1")
        check_range(self, "batch_size", self.batch_size >= 1, "at least 1")
        check_range(self, "max_pixels", 1 <= self.max_pixels <= LARGEST, f"in 1 .. {LARGEST}")
        if self.class_captions and not self.captions:
            raise ConfigError("class_captions needs captions, the table that gives images their labels")
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("label_separator", "text", "text_dim"):
            if not self.captions and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} needs captions, the table of texts and labels; without it images alone are seen"
                )
        if self.text != "tfidf" and self.text_dim != defaults["text_dim"]:
            raise ConfigError("text_dim is for tfidf; a sentence-transformers model has a size of its own")
        if self.class_captions and self.label_separator:
            raise ConfigError("class_captions needs one class a row, so it does not go with label_separator")


@dataclass(frozen=True)
class Seen:
    """What became of M images: ``features`` (n, D) of those that could be used, ``problems`` "" or why not, ``notes``
    what was converted, comma-separated; both (M,)."""

    features: Features
    problems: NDArray[np.str_]
    notes: NDArray[np.str_]


# ---- parts that survive a kill ---------------------------------------------------------------------------------------


@contextmanager
def parts_folder(out: Path, job: str) -> Iterator[Path]:
    """The folder of the parts beside ``out``, for the one process that holds its lock; parts of another job (other
    models or settings) are removed. It stays when the block ends, for a run that goes on, unless the block cleared it.

    Raises:
        DataError: another process works on it, or it cannot be written.
    """
    folder = out.absolute().parent / f".{out.name}.parts"
    with _locked(folder, out) as lock:
        mark = folder / "job"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != job:
            clear_parts(folder)
        with atomic_path(mark) as draft:
            draft.write_text(job, encoding="utf-8")
        yield folder
        if [file.name for file in folder.iterdir()] == [_LOCK]:
            with suppress(OSError):
                (folder / _LOCK).unlink()
            lock.close()  # before the folder goes: NFS keeps an open file's content in it
            with suppress(OSError):
                folder.rmdir()


def clear_parts(folder: Path) -> None:
    """Remove all that is in the folder of the parts but its lock."""
    for file in folder.iterdir():
        if file.name != _LOCK:
            file.unlink()


def _locked(folder: Path, out: Path) -> IO[str]:
    """The lock file, open; the system's lock on it ends with its process, however that ends."""
    path = folder / _LOCK
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended just now took the folder, and this file, with it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
    except BlockingIOError as error:
        raise DataError(f"another run works on {out} (lock {path})") from error
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be written: {error.strerror or error}") from error


def job_of(config: ExtractConfig, *fingerprints: str) -> str:
    """Names what parts are made with: the models and the settings. What they are made of stands in their own names."""
    settings = (config.batch_size, config.max_pixels, config.device, config.text_dim)
    versions = (torch.__version__, PIL.__version__)
    return hashlib.sha256(repr((settings, fingerprints, versions)).encode()).hexdigest()


def images_part(folder: str, start: int, batch: Sequence[str]) -> str:
    """The name of a batch's part, another one after a change of an image: its path, size or time of change."""
    digest = hashlib.sha256()
    for image in batch:
        digest.update(b"%b\0%b\n" % (image.encode("utf-8", "surrogateescape"), _stamp(Path(folder, image)).encode()))
    return f"images_{start:09}_{digest.hexdigest()[:32]}.npz"


def texts_part(start: int, texts: Sequence[str], learnt: Sequence[str]) -> str:
    """The name of a part of the texts, another one after a change of one of them or of what the encoder learns from."""
    digest = hashlib.sha256(json.dumps([texts, learnt]).encode())
    return f"texts_{start:09}_{digest.hexdigest()[:32]}.npz"


def _stamp(path: Path) -> str:
    """Size and time of change of a file; "" where there is none, or a name that no file can have."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read_part(path: Path, names: Sequence[str]) -> list[NDArray[Any]] | None:
    """The arrays of a part; None where there is no whole one, which is then made anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None  # the last two: a header that asks for another way of packing, or a password


def write_part(path: Path, **arrays: NDArray[Any]) -> None:
    with atomic_path(path) as draft:
        save_npz(draft, arrays)


# ---- images ----------------------------------------------------------------------------------------------------------


def ahead(function: Callable[[Item], Result], groups: Iterable[Sequence[Item]]) -> Iterator[list[Result]]:
    """The results of each group in order; the next group is worked on by threads while one is used."""
    waiting: deque[list[Future[Result]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in groups:
            waiting.append([pool.submit(function, item) for item in group])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def see_images(
    config: ExtractConfig, images: Sequence[str], encoder: VisionEncoder, device: torch.device, parts: Path
) -> Seen:
    """Read and encode all images, batch by batch, each kept as a part."""
    size = config.batch_size
    batches = {start: images[start : start + size] for start in range(0, len(images), size)}
    files = {start: parts / images_part(config.images, start, batch) for start, batch in batches.items()}
    names = ("features", "problems", "notes")
    stored = {start: read_part(file, names) for start, file in files.items()}
    done = {start: part for start, part in stored.items() if part is not None}

    def read(image: str) -> tuple[NDArray[np.uint8] | None, str, str]:
        try:
            found, notes = read_image(Path(config.images, image), config.max_pixels)
        except BadImage as error:
            return None, str(error), ""
        return scaled(found, encoder.scaling), "", ",".join(notes)

    todo = [start for start in batches if start not in done]
    with progress(len(images), "images") as bar:
        bar.update(sum(len(batches[start]) for start in done))
        _stop_at_problem(config, images, done)
        for start, batch in zip(todo, ahead(read, (batches[start] for start in todo)), strict=True):
            pixels = [found for found, _, _ in batch if found is not None]
            features = _encode(encoder, pixels, device)
            made = [features, np.array([why for _, why, _ in batch]), np.array([notes for _, _, notes in batch])]
            write_part(files[start], **dict(zip(names, made, strict=True)))
            done[start] = made
            _stop_at_problem(config, images, {start: made})
            bar.update(len(batch))
    in_order = [done[start] for start in batches]
    used = [part[0] for part in in_order if len(part[0])]
    if not used:
        raise DataError(f"none of the {len(images)} images can be used; the first: {in_order[0][1][0]}")
    problems, notes = (np.concatenate([part[i] for part in in_order]) for i in (1, 2))
    return Seen(np.concatenate(used), problems, notes)


def _stop_at_problem(config: ExtractConfig, images: Sequence[str], parts: dict[int, list[NDArray[Any]]]) -> None:
    for start, (_, problems, _) in sorted(parts.items()):
        bad = np.flatnonzero(problems != "")
        if config.strict and len(bad):
            raise DataError(f"{images[start + bad[0]]}: {problems[bad[0]]}; without --strict it is left out")


def _encode(encoder: VisionEncoder, pixels: list[NDArray[np.uint8]], device: torch.device) -> Features:
    """Features (n, D) of scaled images (H, W, 3); (0, 0) of none."""
    if not pixels:
        return np.zeros((0, 0), dtype=np.float32)
    with torch.inference_mode():
        found = encoder.encode(prepared(np.stack(pixels), encoder.scaling, device)).float()
    if found.ndim != 2 or not bool(found.isfinite().all()):
        raise DataError(f"the model {encoder.name} gives no finite vectors; are these its weights?")
    return found.cpu().numpy()


# ---- texts -----------------------------------------------------------------------------------------------------------


def see_texts(texts: Sequence[str], train: NDArray[np.bool_], encoder: TextEncoder, parts: Path) -> Features:
    """Features (N, Dt) of the texts, all NaN where one is "". The encoder is fitted on the training rows' alone."""
    there = np.array([bool(text) for text in texts])
    learnt = [text for text, use in zip(texts, there & train, strict=True) if use]
    if not learnt:
        raise DataError("no training row whose image can be used has a text")
    encoder.fit(learnt)
    given = [text for text in texts if text]
    found: list[Features] = []
    with progress(len(given), "texts") as bar:
        for start in range(0, len(given), _TEXTS):
            some = given[start : start + _TEXTS]
            file = parts / texts_part(start, some, learnt)
            stored = read_part(file, ["features"])
            features = encoder.encode(some) if stored is None else stored[0]
            if stored is None:
                write_part(file, features=features)
            found.append(features)
            bar.update(len(some))
    everything = np.full((len(texts), found[0].shape[1]), np.nan, dtype=np.float32)
    everything[there] = np.concatenate(found)
    return everything


# ---- the result ------------------------------------------------------------------------------------------------------


def training_rows(captions: Captions, kept: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
    """Which rows (N,) are for training, and how many images were held out here.

    By the column split, else all, for training to split. Training splits rows, though: where images stand in several of
    them, a fifth of the images is held out here, so that none is in both parts.

    Raises:
        DataError: some class has too few images for that.
    """
    train = np.ones(len(captions.labels), dtype=bool) if captions.train is None else captions.train
    rows = np.flatnonzero(kept)
    labelled = labelled_rows(captions.labels)
    once = len({captions.images[row] for row in rows}) == len(rows)
    if once or not train[rows].all() or not labelled[rows].any():
        return train, 0
    chosen: dict[str, int] = {}  # the row of each image that tells its label
    for row in rows[np.argsort(~labelled[rows], kind="stable")].tolist():
        chosen.setdefault(captions.images[row], row)
    images, label_rows = list(chosen), list(chosen.values())
    try:
        _, test = split_rows(captions.labels[label_rows], _HELD_OUT, seed=0)
    except DataError as error:
        raise DataError(
            "images stand in several rows, so a fifth of the images must become the test part, and some class has too "
            "few for that; give a column split"
        ) from error
    held = {images[i] for i in test}
    return np.array([image not in held for image in captions.images]), len(held)


def captioned(
    captions: Captions,
    kept: NDArray[np.bool_],
    train: NDArray[np.bool_],
    visual: Features,
    text: Features | None,
) -> dict[str, Any]:
    """The arrays that training reads, of the rows that were ``kept`` (N,), parted by ``train`` (N,). ``visual`` and
    ``text`` hold the features of the kept rows alone; without texts of rows ``text`` is None."""
    train = train[kept]
    labels, left = _numbered_anew(captions, kept, train)
    names = row_names(image for image, keep in zip(captions.images, kept, strict=True) if keep)
    arrays: dict[str, Any] = {}
    for part, chosen in (("train", train), ("test", ~train)):
        if chosen.any():
            arrays[f"visual_{part}"], arrays[f"label_{part}"] = visual[chosen], labels[chosen]
            arrays[f"names_{part}"] = names[chosen]
            if text is not None:
                arrays[f"text_{part}"] = text[chosen]
    arrays["class_names"] = np.array([captions.class_names[k] for k in left])
    return arrays


def row_names(images: Iterable[str]) -> NDArray[np.str_]:
    """The paths of the rows' images, as one may print them."""
    return np.array([printable(image) for image in images])


def _numbered_anew(
    captions: Captions, kept: NDArray[np.bool_], train: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The labels of the rows that were kept, and the numbers of the classes that still have a training image."""
    labels = captions.labels[kept]
    carried = labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(len(captions.class_names))
    left = np.flatnonzero(carried[train].any(0))
    if not len(left):
        raise DataError("no labelled training row is left")
    lost = np.setdiff1d(np.flatnonzero(carried.any(0)), left)
    if len(lost):
        name = captions.class_names[int(lost[0])]
        raise DataError(f"no training image of the class '{name}' can be used, but test images of it can")
    if labels.ndim == 2:
        return labels[:, left], left
    numbers = np.full(len(captions.class_names) + 1, -1, dtype=np.int64)
    numbers[left] = np.arange(len(left))
    return numbers[labels], left


def read_tables(config: ExtractConfig) -> tuple[Captions | None, dict[str, str] | None]:
    """The captions, and the text of each class, where they are given."""
    if not config.captions:
        return None, None
    by_class = bool(config.class_captions)
    captions = read_captions(Path(config.captions), config.label_separator, by_class=by_class)
    return captions, read_class_texts(Path(config.class_captions), captions.class_names) if by_class else None


def with_texts(
    captions: Captions,
    described: dict[str, str] | None,
    images: Sequence[str],
    used: NDArray[np.bool_],
    features: Features,
    words: TextEncoder,
    parts: Path,
) -> tuple[dict[str, Any], int]:
    """The arrays that training reads, of the rows whose image was ``used``, with their texts or their classes', and how
    many images were held out."""
    place = {image: i for i, image in enumerate(images)}
    index = np.array([place[image] for image in captions.images])
    kept = used[index]
    visual = features[(np.cumsum(used) - 1)[index[kept]]]
    train, held_out = training_rows(captions, kept)
    if described is not None:
        arrays = captioned(captions, kept, train, visual, None)
        texts = [described[name] for name in arrays["class_names"].tolist()]
        arrays["text_classes"] = see_texts(texts, np.ones(len(texts), dtype=bool), words, parts)
        return arrays, held_out
    texts = [text for text, keep in zip(captions.texts, kept, strict=True) if keep]
    return captioned(captions, kept, train, visual, see_texts(texts, train[kept], words, parts)), held_out


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """The arrays whole or not at all; those of strings go into a safetensors file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft:
        if path.suffix == ".npz":
            save_npz(draft, arrays)
            return
        metadata = {name: json.dumps(value.tolist()) for name, value in arrays.items() if name in STRINGS}
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items() if name not in STRINGS}
        save_file(tensors, draft, metadata=metadata)


def summary(about: dict[str, Any], arrays: dict[str, Any]) -> str:
    """What was read, left out and converted, in a few lines."""
    lines = [f"{about['images']} images, {about['images'] - len(about['left_out'])} used"]
    if about["left_out"]:
        reasons = Counter(entry["problem"].partition(" (")[0] for entry in about["left_out"])
        lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())))
        shown = about["left_out"][:_SHOWN]
        lines += [printable(f"  {entry['image']}: {entry['problem']}") for entry in shown]
        if len(about["left_out"]) > _SHOWN:
            lines.append(f"  and {len(about['left_out']) - _SHOWN} more")
    if about["converted"]:
        lines.append("converted: " + ", ".join(f"{count} {kind}" for kind, count in about["converted"].items()))
    if about["classes_left_out"]:
        names = ", ".join(about["classes_left_out"][:_SHOWN])
        more = f" and {len(about['classes_left_out']) - _SHOWN} more" if len(about["classes_left_out"]) > _SHOWN else ""
        lines.append(f"classes with a text but no training image, left out: {names}{more}")
    if about["images_held_out"]:
        lines.append(f"test part: {about['images_held_out']} images held out, all their rows with them")
    for name, array in arrays.items():
        missing = int(np.isnan(array[:, 0]).sum()) if name.startswith("text") else 0
        lines.append(f"{name:<13} {tuple(array.shape)}" + (f", {missing} rows without text" if missing else ""))
    return "\n".join(lines)


def _tells_of_images(path: Path) -> bool:
    """Whether a file is what this command writes beside features."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"images", "vision", "used", "left_out"} <= found.keys()


def extract(config: ExtractConfig) -> str:
    """The whole command; returns the summary to print."""
    out = output_file(config.out, "--out", (".npz", ".safetensors"))
    about_file = output_file(str(out.with_name(f"{out.name}.json")), "--out", (".json",))
    for file in (out, about_file):
        # A run that was stopped between the two leaves its own.
        if file.exists() and not config.overwrite and not (file is about_file and _tells_of_images(file)):
            raise DataError(f"--out: {file} is there already; give another name or --overwrite")
    if not os.path.isdir(config.images):
        raise DataError(f"--images {config.images} is not a folder")
    captions, described = read_tables(config)
    # An image may stand in several rows, with a caption each, and is seen once.
    images = list(dict.fromkeys(captions.images)) if captions else find_images(Path(config.images))
    if not images:
        raise DataError(f"--images {config.images} holds no image file")
    device = choose_device(config.device)
    encoder = vision_encoder(config.vision, device)
    words = text_encoder(config.text, device, dim=config.text_dim, batch_size=config.batch_size) if captions else None
    job = job_of(config, encoder.fingerprint, words.fingerprint if words else "")
    with parts_folder(out, job) as parts:
        seen = see_images(config, images, encoder, device, parts)
        used = seen.problems == ""
        arrays: dict[str, Any] = {"visual": seen.features, "names": row_names(np.array(images)[used])}
        held_out = 0
        if captions and words:
            arrays, held_out = with_texts(captions, described, images, used, seen.features, words, parts)
        about = {
            "images": len(images),
            "vision": config.vision,
            "text": config.text if captions else None,
            "used": [image for image, use in zip(images, used, strict=True) if use],
            "left_out": [
                {"image": image, "problem": str(why)} for image, why in zip(images, seen.problems, strict=True) if why
            ],
            "converted": dict(sorted(Counter(n for notes in seen.notes for n in notes.split(",") if n).items())),
            "images_held_out": held_out,
            "classes_left_out": sorted(set(described or ()) - set(arrays.get("class_names", np.array([])).tolist())),
        }
        told = summary(about, arrays)
        # The features last: where they are, everything is.
        with atomic_path(about_file) as draft:
            draft.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        write_arrays(out, arrays)
        clear_parts(parts)
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""

    def body() -> None:
        config = ExtractConfig(**settings_of(PROGRAM, __doc__, {"extract": ExtractConfig}, argv)["extract"])
        torch.backends.cudnn.deterministic = True
        # Our own limit speaks, once and in one sentence.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        print(extract(config))
        print(f"\nwritten: {config.out}, {config.out}.json")

    return run(body, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
