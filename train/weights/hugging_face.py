"""Loads and saves weights in the format of Hugging Face's `transformers`: config.json and safetensors files.

    python -m train --model.weights FOLDER ...                              starts a run from such weights
    python -m train export RUN --out FOLDER [--dtype bfloat16]              writes the weights of a run (export.py)

Supported are GPT-2 and LLaMA with their usual options; other options in config.json raise an error. Loading and saving
hold one array of one layer at a time in host memory, for models of any size.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from optax_decay.axes import leaf_paths
from train.errors import UserError
from train.step import families
from train.weights.hugging_face_arrays import CONSTANTS, FileArray, LayerSlice, arrays
from train.weights.hugging_face_config import FIELDS, config_json, read_config
from train.weights.safetensors_file import PlannedArray, Tensors, write_checkpoint

LARGEST_FILE = 5_000_000_000  # bytes; the limit of transformers


def load_pretrained(folder: pathlib.Path, model: Any, shardings: Any) -> Any:
    """Loads the weights in a folder as parameters of `model`, in float32.

    Args:
        folder: with config.json and safetensors files.
        model: a Config of `models/` with the same shape.
        shardings: a tree of NamedSharding, structured like the parameters.

    Raises:
        UserError: the weights belong to another model, or an array is missing, unexpected, or of another shape.
    """
    saved = read_config(folder)
    for name in FIELDS[families.of(saved)]:
        ours, theirs = getattr(model, name, None), getattr(saved, name)
        if ours != theirs and (
            name != "kv_heads" or (ours or model.heads) != (theirs or saved.heads)
        ):
            raise UserError(
                f"The weights in {folder} have {name} = {theirs}, but the model has {ours}."
            )
    tensors = Tensors(folder)
    wanted = [(array, _name_in_files(array, tensors, folder)) for array in arrays(model)]
    _check_all_used(tensors, {name for _, name in wanted}, folder, saved.tied)
    init = families.of(model).init
    like = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    paths, (leaves, tree) = leaf_paths(like), jax.tree.flatten(like)
    places = dict(zip(paths, jax.tree.leaves(shardings), strict=True))
    sizes = {path: leaf.shape for path, leaf in zip(paths, leaves, strict=True)}
    params: dict[str, jax.Array] = {}
    for array, name in wanted:
        values = tensors.read_finite(name)
        values, begin = values.T if array.transposed else values, 0
        for piece in array.pieces:
            end = begin + piece.matrix[-1]
            one = _placed(values[..., begin:end], piece, places[piece.path])
            begin = end
            if piece.layer is not None:
                if piece.layer == 0:
                    params[piece.path] = _empty(sizes[piece.path], places[piece.path])
                one = _put(places[piece.path])(params[piece.path], one, piece.layer)
            params[piece.path] = one
    return jax.tree.unflatten(tree, [params[path] for path in paths])


def _name_in_files(array: FileArray, tensors: Tensors, folder: pathlib.Path) -> str:
    """The name of an array in the files, which lacks its first component if only the inner network was saved."""
    name = array.name if array.name in tensors else array.name.split(".", 1)[1]
    if name not in tensors:
        raise UserError(f"The weights in {folder} have no array {array.name!r}.")
    if tensors.shape(name) != array.shape:
        raise UserError(
            f"{name!r} in {folder} has the shape {tensors.shape(name)}; its config.json requires {array.shape}."
        )
    return name


def _check_all_used(tensors: Tensors, used: set[str], folder: pathlib.Path, tied: bool) -> None:
    ignored = (*CONSTANTS, "lm_head.weight") if tied else CONSTANTS
    extra = sorted(n for n in tensors if n not in used and not f".{n}".endswith(ignored))
    if extra:
        raise UserError(
            f"The weights in {folder} hold {len(extra)} arrays that the model does not have, such as"
            f" {extra[0]!r}: a bias or a layer that config.json does not mention."
        )


def _placed(values: np.ndarray, piece: LayerSlice, sharding: NamedSharding) -> jax.Array:
    """Places one layer on its devices; each device receives only its own part."""
    values = values.reshape(piece.shape)
    spec = sharding.spec if piece.layer is None else tuple(sharding.spec)[1:]

    part = lambda index: np.asarray(values[index], np.float32) / np.float32(piece.factor)
    where = NamedSharding(sharding.mesh, jax.P(*spec))
    return jax.make_array_from_callback(piece.shape, where, part)


def _empty(shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()


@functools.cache
def _put(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """A function that overwrites one layer of a stack, in place."""
    put = lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@jax.jit
def _take(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def save_pretrained(
    folder: pathlib.Path,
    model: Any,
    params: Any,
    *,
    length: int = 2048,
    separator: int | None = None,
    dtype: str = "float32",
    largest: int = LARGEST_FILE,
) -> list[str]:
    """Saves parameters in the format of transformers.

    Args:
        folder: for the files; created if necessary.
        model: a Config of `models/`.
        params: its parameters, on any devices of this process.
        length, separator: see `config_json`.
        dtype: of the saved numbers, float32 or bfloat16.
        largest: limit of the size of a file [bytes].

    Returns:
        The names of the files.
    """
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))

    def fetch(piece: LayerSlice) -> np.ndarray:
        if piece.path not in leaves:  # a bias that the architecture has, but the model does not
            return np.zeros(piece.matrix, np.float32)
        leaf = leaves[piece.path]
        one = np.asarray(leaf if piece.layer is None else _take(leaf, piece.layer), np.float32)
        return one.reshape(piece.matrix) * np.float32(piece.factor)

    def make(array: FileArray) -> np.ndarray:
        values = np.concatenate([fetch(piece) for piece in array.pieces], axis=-1)
        return values.T if array.transposed else values

    folder.mkdir(parents=True, exist_ok=True)
    planned = [PlannedArray(a.name, a.shape, functools.partial(make, a)) for a in arrays(model)]
    kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    files = write_checkpoint(folder, planned, kind, largest)
    described = config_json(model, length, separator) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return ["config.json", *files]
