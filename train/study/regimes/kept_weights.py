"""The final weights of runs that count, in files of their own: written by one comparison, read by another."""

import functools
import pathlib
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config.fields import UserError
from train.study.regimes.work import Record
from train.study.small_runs import SmallProgram, numbers


def keep(params: Any, folder: pathlib.Path, job: Record) -> str:
    """Writes the weights of a run to a file of the folder; returns its name and checksum."""
    (folder / "weights").mkdir(exist_ok=True)
    text = re.sub(r"[^\w.]", "_", job["text"])
    name = f"{job['arm']}-{text}-{job['seed']}.npz"
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    path = folder / "weights" / name
    part = path.with_name(f"{name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
    return f"{name} {zlib.crc32(path.read_bytes()):08x}"


def load(small: SmallProgram, folder: pathlib.Path, name: str) -> Any:
    """Weights that a run has left; `name` is that of the file and its checksum.

    Raises:
        UserError: the file is missing or was changed.
    """
    file, _, check = name.partition(" ")
    path = folder / file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if f"{zlib.crc32(content):08x}" != check:
        raise UserError(f"{path} is not what the run has written: its checksum differs.")
    with np.load(path) as arrays:
        shapes = jax.eval_shape(
            functools.partial(_init, small), jax.ShapeDtypeStruct((), jnp.uint32)
        )
        paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
        leaves = [jnp.asarray(arrays[jax.tree_util.keystr(where)]) for where, _ in paths]
    return jax.tree.unflatten(treedef, leaves)


def _init(small: SmallProgram, seed: Any) -> Any:
    return small.params(small.init(numbers(1.0, 0.0, 1, seed)))
