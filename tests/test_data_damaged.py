"""Damaged, lying and hostile inputs: the reader answers with a DataError or a sound set, and with nothing else."""

import importlib
import importlib.util
import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from seda_fast.data import KEYS, DataError, FeatureSet, load_visual

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
TRAP = "trap"  # what a pickle below would create, in the current folder


class Payload:
    """Unpickling this creates the file TRAP."""

    def __reduce__(self):
        return (open, (TRAP, "w"))


def arrays(test=True):
    random = np.random.default_rng(0)
    made = {
        "visual_train": random.normal(size=(24, 5)).astype(np.float32),
        "text_train": random.normal(size=(24, 4)).astype(np.float32),
        "label_train": np.arange(24) % 3,
        "class_names": np.array(["cat", "dog", "eel"]),
    }
    if test:
        made["visual_test"] = random.normal(size=(6, 5)).astype(np.float32)
        made["label_test"] = np.arange(6) % 3
        made["text_test"] = random.normal(size=(6, 4)).astype(np.float32)
    return made


# ---- inputs as {file name: content}; the content is bytes, or "folder" or "pipe"; the reader gets "in..." ----


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def files(kind, content):
    """`content` (name -> array, or bytes to stand in its place) as one of the four kinds of input."""
    packed = {name: value if isinstance(value, bytes) else npy(value) for name, value in content.items()}
    if kind == "folder":
        return {"in": "folder", **{f"in/{name}.npy": value for name, value in packed.items()}}
    if kind == "safetensors":
        return {"in.safetensors": save(*as_tensors(content))}
    stream = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, value in packed.items():
            archive.writestr(f"{name}.npy", value)
    return {"in.npz": stream.getvalue()}


def as_tensors(content):
    """What of `content` safetensors can hold, and the metadata."""
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc" and value.dtype.itemsize <= 8:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
    names = content.get("class_names")
    known = isinstance(names, np.ndarray) and names.dtype.kind == "U"
    return tensors, {"class_names": json.dumps(names.tolist())} if known else None


@cache
def whole(kind, test):
    return files(kind, arrays(test))


KINDS = st.sampled_from(["npz", "packed", "safetensors", "folder"])


@st.composite
def broken_bytes(draw):
    """One file of a sound input with bytes flipped, cut, inserted or replaced, most often near a header."""
    made = dict(whole(draw(KINDS), draw(st.booleans())))
    name = draw(st.sampled_from(sorted(key for key, value in made.items() if value != "folder")))
    content = bytearray(made[name])
    size = len(content)
    starts = [i for i in range(size) if content.startswith((b"\x93NUMPY", b"PK"), i)]
    near = st.builds(lambda start, step: min(start + step, size - 1), st.sampled_from([0, *starts]), st.integers(0, 90))
    place = st.one_of(near, st.integers(0, size - 1))
    for _ in range(draw(st.integers(1, 4))):
        at = min(draw(place), max(len(content) - 1, 0))
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "overwrite", "remove", "append"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(max_size=9))
            case "overwrite":
                new = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8])))
                content[at : at + len(new)] = new
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "append":
                content += draw(st.binary(max_size=40))
    made[name] = bytes(content)
    return made


DTYPES = ["?", "i1", "i8", "u8", "f2", ">f4", "f8", "g", "c8", "M8[s]", "S2", "U2", "O", "V3", "i4,f4", "(2,)f4"]
SHAPES = [
    (),
    (0,),
    (24,),
    (6,),
    (23,),
    (24, 5),
    (24, 4),
    (24, 0),
    (0, 5),
    (6, 5),
    (6, 7),
    (1, 1),
    (24, 5, 1),
    (1,) * 32,
]
VALUES = [0, -1, -2, 2, 3, 10**6, 2**62, 1e39, np.nan, np.inf, -0.0, 65504.0]


@st.composite
def odd_array(draw):
    """An array of any dtype and shape, or a .npy header that claims one."""
    shape, dtype = draw(st.sampled_from(SHAPES)), np.dtype(draw(st.sampled_from(DTYPES)))
    if dtype.hasobject:
        return np.full(shape, Payload(), dtype=object)
    array = np.zeros(shape, dtype)
    if dtype.kind in "iufc" and array.size:
        with np.errstate(all="ignore"):
            value = np.array(draw(st.sampled_from(VALUES))).astype(dtype)
        if draw(st.booleans()):
            array[...] = value
        else:
            array.flat[draw(st.integers(0, array.size - 1))] = value
    return array


@st.composite
def lying_header(draw):
    """A .npy whose header is not what numpy would write."""
    shape = draw(
        st.sampled_from(
            ["(24, 5)", "(-1, 5)", "(24L, 5L)", "(1e3,)", "(2**70,)", f"({2**70},)", "(True, 5)", "5", "()"]
        )
        | st.builds(lambda n, m: f"({n}, {m})", st.integers(-2, 2**66), st.integers(-2, 2**66))
    )
    descr = draw(
        st.sampled_from(["'<f4'", "'|O'", "'<U0'", "'<U99999999'", "[('a', '<f4')]", "3", "('<f4', (3,))", "'?'"])
    )
    text = draw(
        st.sampled_from(
            [
                "{'descr': D, 'fortran_order': False, 'shape': S, }",
                "{'descr': D, 'fortran_order': 3, 'shape': S}",
                "{'descr': D, 'shape': S}",
                "[" * 3000,
                "{'descr': D, 'fortran_order': False, 'shape': S",
                "__import__('os').system('touch trap')",
                "'\\d' \0",
                "-" * 5000 + "1",
            ]
        )
    )
    header = text.replace("D", descr).replace("S", shape).encode("latin1") + b"\n"
    version, width = draw(st.sampled_from([(b"\1\0", "<H"), (b"\2\0", "<I"), (b"\3\0", "<I"), (b"\1\7", "<H")]))
    length = draw(st.sampled_from([len(header), len(header) + 1, 0, 65535]))
    return b"\x93NUMPY" + version + struct.pack(width, length) + header + draw(st.sampled_from([b"", b"\0" * 480]))


@st.composite
def odd_content(draw):
    """A sound input of which some arrays are exchanged, dropped, renamed or swapped."""
    content = arrays(draw(st.booleans()))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(KEYS))
        match draw(st.sampled_from(["array", "array", "header", "drop", "rename", "swap", "value", "pickle"])):
            case "array":
                content[name] = draw(odd_array())
            case "header":
                content[name] = draw(lying_header())
            case "drop":
                content.pop(name, None)
            case "rename":
                new = draw(
                    st.sampled_from(["visual", "labels", "../x", "a\nb", "visual_train.npy", "ä" * 70, "class_name"])
                )
                content[new] = content.pop(name, np.zeros(3))
            case "swap":
                other = draw(st.sampled_from(KEYS))
                if name in content and other in content:
                    content[name], content[other] = content[other], content[name]
            case "value":
                array = content.get(name)
                if isinstance(array, np.ndarray) and array.dtype.kind in "if" and array.size:
                    with np.errstate(all="ignore"):
                        value = np.array(draw(st.sampled_from(VALUES))).astype(array.dtype)
                    array.flat[draw(st.integers(0, array.size - 1))] = value
            case "pickle":
                content[name] = pickle.dumps(Payload())
    kind = draw(KINDS)
    if kind == "folder":
        content = {name: value for name, value in content.items() if "/" not in name}
    return files(kind, content)


TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I64", "BF16", "F8_E4M3", "F4", "BOOL", "C64", "X", 3]),
        "shape": st.lists(st.integers(-1, 2**64) | st.sampled_from([24, 5, 0]), max_size=3) | st.just("24"),
        "data_offsets": st.lists(st.integers(0, 2**64) | st.sampled_from([0, 480]), max_size=3),
    },
)


@st.composite
def lying_safetensors(draw):
    header = json.dumps(
        draw(
            st.dictionaries(st.sampled_from([*KEYS, "__metadata__", "x"]), TENSOR | st.text() | st.none(), max_size=5)
            | st.just([])
        )
    ).encode()
    length = draw(st.sampled_from([len(header), len(header) + 8, 0, 2**63, 2**64 - 1]))
    return {"in.safetensors": struct.pack("<Q", length) + header + b"\0" * 480}


@st.composite
def odd_file(draw):
    """No set at all: any bytes, another format's bytes, a pickle, folders where files belong, pipes."""
    suffix = draw(st.sampled_from([".npz", ".safetensors", "", ".npy", ".pkl", ".NPZ"]))
    match draw(st.sampled_from(["bytes", "other", "nothing", "folder", "pipe", "nested", "inner pipe"])):
        case "bytes":
            hello = st.sampled_from([pickle.dumps(Payload()), b"", b"a,b\n1,2\n", b"PK\5\6" + b"\0" * 18, b"PK\3\4"])
            return {f"in{suffix}": draw(st.binary(max_size=300) | hello)}
        case "other":
            return {f"in{suffix}": next(v for v in whole(draw(KINDS), True).values() if v != "folder")}
        case "nothing":
            return {}
        case "folder":
            return {f"in{suffix}": "folder"}
        case "pipe":
            return {f"in{suffix}": "pipe"}
    name = draw(st.sampled_from(KEYS))
    made = dict(whole("folder", True))
    made[f"in/{name}.npy"] = "pipe"
    if suffix == "":
        made |= {f"in/{name}.npy": "folder", f"in/{name}.npy/{name}.npy": b""}
    return made


DAMAGED = st.one_of(broken_bytes(), odd_content(), lying_safetensors(), odd_file(), broken_bytes(), odd_content())


def put(folder, made):
    """Writes `made` into `folder` and returns the path to read."""
    for name, content in made.items():
        place = folder / name
        if content == "folder":
            place.mkdir()
        elif content == "pipe":
            os.mkfifo(place)
        else:
            place.write_bytes(content)
    return folder / next(iter(made), "in.npz")


READERS = {
    "load": FeatureSet.load,
    "keep": lambda path: FeatureSet.load(path, unpaired="keep", need_text=False),
    "test": FeatureSet.load_test,
    "visual": load_visual,
}


@settings(max_examples=500, suppress_health_check=SLOW_IS_FINE)
@given(made=DAMAGED)
def test_the_reader_refuses_or_succeeds(made):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.chdir(folder)
        path = put(Path(folder), made)
        before = sorted(Path(folder).rglob("*"))
        for name, read in READERS.items():
            try:
                found = read(path)
            except DataError as error:
                sentence = str(error)
            else:
                event(f"{name}: read")
                is_sound(found)
                continue
            event(f"{name}: refused")
            assert sentence.startswith(f"{path}: ") and sentence.isprintable()
        assert sorted(Path(folder).rglob("*")) == before


def is_sound(found):
    """What every part promises, whatever its file went through."""
    if isinstance(found, FeatureSet):
        assert np.isfinite(found.visual_train).all() and np.isfinite(found.text_train[found.paired_train]).all()
        assert len(found.visual_train) == len(found.text_train) == len(found.label_train) == len(found.ids_train)
        assert found.label_train.min() >= -1 and found.label_train.max() < found.n_classes
        assert set(found.label_test) - {-1} <= set(found.label_train)
        found = found.test_part
    assert np.isfinite(found.visual).all() and len(found.visual) == len(found.ids) > 0
    assert found.labels is None or len(found.labels) == len(found.visual)


def test_a_sound_input_is_read_by_all_readers(tmp_path):
    """Else the property above could hold because nothing is ever read."""
    for kind in ("npz", "packed", "safetensors", "folder"):
        for test in (True, False):
            folder = tmp_path / f"{kind}{test}"
            folder.mkdir()
            path = put(folder, whole(kind, test))
            for name in READERS if test else ("load", "keep", "test"):
                is_sound(READERS[name](path))


def test_the_trap_springs_when_a_pickle_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.load(io.BytesIO(npy(np.array([Payload()], dtype=object))), allow_pickle=True)
    assert (tmp_path / TRAP).exists()


needs_train = pytest.mark.skipif(
    importlib.util.find_spec("seda_fast.train") is None, reason="the command seda_fast.train is not there"
)


@needs_train
@settings(max_examples=300, suppress_health_check=SLOW_IS_FINE)
@given(made=DAMAGED)
def test_the_command_says_one_line_and_leaves_no_folder(made):
    """Inputs that the reader refuses, given to `python -m seda_fast.train` in this process."""
    main = importlib.import_module("seda_fast.train").main
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = put(Path(folder), made)
        before = sorted(Path(folder).rglob("*"))
        try:
            FeatureSet.load(path)
        except DataError as error:
            sentence = str(error)
        else:
            assume(False)  # sound after all: training on it is another test's business
        with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
            code = main(["--data", str(path), "--out", str(Path(folder) / "out"), "--epochs", "1"])
        assert code == 2
        assert sentence in err.getvalue() and err.getvalue().count("\n") == 1 and err.getvalue().endswith("\n")
        assert sorted(Path(folder).rglob("*")) == before
