"""Sets made from packages of emoji and clip art: tiny packages of the same layout."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from seda_fast import FeatureSet

Image = pytest.importorskip("PIL.Image")

from benchmarks.quality import outside  # noqa: E402 - needs Pillow

WORDS = ("round smiling face", "square blue sign")


def picture(file: Path, kind: int, number: int, side: int = 40) -> None:
    """Bars one way or the other, in a colour of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((side, side, 4), np.uint8)
    bars = np.arange(side) // 4 % 2 == 0
    pixels[bars if kind else slice(None), slice(None) if kind else bars] = (200, number % 250, 40 * kind, 255)
    Image.fromarray(pixels).save(file)


def emoji_packages(folder: Path) -> None:
    entries, annotated = [], []
    for number in range(120):
        kind, code = number % 2, f"1F{number:03X}"
        picture(folder / "emoji-datasource-google" / "img" / "google" / "64" / f"{code}.png", kind, number)
        names = {"name": WORDS[kind].upper(), "short_names": ["some_name"], "non_qualified": None}
        category = "Component" if number >= 110 else ("Faces", "Signs")[kind]
        entries.append(
            {**names, "unified": code, "image": f"{code}.png", "category": category, "subcategory": f"s{kind}"}
        )
        annotated.append({"hexcode": code, "annotation": "note", "tags": f"tag {kind}", "openmoji_tags": ""})
    (folder / "emoji-datasource-google" / "emoji.json").write_text(json.dumps(entries))
    (folder / "openmoji" / "data").mkdir(parents=True)
    (folder / "openmoji" / "data" / "openmoji.json").write_text(json.dumps(annotated))


def clip_art_package(folder: Path) -> None:
    root = folder / "openclipart"
    for number in range(80):
        kind = number % 2
        name = Path(("animals/birds", "food")[kind]) / "deep" / f"thing_{number:02}"
        picture(root / "png" / name.with_suffix(".png"), kind, number)
        drawing = root / "svg" / name.parent / f"{name.name}.svg"
        drawing.parent.mkdir(parents=True, exist_ok=True)
        source = f"<svg><dc:title>{WORDS[kind]}</dc:title><rdf:li>key{kind}</rdf:li></svg>".encode()
        if number % 4 < 2:
            drawing.write_bytes(source)
        else:
            drawing.with_suffix(".svgz").write_bytes(gzip.compress(source))
    huge = root / "png" / "animals" / "birds" / "huge.png"
    Image.new("1", (5000, 5000)).save(huge)
    (root / "svg" / "animals" / "birds" / "huge.svg").write_text("<svg/>")
    picture(root / "png" / "food" / "without_drawing.png", 0, 1)


def stamps_package(folder: Path) -> None:
    for number in range(60):
        kind = number % 2
        file = folder / "tuxpaint" / "stamps" / ("animals/birds/deep", "food")[kind] / f"{number:02}_thing.png"
        picture(file, kind, number)
        file.with_suffix(".txt").write_text(f"A {WORDS[kind]}.\nde.utf8=Unsinn\n", encoding="utf-8")
    picture(folder / "tuxpaint" / "stamps" / "food" / "silent.png", 0, 1)


def icons_package(folder: Path) -> None:
    for number in range(100):
        kind, name = number % 2, f"{WORDS[number % 2].replace(' ', '-')}-{number}.png"
        for side in (16, 64):
            # Small ones show the other class's bars.
            size = folder / "oxygen" / "base" / f"{side}x{side}" / ("actions", "places")[kind]
            picture(size / name, kind if side == 64 else 1 - kind, number, side)
    (size / "alias.png").symlink_to(name)


def line_icons_package(folder: Path) -> None:
    known = {}
    for number in range(220):
        kind = number % 2
        name = f"{WORDS[kind].replace(' ', '-')}-{number}"
        known[name] = {"category": ("Animals", "Food")[kind], "tags": [WORDS[kind], 24]}
        picture(folder / "tabler-icons-png" / "icons" / "outline" / f"{name}.png", kind, number)
    known["not-drawn"] = {"category": "Food", "tags": []}
    known["of-no-category-cat"] = {"category": "", "tags": []}
    picture(folder / "tabler-icons-png" / "icons" / "outline" / "of-no-category-cat.png", 0, 1)
    (folder / "tabler-icons").mkdir()
    (folder / "tabler-icons" / "icons.json").write_text(json.dumps(known), encoding="utf-8")


def test_sets_are_what_training_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emoji_packages(tmp_path)
    clip_art_package(tmp_path)
    stamps_package(tmp_path)
    icons_package(tmp_path)
    line_icons_package(tmp_path)
    assert outside.main([str(tmp_path), str(tmp_path / "out")]) == 0
    names = {"emoji_categories": ("Faces", "Signs"), "emoji_subcategories": ("s0", "s1")}
    names["openclipart"] = ("animals/birds", "food/deep")
    names["tuxpaint"] = ("animals/birds", "food")
    names["oxygen"] = ("actions", "places")
    names["tabler"] = ("Animals", "Food")
    said = capsys.readouterr().out.splitlines()
    for name, line in zip(names, said, strict=True):
        found = FeatureSet.load(tmp_path / "out" / f"{name}.npz")
        rows = {"openclipart": 80, "tuxpaint": 60, "oxygen": 100, "tabler": 2 * outside.MOST_LINE_ICONS_OF_CLASS}.get(
            name, 110
        )
        assert found.class_names == names[name]
        assert len(found.label_test) == 2 * round(0.3 * rows / 2)
        assert len(found.label_train) + len(found.label_test) == rows
        assert line == f"{name}.npz: {len(found.label_train)} and {len(found.label_test)} rows, 2 classes"
        # Bars and words tell the classes.
        for part in (found.visual_train, found.text_train):
            centres = np.stack([part[found.label_train == k].mean(0) for k in (0, 1)])
            nearest = np.linalg.norm(part[:, None] - centres, axis=2).argmin(1)
            assert (nearest == found.label_train).mean() > 0.95


def test_absent_packages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_art_package(tmp_path)
    assert outside.main([str(tmp_path), str(tmp_path / "out")]) == 0
    refused = capsys.readouterr().err
    assert "no folder emoji-datasource-google" in refused and "no folder openmoji" in refused
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["openclipart.npz"]
    assert outside.main([str(tmp_path / "out"), str(tmp_path / "none")]) == 2


def test_features_of_an_image_are_the_same_for_any_size(tmp_path: Path) -> None:
    for side in (64, 640):
        Image.new("RGBA", (side, side), (250, 0, 0, 255)).save(tmp_path / f"{side}.png")
    small, large = (outside.image_features(tmp_path / f"{side}.png") for side in (64, 640))
    assert small.shape == (2212,)
    np.testing.assert_allclose(small, large, atol=1e-6)


def test_an_image_lies_in_one_part_whatever_folders_it_lies_in() -> None:
    rng = np.random.default_rng(0)
    own, shared = rng.standard_normal((40, 3)).astype(np.float32), rng.standard_normal((10, 3)).astype(np.float32)
    visual = np.concatenate([own, own, shared, shared])
    labels = np.array([*np.arange(40) % 2, *np.arange(40) % 2, *[0] * 10, *[1] * 10])
    test = outside._held_out(visual, labels)
    assert np.array_equal(test[:40], test[40:80]) and np.array_equal(test[80:90], test[90:])
    assert all(0.25 < test[labels == label].mean() < 0.6 for label in (0, 1))
    assert np.array_equal(test, outside._held_out(visual, labels))
