"""Files of named arrays in the safetensors format, one or several to a checkpoint, read and written by the piece.

A file is 8 bytes with the length of its header (little-endian), the header (JSON: for each name its
"dtype", its "shape" and "data_offsets" [begin, end] into what follows), and the arrays, row by row,
without gaps. A checkpoint of several files has `model.safetensors.index.json` beside them, whose
"weight_map" says which file holds which name. Format: the README of github.com/huggingface/safetensors.

Headers are read as what a stranger wrote: everything is checked before a byte of an array is touched.
Arrays are views of the mapped file; nothing is copied until a slice of one is used.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from train.config.fields import UserError

# Floating-point types of weights; others are not of models that can be trained here.
DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype("<f8"),
}
# Sizes [bits] of the other types: their arrays may be in a file, only not be asked for.
OTHERS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64}
OTHERS |= {"I64": 64, "F8_E4M3": 8, "F8_E5M2": 8}

LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
ALONE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in the file [bytes]


class Tensors:
    """The arrays of a checkpoint's folder, by name."""

    def __init__(self, folder: pathlib.Path):
        """Reads the headers.

        Raises:
            UserError: no such files, or files that are damaged or not what they say.
        """
        self.folder = folder
        self._where: dict[str, tuple[pathlib.Path, Entry]] = {}
        self._bytes: dict[pathlib.Path, np.ndarray] = {}
        promised = _index(folder)
        for path in sorted({*promised.values()}) if promised else [folder / ALONE]:
            for name, entry in read_header(path).items():
                if promised and promised.get(name) != path:
                    raise UserError(f"{path} holds {name!r}, but {folder / INDEX} says otherwise.")
                self._where[name] = path, entry
        missing = sorted(set(promised) - set(self._where))
        if missing:
            raise UserError(
                f"{promised[missing[0]]} does not hold {missing[0]!r}, as {INDEX} says."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][1].shape

    def read(self, name: str) -> np.ndarray:
        """The array, as a read-only view of its file.

        Raises:
            UserError: an array of whole numbers or of 8-bit floating-point numbers.
        """
        path, (dtype, shape, begin) = self._where[name]
        if dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise UserError(
                f"{name!r} in {path} has numbers of type {dtype}; allowed are {allowed}."
            )
        if path not in self._bytes:
            self._bytes[path] = np.memmap(path, np.uint8, "r")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        return self._bytes[path][begin : begin + size].view(DTYPES[dtype]).reshape(shape)


def _index(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """File of each array, for a checkpoint of several files; else nothing."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    content = _json(path.read_bytes(), path)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} has no weight_map.")
    for name, file in files.items():
        # A file of the same folder, or somebody wants us to read another one.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or "\\" in file:
            raise UserError(f"{path} puts {name!r} into {file!r}, which is not a file beside it.")
    return {name: folder / file for name, file in files.items()}


def _json(text: bytes, path: pathlib.Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The JSON of {path} cannot be read: {error}.") from None


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """What a file says it holds, checked: every array in the file, none overlapping, no byte left over.

    Raises:
        UserError: it cannot be read, or does not add up.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise UserError(
                    f"{path} is not a safetensors file: of its {size} bytes, {length} would be header."
                )
            header = _json(file.read(length), path)
    except OSError as error:
        others = sorted(p.name for p in path.parent.glob("*.bin"))
        raise UserError(
            f"{path} cannot be read: {error.strerror}."
            + (
                f" {others[0]} is of a form that is not read; what AutoModelForCausalLM"
                ".from_pretrained(...).save_pretrained(FOLDER) of the package transformers writes, is."
                if others
                else ""
            )
        ) from None
    if not isinstance(header, dict):
        raise UserError(f"The header of {path} is not an object.")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, described in header.items():
        dtype, shape, begin, end = _entry(described, f"{name!r} in {path}")
        entries[name] = Entry(dtype, shape, 8 + length + begin)
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise UserError(f"{name!r} in {path} begins at byte {begin}, but {reached} is due.")
        reached = end
    if reached != size - 8 - length:
        raise UserError(
            f"{path} is cut or has something behind its end: {size - 8 - length} bytes of arrays"
            f" where its header describes {reached}."
        )
    return entries


def _entry(described: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    whole = lambda values: (
        isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
    )
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} is not described by dtype, shape and data_offsets.")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in {*DTYPES, *OTHERS}:
        raise UserError(f"{where} has the unknown type {str(dtype)[:40]!r}.")
    if not whole(shape) or len(shape) > 32 or not whole(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has a shape or offsets that are not lists of whole numbers.")
    begin, end = offsets
    bits = OTHERS[dtype] if dtype in OTHERS else 8 * DTYPES[dtype].itemsize
    if end - begin != math.prod(shape) * bits // 8:
        raise UserError(f"{where} has {end - begin} bytes, which its shape and type do not need.")
    return dtype, tuple(shape), begin, end


class Planned(NamedTuple):
    """An array to be written: `make` is called when its turn has come, and its result is not kept."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write(folder: pathlib.Path, arrays: list[Planned], dtype: str, largest: int) -> list[str]:
    """Writes a checkpoint, one array at a time, into files of at most `largest` bytes of arrays.

    An array larger than that gets a file of its own. Returns the names of the files.
    """
    kind = DTYPES[dtype]
    size = lambda array: math.prod(array.shape) * kind.itemsize
    groups: list[list[Planned]] = [[]]
    for array in arrays:
        if groups[-1] and sum(map(size, groups[-1])) + size(array) > largest:
            groups.append([])
        groups[-1].append(array)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [ALONE] if count == 1 else names
    for name, group in zip(names, groups):
        _write_file(folder / name, group, dtype)
    if count > 1:
        files = {array.name: name for name, group in zip(names, groups) for array in group}
        index = {"metadata": {"total_size": sum(map(size, arrays))}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write_file(path: pathlib.Path, arrays: list[Planned], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind, end = DTYPES[dtype], 0
    for name, shape, _ in arrays:
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, make in arrays:
            array = np.asarray(make(), kind, order="C")
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape} where {shape} was announced")
            file.write(array.reshape(-1).view(np.uint8).data)
    part.replace(path)
