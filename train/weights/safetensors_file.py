"""Reads and writes checkpoints in the safetensors format, one array at a time.

A checkpoint is `model.safetensors`, or several files and `model.safetensors.index.json`, whose "weight_map" names the
file of each array. The package `safetensors` reads the files and validates their headers: a header that a stranger
wrote cannot make it read outside of the file. The following parts are not in the package, so they are here:

* the index of a checkpoint with several files, validated before any file that it names is opened;
* the rejection of a name that occurs twice in a header, of which the package keeps the last occurrence silently;
* writing with one array in memory. `safetensors.serialize_file` needs all arrays of a file in memory at once, which
  is up to `largest` bytes (5 GB).

Format: the README of github.com/huggingface/safetensors.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from train import disk
from train.errors import UserError

# The floating-point types that the models here can be initialised from. A file may also hold arrays of other types.
DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype("<f8"),
}

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensors:
    """The arrays of a checkpoint folder, by name. Each is read from disk when it is asked for."""

    def __init__(self, folder: pathlib.Path):
        """Opens the files and validates their headers.

        Raises:
            UserError: a file is missing or damaged, or contradicts the index.
        """
        self._files: dict[str, tuple[pathlib.Path, Any]] = {}  # of each array: path and open file
        index = _read_index(folder)
        for path in sorted({*index.values()}) if index else [folder / SINGLE_FILE]:
            file = _open(path)
            for name in file.offset_keys():
                if index and index.get(name) != path:
                    raise UserError(
                        f"{path} holds {name!r}, but {folder / INDEX} does not list it there."
                    )
                self._files[name] = path, file
        missing = sorted(set(index) - set(self._files))
        if missing:
            raise UserError(f"{index[missing[0]]} does not hold {missing[0]!r}, as {INDEX} claims.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One array, read-only.

        Raises:
            UserError: the array holds integers or 8-bit floating-point numbers.
        """
        path, file = self._files[name]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise UserError(f"{name!r} in {path} has the type {dtype}; allowed are {allowed}.")
        array = file.get_tensor(name)
        array.flags.writeable = False
        return array

    def read_finite(self, name: str) -> np.ndarray:
        """One array, as `read`; raises UserError as well for a value that is no finite number in float32."""
        array = self.read(name)
        _check_finite(array, name, self._files[name][0])
        return array


def _check_finite(array: np.ndarray, name: str, path: pathlib.Path) -> None:
    """Raises UserError for NaN, infinity, and float64 values that float32 cannot hold."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(np.float32))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"{name!r} in {path} holds {int(bad.sum())} of {array.size} values that are not finite numbers in"
            f" float32; the first is {array[where]} at {list(where)}. Weights like these would make every loss NaN."
        )


def _read_index(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Array name to file, for a checkpoint of several files; empty for one without an index."""
    path = folder / INDEX
    if disk.kind(path) is None:
        return {}
    try:
        text = disk.read_file(path, disk.JSON_FILE)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {disk.reason(error)}.") from None
    content = _parse_json(text, path)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} has no weight_map.")
    for name, file in files.items():
        # An index from a stranger must not make us read files elsewhere.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or "\\" in file:
            raise UserError(
                f"{path} puts {name!r} into {file!r}, which is not the name of a file in this folder."
            )
    return {name: folder / file for name, file in files.items()}


def _parse_json(text: bytes, path: pathlib.Path) -> Any:
    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The JSON of {path} cannot be read: {error}.") from None


def _open(path: pathlib.Path) -> Any:
    """An open safetensors file whose header is valid and names every array once."""
    try:
        if (found := disk.kind(path)) not in ("a file", None):
            raise UserError(f"{path} is {found}; only regular files are read.")
        path.stat()
        opened = safe_open(path, framework="np")
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}.") from None
    except OSError as error:
        pickled = sorted(p.name for p in path.parent.glob("*.bin"))
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}."
            + (
                f" {pickled[0]} is a pickled checkpoint, which this program does not read. The package"
                " transformers converts it: AutoModelForCausalLM.from_pretrained(...)"
                ".save_pretrained(FOLDER)."
                if pickled
                else ""
            )
        ) from None
    _parse_json(header, path)
    return opened


class PlannedArray(NamedTuple):
    """An array to be written. `make` is called right before the array is written, and its result is not kept."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_checkpoint(
    folder: pathlib.Path, arrays: list[PlannedArray], dtype: str, largest: int
) -> list[str]:
    """Writes a checkpoint, one array at a time, into files of at most `largest` bytes of arrays.

    An array that is larger than `largest` gets a file of its own.

    Returns:
        The names of the files.

    Raises:
        ValueError: an array does not have its planned shape.
    """
    kind = DTYPES[dtype]
    size = lambda array: math.prod(array.shape) * kind.itemsize
    groups: list[list[PlannedArray]] = [[]]
    for array in arrays:
        if groups[-1] and sum(map(size, groups[-1])) + size(array) > largest:
            groups.append([])
        groups[-1].append(array)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [SINGLE_FILE] if count == 1 else names
    for name, group in zip(names, groups):
        _write_file(folder / name, group, dtype)
    if count > 1:
        files = {array.name: name for name, group in zip(names, groups) for array in group}
        index = {"metadata": {"total_size": sum(map(size, arrays))}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write_file(path: pathlib.Path, arrays: list[PlannedArray], dtype: str) -> None:
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
                raise ValueError(
                    f"{name} has shape {array.shape}, but its planned shape is {shape}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
    part.replace(path)
