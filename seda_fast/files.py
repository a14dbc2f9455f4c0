"""Files on disk: strict reading of named arrays, and output that is written whole or not at all.

Nothing here unpickles. `read_arrays` looks at names, shapes, dtypes and sizes before it reads any data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Layout = Callable[[str, tuple[int, ...], "np.dtype[Any]"], None]

# Deflate cannot do better than 1032 to 1; an entry that claims more lies about its size.
_DEFLATE_LIMIT = 1032
# Characters of a file's name that its draft's keeps.
_STEM = 20
# What systems say that flush no folder, or let none be opened that may not be listed.
_NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
# Arrays of strings, which safetensors files hold as JSON in their metadata.
STRINGS = ("class_names", "names", "names_train", "names_test")
_SAFETENSORS_DTYPES = {
    "F16": "f2", "BF16": "f4", "F32": "f4", "F64": "f8",
    "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8",
}  # fmt: skip


class DataError(ValueError):
    """Input or output that cannot be used, told in one printable line; commands turn it into exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    """``text`` on one line. Names and paths come from outside: a line break or an escape code in them must not reach a
    terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show(name: str) -> str:
    """`name` in quotes, cut to 60 characters, for use in a sentence."""
    return f"'{name[:60]}...'" if len(name) > 60 else f"'{name}'"


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Puts the name of the source before every DataError from inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


@contextmanager
def _refusing(sentence: str) -> Iterator[None]:
    """Turns whatever a parser raises on damaged bytes into one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about headers from Python 2; they read well
            yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{sentence}: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError(f"{sentence}: it does not fit into memory") from error
    except Exception as error:  # on foreign bytes parsers raise nearly anything, struct.error to RecursionError
        raise DataError(f"{sentence}: {str(error)[:200] or type(error).__name__}") from error


def read_arrays(path: Path, *, wanted: Collection[str], known: Collection[str], layout: Layout) -> dict[str, Any]:
    """Reads named arrays from a `.npz`, a `.safetensors` or a folder of `.npy` files.

    wanted: the names to read; one that is not there is left out of the result, so the caller tests for it.
    known:  all names that may stand in the file; any other is refused.
    layout: called with (name, shape, dtype) before any data of that name is read; raises DataError.

    Arrays keep their dtype, except that bfloat16 (safetensors) comes back as float32. Those of a folder are
    read-only memory maps. Those of `STRINGS` are arrays of str, or from safetensors, which hold no strings, the
    list of str found as JSON in the metadata under that name. Raises DataError.
    """
    with naming(path):
        with _refusing("cannot be read"):
            is_folder, is_file = path.is_dir(), path.is_file()
        if is_folder:
            return _read_folder(path, wanted, known, layout)
        if not is_file:
            raise DataError("is neither a file nor a folder" if path.exists() else "does not exist")
        if path.suffix.lower() == ".npz":
            return _read_npz(path, wanted, known, layout)
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path, wanted, known, layout)
        raise DataError("is in no known format: give a .npz or .safetensors file or a folder of .npy files")


def read_npy(path: Path, name: str, layout: Layout) -> NDArray[Any]:
    """Maps one `.npy` file read-only, under the same checks as `read_arrays`. Raises DataError."""
    with naming(path):
        return _map_npy(path, name, layout)


def _refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    """Raises DataError when `names` holds one that is not `known`, or one name twice."""
    seen: set[str] = set()
    for name in names:
        if name not in known:
            raise DataError(f"holds the unknown key {show(name)}; known are {', '.join(known)}")
        if name in seen:
            raise DataError(f"holds the key '{name}' twice")
        seen.add(name)


def _npy_header(stream: IO[bytes], name: str, size: int, layout: Layout) -> None:
    """Checks the header of a .npy stream of `size` bytes against `layout` and against that size."""
    parsers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in parsers:
            raise DataError(f"'{name}' has .npy format version {version[0]}.{version[1]}; 1.0 or 2.0 is needed")
        shape, _, dtype = parsers[version](stream)
    except DataError:
        raise
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:  # their texts hold object addresses
        raise DataError(f"'{name}' has no .npy header that can be read") from error
    if dtype.hasobject:
        raise DataError(f"'{name}' holds Python objects (a pickle), which are never loaded")
    layout(name, shape, dtype)
    needed, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed != there:
        raise DataError(f"'{name}' is cut off or damaged: {there} bytes of data where its shape needs {needed}")


def _map_npy(path: Path, name: str, layout: Layout) -> NDArray[Any]:
    with _refusing(f"'{name}' is not a whole .npy array"):
        if not path.is_file():
            raise DataError(f"'{name}' is not a file")
        with path.open("rb") as stream:
            _npy_header(stream, name, path.stat().st_size, layout)
        return np.lib.format.open_memmap(path, mode="r")


def _read_folder(path: Path, wanted: Collection[str], known: Collection[str], layout: Layout) -> dict[str, Any]:
    with _refusing("cannot be read"):
        names = sorted(entry.name[:-4] for entry in path.iterdir() if entry.name.endswith(".npy"))
    if not names:
        raise DataError("the folder holds no .npy file")
    _refuse_unknown(names, known)
    return {name: _map_npy(path / f"{name}.npy", name, layout) for name in names if name in wanted}


def _read_npz(path: Path, wanted: Collection[str], known: Collection[str], layout: Layout) -> dict[str, Any]:
    with _refusing("is not a whole .npz file"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _refuse_unknown([entry.filename.removesuffix(".npy") for entry in entries], known)
        read = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        read = {name: entry for name, entry in read.items() if name in wanted}
        for name, entry in read.items():
            _check_entry(name, entry)
            with archive.open(entry) as stream:
                _npy_header(stream, name, entry.file_size, layout)
        refuse_too_large(sum(entry.file_size for entry in read.values()))
        return {name: _read_entry(archive, entry) for name, entry in read.items()}


def _check_entry(name: str, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        raise DataError(f"'{name}' is encrypted or packed with a method other than numpy's")
    if entry.file_size > _DEFLATE_LIMIT * entry.compress_size + 1024:
        raise DataError(f"'{name}' claims {entry.file_size} bytes, packed in an impossible {entry.compress_size}")


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(entry) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # reaching the end makes zipfile compare the checksum
    return array


def refuse_too_large(size: int) -> None:
    """Raises DataError when `size` bytes exceed this machine's memory (where the system tells it)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise DataError(
            f"needs {size / 1e9:.1f} GB of memory and this machine has {memory / 1e9:.1f} GB; "
            "a folder of .npy files with a test part is read without loading it whole"
        )


def _read_safetensors(path: Path, wanted: Collection[str], known: Collection[str], layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with (
        _refusing("is not a whole .safetensors file"),
        safe_open(path, framework="pt") as archive,
    ):
        names = list(archive.keys())
        _refuse_unknown(names, [name for name in known if name not in STRINGS])
        for name in (name for name in names if name in wanted):
            part = archive.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise DataError(f"'{name}' has the unsupported dtype {part.get_dtype()}")
            layout(name, tuple(part.get_shape()), np.dtype(dtype))
        for name in (name for name in names if name in wanted):
            tensor = archive.get_tensor(name)
            found[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        metadata = archive.metadata() or {}
    for name in (name for name in STRINGS if name in wanted and name in metadata):
        with _refusing(f"'{name}' in the metadata is not a JSON list of strings"):
            found[name] = json.loads(metadata[name])
    return found


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix, for the caller to write to.

    When the block ends well the file is flushed to disk and renamed to `path`; when it raises, the temporary
    file is removed and `path` stays as it was. An OSError becomes a DataError.
    """
    target = Path(path)
    # Of a name as long as a name may be, no longer one can be made.
    draft = target.with_name(f".{target.stem[:_STEM]}.{secrets.token_hex(6)}{target.suffix}")
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode  # what the umask allows; some writers make files that only the owner reads
        yield draft
        if draft.stat().st_mode != mode:
            with suppress(PermissionError):  # as on disks that know no rights of single files
                draft.chmod(mode)
        flush(draft)
        draft.replace(target)
        flush(target.parent)  # a rename lasts only when its folder is on disk
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:  # what its writer makes of a full disk
        raise DataError(f"{target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # gone after the rename; a second error here would hide the first
            draft.unlink()


def checksum(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Returns when the file or folder ``path`` is on disk, not only in the system's memory.

    Some file systems do that for no folder, and some folders may be written but not read: there is nothing to wait for.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH or not path.is_dir():
            raise


def save_npz(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """What `numpy.savez` writes, without its pickles: NumPy before 2.2 takes ``allow_pickle`` for an array's name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def check_writable(folder: str | Path) -> None:
    """Raises DataError unless files can be written to `folder`, which need not exist; leaves nothing there.

    Writes and removes an empty file in the folder, or in its nearest existing parent: permission bits alone
    say nothing to root or about a read-only file system.
    """
    target = Path(folder)
    try:
        place = target.absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise DataError(f"the folder {target} cannot be written: {place} is not a folder")
        probe = place / f".writable.{secrets.token_hex(6)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise DataError(f"the folder {target} cannot be written: {error.strerror or error}") from error


def output_file(name: str, option: str, suffixes: tuple[str, ...]) -> Path:
    """The path of a file to write, once it is known that it can be written. Raises DataError, naming the option."""
    path = Path(name)
    if path.suffix not in suffixes:
        raise DataError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    try:
        if path.is_dir():
            raise DataError(f"{option} {path} is a folder")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{option} {path} cannot be written: {error.strerror or error}") from error
    check_writable(path.parent)
    return path


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and those above it where they are missing. Raises DataError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
