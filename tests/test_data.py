"""FeatureSet: what it reads, how it splits, and the one sentence for everything it refuses."""

import io
import json
import os
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seda_fast import SeDAClassifier, SeDAConfig, digits
from seda_fast.data import KEYS, DataError, FeatureSet, load_visual, mean_and_deviation, rows, split_rows
from seda_fast.files import atomic_path, check_writable, read_arrays, save_npz
from seda_fast.prepare import prepare

NAMES = ("cat", "dog", "eel")


def arrays(seed=0, **changes):
    """A sound set of 24 + 12 rows and 3 classes; a change replaces an array, None removes it."""
    random = np.random.default_rng(seed)
    made = {
        "visual_train": random.normal(size=(24, 6)).astype(np.float32),
        "text_train": random.normal(size=(24, 4)).astype(np.float32),
        "label_train": np.arange(24) % 3,
        "visual_test": random.normal(size=(12, 6)).astype(np.float32),
        "label_test": np.arange(12) % 3,
        "text_test": random.normal(size=(12, 4)).astype(np.float32),
        "class_names": np.array(NAMES),
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


UNSPLIT = {"visual_test": None, "label_test": None, "text_test": None}


def write(kind, folder, content):
    """Writes `content` as one of the four kinds and returns the path."""
    folder.mkdir(exist_ok=True)
    if kind == "folder":
        for name, value in content.items():
            np.save(folder / f"{name}.npy", value)
        return folder
    path = folder / f"set.{'safetensors' if kind == 'safetensors' else 'npz'}"
    if kind == "safetensors":
        named = "class_names" in content
        metadata = {"class_names": json.dumps([str(name) for name in content["class_names"]])} if named else {}
        tensors = {name: torch.from_numpy(np.array(v)) for name, v in content.items() if name != "class_names"}
        save_file(tensors, path, metadata)
    else:
        (np.savez_compressed if kind == "packed" else np.savez)(path, **content)
    return path


def with_value(name, place, value):
    content = arrays()
    content[name] = content[name].copy()
    content[name][place] = value
    return content


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def refusal(call, *args, **options):
    """The sentence of the DataError that the call raises."""
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) < 600
    return sentence


# ---- reading what is sound ----


@pytest.mark.parametrize("kind", ["npz", "packed", "safetensors", "folder"])
def test_every_format_gives_the_same_set(kind, tmp_path):
    content = arrays(label_train=changed(np.arange(24) % 3, 5, -1))
    path = write(kind, tmp_path / "in", content)
    found = FeatureSet.load(path)
    for name in content.keys() - {"class_names"}:
        np.testing.assert_array_equal(getattr(found, name), content[name])
        assert getattr(found, name).dtype == content[name].dtype
    assert found.class_names == NAMES and found.source == str(path)
    assert (found.n_classes, found.visual_dim, found.text_dim) == (3, 6, 4)
    assert found.ids_train.tolist() == list(range(24)) and found.ids_test.tolist() == list(range(12))
    assert found.paired_train.all() and found.labelled_train.tolist() == [i != 5 for i in range(24)]


def test_a_folder_stays_a_memory_map_of_its_own_dtype(tmp_path):
    content = arrays(visual_train=np.asfortranarray(arrays()["visual_train"].astype(">f8")))
    content["text_train"] = content["text_train"].astype(np.float16)
    found = FeatureSet.load(write("folder", tmp_path / "in", content))
    for array in (found.visual_train, found.text_train, found.visual_test):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    assert found.visual_train.dtype == np.dtype(">f8") and found.text_train.dtype == np.float16
    picked = rows(found.visual_train, np.array([3, 1]))
    assert picked.dtype == np.float32 and picked.flags.writeable and picked.flags.c_contiguous
    np.testing.assert_array_equal(picked, content["visual_train"][[3, 1]].astype(np.float32))


def test_a_map_is_checked_and_measured_without_loading_it(tmp_path):
    """100 MB of features under an address-space limit that leaves no room for a copy of them."""
    folder = tmp_path / "in"
    write("folder", folder, arrays(visual_test=np.ones((12, 256), np.float32)))
    big = np.lib.format.open_memmap(folder / "visual_train.npy", "w+", np.float32, (100_000, 256))
    big[:] = np.arange(256)
    text = np.zeros((100_000, 4), np.float32)
    np.save(folder / "text_train.npy", text)
    np.save(folder / "label_train.npy", np.arange(100_000) % 3)
    code = (
        "import sys, resource\n"
        "from seda_fast.data import FeatureSet, mean_and_deviation\n"
        "used = lambda: int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()\n"
        "limit = used() + 60_000_000\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "found = FeatureSet.load(sys.argv[1])\n"
        "mean, deviation = mean_and_deviation(found.visual_train)\n"
        "assert mean[7] == 7 and deviation[7] == 0\n"
    )
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, folder], check=True, env=env)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_features_in_memory_become_float32(dtype, tmp_path):
    content = arrays(visual_train=arrays()["visual_train"].astype(dtype))
    found = FeatureSet.load(write("npz", tmp_path / "in", content))
    assert found.visual_train.dtype == np.float32
    np.testing.assert_array_equal(found.visual_train, content["visual_train"].astype(np.float32))


def test_bfloat16_of_safetensors_is_widened(tmp_path):
    visual = torch.randn(24, 6).bfloat16()
    content = {k: torch.from_numpy(v) for k, v in arrays(class_names=None).items()} | {"visual_train": visual}
    save_file(content, tmp_path / "set.safetensors")
    np.testing.assert_array_equal(FeatureSet.load(tmp_path / "set.safetensors").visual_train, visual.float().numpy())


def test_from_arrays_takes_lists_and_tensors_and_keeps_float32_without_a_copy():
    content = arrays()
    found = FeatureSet.from_arrays(**content)
    assert np.shares_memory(found.visual_train, content["visual_train"])
    plain = {key: value.tolist() for key, value in content.items()}
    assert np.array_equal(FeatureSet.from_arrays(**plain).visual_train, content["visual_train"])
    tensors = {k: torch.from_numpy(v) for k, v in arrays(class_names=None).items()}
    assert FeatureSet.from_arrays(**tensors).class_names == ("0", "1", "2")


def test_text_may_be_absent_only_when_not_needed():
    content = arrays(text_train=None, text_test=None)
    found = FeatureSet.from_arrays(text_train=None, **content, need_text=False)
    assert found.text_train.shape == (24, 0) and found.text_test is None and not found.paired_train.any()
    assert "lacks the key 'text_train'" in refusal(FeatureSet.from_arrays, text_train=None, **content)


def test_rows_without_text_are_kept_on_request():
    content = with_value("text_train", [2, 9], np.nan)
    found = FeatureSet.from_arrays(**content, unpaired="keep")
    assert np.flatnonzero(~found.paired_train).tolist() == [2, 9]
    sentence = refusal(FeatureSet.from_arrays, **content)
    assert "lacks the text of 2 of 24 rows" in sentence and "row 2" in sentence and "--unpaired keep" in sentence


def test_missing_text_of_the_test_part_obeys_the_same_option():
    content = with_value("text_test", 4, np.nan)
    part = FeatureSet.from_arrays(**content, unpaired="keep").test_part
    assert np.flatnonzero(~part.paired).tolist() == [4]
    assert "'text_test' lacks the text of 1 of 12 rows" in refusal(FeatureSet.from_arrays, **content)


def test_unlabelled_test_rows_are_allowed_but_not_only_those(tmp_path):
    found = FeatureSet.from_arrays(**with_value("label_test", 0, -1))
    assert found.test_part.labelled.tolist() == [False] + [True] * 11
    content = arrays(label_test=np.full(12, -1))
    assert "'label_test' has no labelled row" in refusal(FeatureSet.from_arrays, **content)


def test_classes_beyond_the_labels_may_be_named():
    found = FeatureSet.from_arrays(**arrays(class_names=np.array([*NAMES, "fox"])))
    assert found.n_classes == 4


# ---- splitting ----


def test_the_split_is_stratified_seeded_and_keeps_the_unlabelled_in_training():
    labels = np.repeat([0, 1, -1, 2], [10, 40, 25, 50])
    visual = np.arange(125.0)[:, None]
    made = [FeatureSet.from_arrays(visual, visual, labels, seed=seed) for seed in (3, 3, 4)]
    first = made[0]
    assert [int((first.label_test == k).sum()) for k in (0, 1, 2)] == [2, 8, 10]
    assert (first.label_train == -1).sum() == 25 and first.labelled_train.sum() == 80
    assert sorted([*first.ids_train, *first.ids_test]) == list(range(125))
    for array, ids in (
        (first.visual_train, first.ids_train),
        (first.text_train, first.ids_train),
        (first.visual_test, first.ids_test),
        (first.text_test, first.ids_test),
    ):
        assert array[:, 0].tolist() == ids.tolist()
    assert labels[first.ids_test].tolist() == first.label_test.tolist()
    assert made[1].ids_test.tolist() == first.ids_test.tolist() != made[2].ids_test.tolist()
    assert FeatureSet.from_arrays(visual, visual, labels, seed=2**63).n_classes == 3


@pytest.mark.parametrize(
    "labels, fraction, words",
    [
        ([0] * 9 + [1], 0.2, "class 1 has one labelled row, so no test part"),
        ([0] * 9 + [1] + [-1] * 5, 0.2, "class 1 has one labelled row, so no test part"),
        ([0, 0, 1, 1, 2, 2], 0.2, "too few rows in a part for 3 classes"),
        ([0] * 30 + [1, 1], 0.9, "too few rows in a part for 2 classes"),
        ([0, 0, 1, 1], 0.0, "test_fraction is 0.0"),
        ([0, 0, 1, 1], 1.0, "test_fraction is 1.0"),
        ([0, 0, 1, 1], float("nan"), "test_fraction is nan"),
    ],
)
def test_splits_that_cannot_be(labels, fraction, words):
    visual = np.arange(2.0 * len(labels)).reshape(-1, 2)
    assert words in refusal(FeatureSet.from_arrays, visual, visual, labels, test_fraction=fraction)


def test_unlabelled_rows_cannot_be_split():
    assert "no row is labelled" in refusal(split_rows, np.full(9, -1), 0.2, 0)
    assert "no row is labelled" in refusal(split_rows, np.full((9, 3), -1), 0.2, 0)


def prepared(visual, text, labels):
    config = SeDAConfig(visual_dim=visual.shape[1], text_dim=text.shape[1], n_classes=3, width=16, blocks=1)
    prepare(FeatureSet.from_arrays(visual, text, labels, unpaired="keep"), config, 0, torch.device("cpu"))


def test_float64_features_that_float32_cannot_tell_apart_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    visual, text, labels = rng.normal(size=(60, 4)), rng.normal(size=(60, 3)), np.arange(60) % 3
    text[::7] = np.nan
    for name, far in (("visual", (visual + 1e8, text)), ("text", (visual, text - 1e9))):
        words = refusal(FeatureSet.from_arrays, *far, labels, unpaired="keep")
        assert f"'{name}_train' holds rows that float32 cannot tell apart: column 0 goes from " in words
    constant = np.full((60, 1), 0.1) * rng.integers(1, 2, (60, 1)) + rng.normal(size=(60, 1)) * 1e-18
    for near in (visual + 1e6, np.hstack((visual[:, :1], constant)), np.hstack((visual[:, :1], visual[:, 1:] + 1e9))):
        FeatureSet.from_arrays(near, text, labels, unpaired="keep")
    folder = tmp_path / "set"
    folder.mkdir()
    for name, array in (("visual_train", visual + 1e8), ("text_train", text), ("label_train", labels)):
        np.save(folder / f"{name}.npy", array)
    assert "'visual_train' holds rows that float32 cannot tell apart" in refusal(FeatureSet.load, folder)
    for single, factor in ((np.float64, 1e-50), (np.float32, 1e-42)):
        tiny = {"visual": (visual * factor).astype(single), "text": (text * factor).astype(single)}
        for name, (v, t) in (("visual", (tiny["visual"], text)), ("text", (visual, tiny["text"]))):
            with pytest.raises(DataError, match=f"'{name}_train'.*multiply (it|them) first"):
                prepared(v, t, labels)
    prepared(visual * 1e-30, text, labels)
    few = np.ones((60, 2))
    few[:30] += 2.0**-20  # eight neighbours of float32 away
    FeatureSet.from_arrays(few, text, labels, few[:6], labels[:6], unpaired="keep")
    for far in (visual + 1e8, (visual + 1e8).tolist(), (10**9 + 3 * visual).astype(int)):
        with pytest.raises(DataError, match="'X' holds rows that float32 cannot tell apart"):
            SeDAClassifier(epochs=1).fit(far, labels)


def test_rows_that_nothing_is_learnt_from_may_be_as_alike_as_they_are(tmp_path):
    """One image twice, decoded by two libraries: each alone is measured and predicted, and so are both."""
    rng = np.random.default_rng(0)
    visual, text, labels = rng.normal(size=(60, 4)), rng.normal(size=(60, 3)), np.arange(60) % 3
    twice = np.repeat(visual[:1], 2, 0) * (1 + 1e-9 * rng.normal(size=(2, 4)))
    words = np.repeat(text[:1], 2, 0) * (1 + 1e-9 * rng.normal(size=(2, 3)))
    assert (twice[0] != twice[1]).all() and (twice[0].astype("f4") == twice[1].astype("f4")).all()
    test = {"visual_test": twice, "text_test": words, "label_test": labels[:1].repeat(2)}
    np.savez(tmp_path / "test.npz", **test)
    np.savez(tmp_path / "new.npz", visual=twice)
    np.save(tmp_path / "new.npy", twice)
    assert (load_visual(tmp_path / "new.npz").visual == twice.astype("f4")).all()
    assert len(load_visual(tmp_path / "new.npy").visual) == 2
    assert len(load_visual(tmp_path / "test.npz").visual) == 2
    assert len(FeatureSet.load_test(tmp_path / "test.npz").visual) == 2
    assert len(FeatureSet.from_arrays(visual, text, labels, **test).visual_test) == 2
    # Class texts are learnt from.
    alike = np.repeat(words[:1], 3, 0) * (1 + 1e-9 * rng.normal(size=(3, 3)))
    said = refusal(FeatureSet.from_arrays, visual, None, labels, text_classes=alike)
    assert "'text_classes' holds rows that float32 cannot tell apart" in said
    with pytest.raises(DataError, match="'text_classes' holds rows that float32 cannot tell apart"):
        SeDAClassifier(epochs=1).fit(visual, labels, text_classes=alike)
    with pytest.raises(DataError, match="'text' holds rows that float32 cannot tell apart"):
        SeDAClassifier(epochs=1).fit(visual, labels, text=np.repeat(alike, 20, 0))


def test_an_image_is_held_out_by_whichever_of_its_rows_is_drawn():
    """The row that stands for an image may be another than its first."""
    rng = np.random.default_rng(0)
    visual = np.repeat(rng.standard_normal((100, 4)), 2, 0)
    found = FeatureSet.from_arrays(visual, visual, np.tile([0, 1], 100), test_fraction=0.2)
    assert len(found.label_test) == 40
    # A class that comes second alone: 30 images of it beside 200 of one row.
    visual = np.vstack((np.repeat(rng.standard_normal((30, 4)), 2, 0), rng.standard_normal((200, 4))))
    labels = np.r_[np.tile([0, 2], 30), np.arange(200) % 2]
    for seed in range(3):
        found = FeatureSet.from_arrays(visual, visual, labels, test_fraction=0.2, seed=seed)
        assert np.bincount(found.label_test, minlength=3)[2] in (5, 6, 7)


def test_rows_of_an_image_are_never_in_both_parts():
    """As where an image has several captions: copies of a test row in training flatter whatever learns by heart."""
    rng = np.random.default_rng(0)
    image = rng.permutation(np.repeat(np.arange(60), rng.integers(1, 6, 60)))
    visual, labels = rng.standard_normal((60, 4))[image], image % 3
    text = rng.standard_normal((len(image), 2))
    for seed in range(5):
        found = FeatureSet.from_arrays(visual, text, labels, seed=seed)
        held = set(image[found.ids_test])
        assert len(held) == 12 and not held & set(image[found.ids_train])
        assert sorted([*found.ids_train, *found.ids_test]) == list(range(len(image)))
        assert np.bincount(found.label_test, minlength=3).min() > 0
    # An image with an unlabelled row stays in training, which that row may not leave.
    some = np.where((image < 30) & (np.arange(len(image)) % 2 == 0), -1, labels)
    found = FeatureSet.from_arrays(visual, text, some)
    assert found.label_test.min() >= 0 and not set(image[found.ids_test]) & set(image[found.ids_train])
    many = (np.arange(3) == labels[:, None]).astype(np.int64)
    found = FeatureSet.from_arrays(visual, text, many)
    assert len(found.ids_test) > 9 and not set(image[found.ids_test]) & set(image[found.ids_train])
    # Of an image that is of two classes each has its turn.
    twice = FeatureSet.from_arrays(np.repeat(visual[:40], 2, 0), np.repeat(text[:40], 2, 0), np.tile([0, 1], 40))
    assert set(twice.label_test) == {0, 1} and not set(twice.ids_test // 2) & set(twice.ids_train // 2)
    for pattern in ([0, 1, 0, 2], [0, 1, 0, -1, 0, 2]):
        mixed = FeatureSet.from_arrays(
            np.repeat(visual[:36], 2, 0), np.repeat(text[:36], 2, 0), np.tile(pattern, 72 // len(pattern))
        )
        known = np.array(pattern) >= 0
        assert set(mixed.label_test) == {0, 1, 2} if known.all() else len(mixed.label_test)
        assert set(mixed.label_train) >= {0, 1, 2}
    words = refusal(
        FeatureSet.from_arrays, visual[[0, 0, 1, 1, 2, 3, 4]], text[:7], [0, -1, 0, -1, 1, 1, 1]
    )  # fmt: skip
    assert "class 0 has no image (rows of equal features) that has no unlabelled rows" in words
    words = refusal(FeatureSet.from_arrays, np.ones((9, 4)), np.ones((9, 2)), np.arange(9) % 2)
    assert "class 1 has no image (rows of equal features) that has no unlabelled rows and no other class's" in words
    words = refusal(FeatureSet.from_arrays, visual[[0, 1, 2, 3, 4, 4, 4]], text[:7], [0, 0, 0, 0, 1, 1, 1])
    assert "has labelled rows of one image only (their features are equal)" in words


def test_a_split_of_a_folder_is_float32_in_memory(tmp_path):
    path = write("folder", tmp_path / "in", arrays(**UNSPLIT))
    found = FeatureSet.load(path, test_fraction=0.25)
    assert not isinstance(found.visual_train, np.memmap) and len(found.visual_test) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 10)
        sentence = refusal(FeatureSet.load, path)
    assert "GB of memory" in sentence and "folder of .npy files with a test part" in sentence


# ---- one sentence for each refusal ----

LABELS = np.arange(24) % 3
REFUSED = {
    "missing key": (arrays(visual_train=None), "lacks the key 'visual_train'"),
    "missing keys": (arrays(label_train=None, text_train=None), "lacks the keys 'label_train', 'text_train'"),
    "half a test part": (arrays(label_test=None), "lacks the key 'label_test'"),
    "text of no test part": (arrays(label_test=None, visual_test=None), "lacks the keys 'visual_test'"),
    "lengths": (arrays(label_train=LABELS[1:]), "'label_train' has 23 rows but 'visual_train' has 24"),
    "text length": (arrays(text_train=np.ones((9, 4))), "'text_train' has 9 rows but 'visual_train' has 24"),
    "test lengths": (arrays(label_test=LABELS), "'label_test' has 24 rows but 'visual_test' has 12"),
    "test text length": (
        arrays(text_test=np.ones((9, 4))),
        "'text_test' has 9 rows but 'visual_test' has 12",
    ),
    "width": (arrays(visual_test=np.ones((12, 5))), "'visual_test' has 5 columns but 'visual_train' has 6"),
    "text width": (arrays(text_test=np.ones((12, 5))), "'text_test' has 5 columns but 'text_train' has 4"),
    "rank": (arrays(visual_train=np.ones((24, 6, 1))), "'visual_train' has 3 dimensions, 2 needed"),
    "label rank": (arrays(label_train=LABELS[:, None]), "'label_train' holds 2 in row 2, column 0; labels of 2 dim"),
    "scalar": (arrays(label_test=np.array(3)), "'label_test' has 0 dimensions, 1 or 2 needed"),
    "nan": (with_value("visual_train", (7, 2), np.nan), "'visual_train' holds NaN in row 7, column 2"),
    "infinity": (
        with_value("visual_test", (3, 0), np.inf),
        "'visual_test' holds infinity in row 3, column 0",
    ),
    "overflow": (
        arrays(visual_train=changed(np.ones((24, 6)), (5, 1), -1e39)),
        "'visual_train' holds -1e+39, beyond float32, in row 5, column 1",
    ),
    "half a text": (
        with_value("text_train", (8, 3), np.nan),
        "'text_train' holds NaN in row 8, column 3; only",
    ),
    "infinite text": (with_value("text_test", (8, 3), -np.inf), "'text_test' holds infinity in row 8"),
    "no text": (arrays(text_train=np.full((24, 4), np.nan)), "lacks the text of 24 of 24 rows"),
    "floating labels": (
        arrays(label_train=LABELS * 1.0),
        "'label_train' has dtype float64, integers or names of classes are needed",
    ),
    "boolean labels": (
        arrays(label_train=LABELS > 1),
        "'label_train' has dtype bool, integers or names of classes are needed",
    ),
    "label below -1": (
        with_value("label_train", 6, -2),
        "'label_train' holds -2 in row 6; a class from 0 up",
    ),
    "huge label": (
        arrays(label_train=changed(LABELS.astype(np.uint64), 2, 2**63)),
        "'label_train' holds 9223372036854775808 in row 2",
    ),
    "no label": (arrays(label_train=np.full(24, -1)), "'label_train' has no labelled row"),
    "one class": (arrays(label_train=np.where(LABELS == 1, 1, -1)), "'label_train' holds class 1 ('dog') alone"),
    "too few names": (
        arrays(class_names=np.array(NAMES[:2])),
        "holds 2 in row 2 but 'class_names' has 2 entries",
    ),
    "gap": (
        arrays(class_names=None, label_train=LABELS * 2),
        "'label_train' holds class 4 but no class 1; number the classes without gaps or give 'class_names'",
    ),
    "test class unknown": (
        arrays(label_train=np.where(LABELS == 2, 1, LABELS)),
        "'label_test' holds class 2 ('eel') in row 2, which 'label_train' lacks",
    ),
    "test label unnamed": (
        with_value("label_test", 4, 3),
        "'label_test' holds 3 in row 4 but 'class_names' has 3",
    ),
    "test label unnamed, without names": (
        arrays(class_names=None, label_test=changed(LABELS[:12], 4, 3)),
        "'label_test' holds class 3 in row 4, which 'label_train' lacks",
    ),
    "empty": (arrays(visual_train=np.ones((0, 6))), "'visual_train' is empty"),
    "empty labels": (arrays(label_test=np.ones(0, int)), "'label_test' is empty"),
    "no columns": (arrays(text_train=np.ones((24, 0))), "'text_train' has no columns"),
    "integers": (arrays(visual_train=np.ones((24, 6), int)), "'visual_train' has dtype int64, float16"),
    "complex": (
        arrays(visual_train=np.ones((24, 6), np.complex64)),
        "'visual_train' has dtype complex64, float16",
    ),
    "strings": (arrays(text_train=np.full((24, 6), "a")), "'text_train' has dtype <U1, float16"),
    "records": (arrays(text_train=np.ones((24, 6), [("a", "f4")])), "'text_train' has dtype [('a', '<f4')]"),
    "long doubles": (arrays(text_train=np.ones((24, 6), np.longdouble)), "'text_train' has dtype "),
    "byte names": (
        arrays(class_names=np.array(NAMES, "S")),
        "'class_names' has dtype |S3, strings are needed",
    ),
    "same names": (arrays(class_names=np.array(["a", "b", "a"])), "entries 0 and 2 the same name"),
    "blank name": (arrays(class_names=np.array(["a", " ", "b"])), "entry 1 is blank or holds control"),
    "broken name": (arrays(class_names=np.array(["a", "b\n", "c"])), "entry 1 is blank or holds control"),
}  # fmt: skip
# No such array in safetensors; in the last one, no class names to write beside them.
SAFETENSORS_CANNOT = ("long doubles", "strings", "records", "byte names", "gap")
SAFETENSORS_SAYS = {
    "boolean labels": "'label_train' has the unsupported dtype BOOL",
    "complex": "'visual_train' has the unsupported dtype C64",
}


@pytest.mark.parametrize(
    "case, kind",
    [
        (case, kind)
        for case in REFUSED
        for kind in ("arrays", "npz", "safetensors", "folder")
        if kind != "safetensors" or case not in SAFETENSORS_CANNOT
    ],
)
def test_refused_with_one_sentence(case, kind, tmp_path):
    content, words = REFUSED[case]
    if kind == "arrays":
        sentence = refusal(FeatureSet.from_arrays, **{**dict.fromkeys(KEYS[:3]), **content}, source="mine")
        assert sentence.startswith("mine: ")
    else:
        path = write(kind, tmp_path / "in", content)
        sentence = refusal(FeatureSet.load, path)
        assert sentence.startswith(f"{path}: ")
        words = SAFETENSORS_SAYS.get(case, words) if kind == "safetensors" else words
    assert words in sentence


def test_options_are_checked():
    assert "unpaired is 'drop'" in refusal(FeatureSet.from_arrays, **arrays(), unpaired="drop")
    assert "the seed is -1" in refusal(FeatureSet.from_arrays, **arrays(), seed=-1)


def test_no_text_at_all_is_refused_even_when_missing_text_is_kept():
    content = arrays(text_train=np.full((24, 4), np.nan))
    assert "no row with text" in refusal(FeatureSet.from_arrays, **content, unpaired="keep")


def test_arrays_that_are_none():
    words = "'visual_train' is no array"
    assert words in refusal(FeatureSet.from_arrays, **arrays(visual_train=[[1.0], [1.0, 2.0]]))
    assert words in refusal(FeatureSet.from_arrays, **arrays(visual_train=torch.ones(24, 6, requires_grad=True)))
    masked = np.ma.masked_array(np.ones((24, 6)), np.zeros((24, 6)))
    assert "masked array" in refusal(FeatureSet.from_arrays, **arrays(visual_train=masked))
    assert "Python objects" in refusal(FeatureSet.from_arrays, **arrays(visual_train=[[None]]))
    assert "not a list of strings" in refusal(FeatureSet.from_arrays, **arrays(class_names="abc"))


# ---- files that are no sets ----


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_pickle_is_never_loaded(kind, tmp_path):
    trap = tmp_path / "trap"
    content = arrays(label_train=np.array([Payload(trap)] * 24, dtype=object))
    sentence = refusal(FeatureSet.load, write(kind, tmp_path / "in", content))
    assert "'label_train' holds Python objects (a pickle), which are never loaded" in sentence
    bare = tmp_path / "bare.npz"
    with bare.open("wb") as stream:
        np.save(stream, content["label_train"], allow_pickle=True)
    assert "not a whole .npz file" in refusal(FeatureSet.load, bare)
    assert not trap.exists()


def test_paths_that_hold_no_set(tmp_path):
    assert "does not exist" in refusal(FeatureSet.load, tmp_path / "none.npz")
    (tmp_path / "set.csv").write_text("1,2\n")
    assert "is in no known format" in refusal(FeatureSet.load, tmp_path / "set.csv")
    assert "holds no .npy file" in refusal(FeatureSet.load, tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    assert "neither a file nor a folder" in refusal(FeatureSet.load, tmp_path / "pipe.npz")
    assert "cannot be read: File name too long" in refusal(FeatureSet.load, tmp_path / ("a" * 300))
    assert r"line\nbreak\x1b.npz: does not exist" in refusal(FeatureSet.load, tmp_path / "line\nbreak\x1b.npz")


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_that_is_cut_off_or_something_else(suffix, tmp_path):
    whole = write(suffix, tmp_path / "in", arrays()).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for content in (b"", b"PK", whole[:10], whole[: len(whole) // 2], whole[:-1], b"hello, world"):
        path.write_bytes(content)
        assert f"is not a whole .{suffix} file" in refusal(FeatureSet.load, path)


def test_a_changed_byte_of_data_fails_the_checksum(tmp_path):
    path = write("npz", tmp_path / "in", arrays())
    whole = bytearray(path.read_bytes())
    whole[whole.index(arrays()["visual_train"].tobytes()) + 7] ^= 1
    path.write_bytes(whole)
    assert "Bad CRC-32" in refusal(FeatureSet.load, path)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
def test_unknown_keys(kind, tmp_path):
    name = "visual_trian" if kind == "folder" else "a\nb" * 40
    content = {**arrays(), name: np.ones(3)}
    sentence = refusal(FeatureSet.load, write(kind, tmp_path / "in", content))
    assert "holds the unknown key 'visual_trian'" in sentence or r"unknown key 'a\nba\nb" in sentence
    assert "known are visual_train, text_train" in sentence


def test_a_key_that_stands_twice(tmp_path):
    path = write("npz", tmp_path / "in", arrays())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("label_test.npy", b"")
    assert "holds the key 'label_test' twice" in refusal(FeatureSet.load, path)


def npy(shape, dtype="<f4", data=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def test_headers_that_lie_are_refused_before_memory_is_taken(tmp_path):
    path = write("npz", tmp_path / "in", arrays(visual_train=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("visual_train.npy", npy((2**40, 2**20), data=b"1234"))
    assert "4 bytes of data where its shape needs 4611686018427387904" in refusal(FeatureSet.load, path)

    whole = bytearray(write("packed", tmp_path / "in", arrays()).read_bytes())
    entry = whole.index(b"PK\x01\x02")  # the size in the archive's directory, and with it the shape, may lie too
    whole[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(whole)
    assert "claims 2147483648 bytes, packed in an impossible" in refusal(FeatureSet.load, path)

    folder = write("folder", tmp_path / "folder", arrays())
    (folder / "visual_train.npy").write_bytes(npy((2**40, 2**20), data=b"1234"))
    assert "'visual_train' is cut off or damaged" in refusal(FeatureSet.load, folder)
    (folder / "visual_train.npy").write_bytes(npy((24, 6), data=b"1" * 1000))
    assert "1000 bytes of data where its shape needs 576" in refusal(FeatureSet.load, folder)


def test_an_archive_larger_than_memory_is_refused(tmp_path, monkeypatch):
    path = write("packed", tmp_path / "in", arrays())
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    assert "GB of memory and this machine has" in refusal(FeatureSet.load, path)


def test_archives_that_numpy_does_not_write(tmp_path):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("visual_train.npy", npy((1, 1), data=b"1234"))
    assert "encrypted or packed with a method other than numpy's" in refusal(FeatureSet.load, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("visual_train.npy", b"\x93NUMPY\x03\x00" + b"\0" * 50)
    assert "'visual_train' has .npy format version 3.0" in refusal(FeatureSet.load, path)


def test_safetensors_that_cannot_be_used(tmp_path):
    path = tmp_path / "set.safetensors"
    tensors = {k: torch.from_numpy(v) for k, v in arrays(class_names=None).items()}
    save_file(tensors | {"visual_train": torch.ones(24, 6).to(torch.float8_e4m3fn)}, path)
    assert "'visual_train' has the unsupported dtype F8_E4M3" in refusal(FeatureSet.load, path)
    save_file(tensors | {"class_names": torch.ones(3)}, path)
    assert "unknown key 'class_names'" in refusal(FeatureSet.load, path)
    for names in ("cat,dog,eel", "[1, 2, 3]", '"cat"', "[]", "[" * 100_000):
        save_file(tensors, path, {"class_names": names})
        sentence = refusal(FeatureSet.load, path)
        assert "'class_names' in the metadata is not a JSON" in sentence or "not a list of strings" in sentence


def test_names_that_are_no_unicode(tmp_path):
    folder = write("folder", tmp_path / "in", arrays())
    (folder / "class_names.npy").write_bytes(npy((3,), "<U1", b"\xff" * 12))
    assert "'class_names' holds characters that are not Unicode" in refusal(FeatureSet.load, folder)


# ---- a test part alone, rows to predict ----


def test_load_test_needs_no_training_part_and_no_text(tmp_path):
    content = arrays(visual_train=None, text_train=None, label_train=None, text_test=None, class_names=None)
    path = write("npz", tmp_path / "in", content)
    part = FeatureSet.load_test(path, visual_dim=6, class_names=NAMES)
    assert part.text is None and part.class_names is None and not part.paired.any()
    np.testing.assert_array_equal(part.visual, content["visual_test"])
    assert "'visual_test' has 6 columns but the model has 5" in refusal(FeatureSet.load_test, path, visual_dim=5)
    assert "holds 2 in row 2 but the model has 2 entries" in refusal(FeatureSet.load_test, path, class_names=NAMES[:2])


def test_load_test_compares_with_the_model(tmp_path):
    path = write("npz", tmp_path / "in", arrays())
    assert FeatureSet.load_test(path, visual_dim=6, text_dim=4, class_names=NAMES).class_names == NAMES
    assert "'text_test' has 4 columns but the model has 3" in refusal(FeatureSet.load_test, path, text_dim=3)
    assert "not the model's: entry 1 is 'dog' here and 'cow' there" in refusal(
        FeatureSet.load_test, path, class_names=("cat", "cow", "eel")
    )
    assert "not the model's: 3 here and 4 there" in refusal(FeatureSet.load_test, path, class_names=(*NAMES, "fox"))


def test_load_test_repeats_the_split_of_load(tmp_path):
    path = write("npz", tmp_path / "in", arrays(**UNSPLIT))
    for seed in (0, 1):
        whole = FeatureSet.load(path, test_fraction=0.25, seed=seed)
        part = FeatureSet.load_test(path, test_fraction=0.25, seed=seed)
        assert part.ids.tolist() == whole.ids_test.tolist()
        np.testing.assert_array_equal(part.visual, whole.visual_test)
        np.testing.assert_array_equal(part.text, whole.text_test)


def test_load_test_without_a_test_part(tmp_path):
    path = write("npz", tmp_path / "in", {"class_names": np.array(NAMES)})
    assert "lacks the keys 'visual_test', 'label_test'" in refusal(FeatureSet.load_test, path)
    path = write("npz", tmp_path / "in", {"visual_test": np.ones((2, 3))})
    assert "lacks the key 'label_test'" in refusal(FeatureSet.load_test, path)


def test_load_visual_reads_no_text(tmp_path):
    content = arrays(text_test=np.full((12, 4), np.nan), text_train=np.ones((1, 1, 1)))
    found = load_visual(write("npz", tmp_path / "in", content), visual_dim=6)
    np.testing.assert_array_equal(found.visual, content["visual_test"])
    assert found.labels.tolist() == content["label_test"].tolist() and found.class_names == NAMES
    assert found.ids.tolist() == list(range(12))


def test_load_visual_takes_rows_without_any_label(tmp_path):
    path = write("npz", tmp_path / "in", arrays(label_test=np.full(12, -1)))
    assert (load_visual(path).labels == -1).all()
    assert "'label_test' has no labelled row" in refusal(FeatureSet.load_test, path)


def test_load_visual_of_one_array(tmp_path):
    visual = arrays()["visual_test"]
    np.save(tmp_path / "one.npy", visual)
    found = load_visual(tmp_path / "one.npy")
    assert isinstance(found.visual, np.memmap) and found.labels is None and found.class_names is None
    np.testing.assert_array_equal(found.visual, visual)
    np.savez(tmp_path / "one.npz", visual=visual)
    np.testing.assert_array_equal(load_visual(tmp_path / "one.npz").visual, visual)
    assert "has 6 columns but the model has 7" in refusal(load_visual, tmp_path / "one.npz", visual_dim=7)
    assert "unknown key 'visual'" in refusal(FeatureSet.load, tmp_path / "one.npz")
    np.savez(tmp_path / "two.npz", visual=visual, visual_test=visual)
    assert "holds both 'visual' and 'visual_test'" in refusal(load_visual, tmp_path / "two.npz")
    np.savez(tmp_path / "none.npz", label_test=[1])
    assert "lacks the key 'visual' or 'visual_test'" in refusal(load_visual, tmp_path / "none.npz")
    np.save(tmp_path / "bad.npy", changed(visual, (3, 1), np.nan))
    assert "'visual' holds NaN in row 3, column 1" in refusal(load_visual, tmp_path / "bad.npy")
    np.save(tmp_path / "object.npy", np.array([[None]]), allow_pickle=True)
    assert "never loaded" in refusal(load_visual, tmp_path / "object.npy")
    assert "is not a file" in refusal(load_visual, tmp_path / "absent.npy")


# ---- standardising ----


def test_mean_and_deviation_against_numpy(monkeypatch):
    random = np.random.default_rng(0)
    array = (random.normal(size=(1000, 5)) * [1, 1e-3, 1e3, 1, 1] + [0, 1e3, -5, 0, 0]).astype(np.float32)
    array[:, 3] = 0.1
    array[::7] = np.nan
    sound = array[~np.isnan(array[:, 0])].astype(np.float64)
    for block in (5, 37 * 5, 2**20):
        monkeypatch.setattr("seda_fast.arrays._BLOCK", block)
        mean, deviation = mean_and_deviation(array)
        np.testing.assert_allclose(mean, sound.mean(axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(np.delete(deviation, 3), np.delete(sound.std(axis=0), 3), rtol=1e-10)
        assert deviation[3] == 0 and mean.dtype == deviation.dtype == np.float64
        picked = np.flatnonzero(np.arange(1000) % 3 == 0)
        for chosen in (picked, np.arange(1000) % 3 == 0):
            part = array[picked][~np.isnan(array[picked, 0])].astype(np.float64)
            np.testing.assert_allclose(mean_and_deviation(array, chosen)[0], part.mean(axis=0), rtol=1e-12, atol=1e-14)
    assert "no row" in refusal(mean_and_deviation, array[:1])


# ---- the embedded set ----


@pytest.fixture(scope="module")
def embedded():
    return FeatureSet.load("digits")


def test_digits(embedded):
    assert embedded.visual_train.shape == (1437, 64) and embedded.visual_test.shape == (360, 64)
    assert embedded.text_train.shape == (1437, 64) and embedded.text_test.shape == (360, 64)
    assert embedded.n_classes == 10 and embedded.source == "digits" and embedded.class_names[3] == "three"
    assert sorted([*embedded.ids_train, *embedded.ids_test]) == list(range(1797))
    assert {a.dtype for a in (embedded.visual_train, embedded.text_train, embedded.text_test)} == {np.dtype(np.float32)}
    FeatureSet.from_arrays(**{key: getattr(embedded, key) for key in KEYS})  # passes every check of a file


def test_names_of_a_test_part_that_is_not_there_are_refused(tmp_path):
    visual, labels = np.arange(60.0).reshape(-1, 2), np.arange(30) % 3
    arrays = {"visual_train": visual, "text_train": visual, "label_train": labels, "names_test": np.array(["a", "b"])}
    np.savez(tmp_path / "set.npz", **arrays)
    assert "set.npz: lacks the keys 'visual_test', 'label_test'" in refusal(FeatureSet.load, tmp_path / "set.npz")


def test_an_archive_is_what_numpy_writes_and_holds_no_pickle(tmp_path):
    """NumPy before 2.2 would take `allow_pickle` for the name of an array."""
    rng = np.random.default_rng(0)
    arrays = {
        "visual": rng.normal(size=(5, 3)).astype(np.float32),
        "ids": np.arange(5)[::2],
        "names": np.array(["é", "b"]),
    }
    save_npz(tmp_path / "ours.npz", arrays)
    np.savez(tmp_path / "theirs.npz", **arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours, np.load(tmp_path / "theirs.npz") as theirs:
        assert ours.files == theirs.files == list(arrays)
        for name in arrays:
            np.testing.assert_array_equal(ours[name], theirs[name])
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_npz(tmp_path / "odd.npz", {"names": np.array(["a", None])})


def test_digits_are_reproducible_and_the_seed_moves_the_split_alone(embedded):
    again, other = FeatureSet.load("digits"), FeatureSet.load("digits", seed=1)
    np.testing.assert_array_equal(again.text_train, embedded.text_train)
    assert again.ids_test.tolist() == embedded.ids_test.tolist() != other.ids_test.tolist()
    np.testing.assert_array_equal(FeatureSet.load_test("digits", seed=1).visual, other.visual_test)
    assert load_visual("digits", seed=1).ids.tolist() == other.ids_test.tolist()


def test_texts_of_the_test_part_do_not_shape_the_features():
    texts = digits.compose_texts(np.arange(200) % 10)
    one, _ = digits.text_features(texts[:150], texts[150:])
    two, _ = digits.text_features(texts[:150], ["quite different words"])
    np.testing.assert_array_equal(one, two)


def test_descriptions_are_several_different_and_do_not_name_their_digit():
    sentences = [sentence for of_class in digits.DESCRIPTIONS for sentence in of_class]
    assert len(digits.DESCRIPTIONS) == 10 and len(set(sentences)) == len(sentences)
    for name, of_class in zip(digits.CLASS_NAMES, digits.DESCRIPTIONS, strict=True):
        assert len(of_class) >= 6
        words = " ".join(of_class).lower().replace(".", " ").replace(",", " ").split()
        assert name not in words and not any(word.isdigit() for word in words)
    labels = np.arange(1000) % 10
    texts = digits.compose_texts(labels)
    assert texts == digits.compose_texts(labels) and len(set(texts)) > 500
    assert all(any(s in text for s in digits.DESCRIPTIONS[k]) for text, k in zip(texts, labels, strict=True))


def test_the_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "scikit-learn is needed" in refusal(FeatureSet.load, "digits")


# ---- writing ----


def test_check_writable(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "cannot be written" in refusal(check_writable, folder)
    assert "cannot be written: File name too long" in refusal(check_writable, tmp_path / ("a" * 300))
    assert "/proc/nowhere cannot be written" in refusal(check_writable, "/proc/nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "is not a folder" in refusal(check_writable, tmp_path / "link")


def test_atomic_path_writes_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.npz"
    with atomic_path(target) as draft:
        assert draft.suffix == ".npz"
        np.savez(draft, a=np.ones(2))
        assert not target.exists()
    before = target.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) & 0o400 and os.listdir(tmp_path) == ["out.npz"]

    def half():
        with atomic_path(target) as draft:
            draft.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["out.npz"]

    def into_nowhere():
        with atomic_path(tmp_path / "none" / "x.csv") as draft:
            draft.write_text("")

    assert "x.csv cannot be written: No such file or directory" in refusal(into_nowhere)


# ---- real data ----


@pytest.mark.parametrize("name", ["fashion_products", "wikipedia", "cub10_googlenet_doc2vec"])
def test_real_sets(name, shared_data, tmp_path):
    path = shared_data / f"{name}.npz"
    found = FeatureSet.load(path)
    with np.load(path, allow_pickle=False) as whole:
        content = {key: whole[key] for key in whole.files}
    for key in KEYS[:-1]:
        np.testing.assert_array_equal(getattr(found, key), content[key])
    assert found.class_names == tuple(content["class_names"])
    mean, deviation = mean_and_deviation(found.visual_train)
    np.testing.assert_allclose(mean, content["visual_train"].mean(axis=0, dtype=np.float64), atol=1e-12)
    assert (deviation > 0).all()
    np.testing.assert_array_equal(load_visual(path).visual, content["visual_test"])
    if name != "fashion_products":
        copies = [FeatureSet.load(write(kind, tmp_path / kind, content)) for kind in ("safetensors", "folder")]
        for copy in copies:
            np.testing.assert_array_equal(copy.text_train, found.text_train)
            assert copy.class_names == found.class_names


def test_read_arrays_leaves_unwanted_arrays_alone(tmp_path):
    path = write("npz", tmp_path / "in", arrays())
    seen = []
    found = read_arrays(path, wanted=["label_test"], known=KEYS, layout=lambda *header: seen.append(header[0]))
    assert list(found) == seen == ["label_test"]
