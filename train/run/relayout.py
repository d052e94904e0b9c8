"""Layers as one stack of arrays or as arrays of their own: which arrays of a checkpoint another layout consists of.

    blocks/mlp/up  [3, 4, 6]        blocks_0/mlp/up, blocks_1/mlp/up, blocks_2/mlp/up  [4, 6]
                                    blocks/0/mlp/up, blocks/1/mlp/up, blocks/2/mlp/up  [4, 6]

The paths of an optimizer state end with those of its parameters, so that moments, radii and anchors follow by the same
rule: a radius [3] becomes three radii []. Nothing is computed, every number keeps its bits.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Leaves = Mapping[str, jax.ShapeDtypeStruct]
Pieces = tuple[tuple[str, int | None], ...]  # a path and an index into its array; None: all of it


def pieces(old: Leaves, new: Leaves) -> dict[str, Pieces]:
    """The old arrays that each new array consists of, by new path; only of those that are laid out otherwise.

    A stack is only taken apart if all of it is used: fewer layers are another model.

    Args:
        old, new: arrays of the two layouts, by path.
    """
    found: dict[str, Pieces] = {}
    for path, leaf in new.items():
        if path in old:
            continue
        parts = path.split("/")
        for i, part in enumerate(parts):
            around = lambda middle, i=i, parts=parts: "/".join(
                [*parts[:i], *middle, *parts[i + 1 :]]
            )
            own = _slice(old, leaf, part, around) or _stack(old, leaf, part, around)
            if own:
                found[path] = own
    used: dict[str, set[int]] = {}
    for own in found.values():
        for path, index in own:
            if index is not None:
                used.setdefault(path, set()).add(index)
    partly = {path for path, seen in used.items() if len(seen) < old[path].shape[0]}
    return {path: own for path, own in found.items() if own[0][0] not in partly}


def _slice(
    old: Leaves, leaf: jax.ShapeDtypeStruct, part: str, around: Callable[..., str]
) -> Pieces | None:
    """One layer of an old stack: `part` is ``blocks_2``, or the 2 of ``blocks/2``."""
    number = re.fullmatch(r"(?:(.+)_)?([0-9]{1,6})", part)
    if number is None:
        return None
    path, index = around([number[1]] if number[1] else []), int(number[2])
    stack = old.get(path)
    if stack is None or not stack.shape or stack.dtype != leaf.dtype:
        return None
    layers, *shape = stack.shape
    return ((path, index),) if tuple(shape) == leaf.shape and index < layers else None


def _stack(
    old: Leaves, leaf: jax.ShapeDtypeStruct, part: str, around: Callable[..., str]
) -> Pieces | None:
    """All layers, each an old array of its own."""
    for layer in (lambda k: [f"{part}_{k}"], lambda k: [part, str(k)]):
        if not leaf.shape or around(layer(0)) not in old:
            continue
        layers = [around(layer(k)) for k in range(leaf.shape[0])]
        one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        same = (p in old and (old[p].shape, old[p].dtype) == (one.shape, one.dtype) for p in layers)
        if all(same):
            return tuple((path, None) for path in layers)
    return None


def assembled(own: Pieces, arrays: Mapping[str, jax.Array], sharding: Any) -> jax.Array:
    """The new array, made of its pieces, on its devices."""
    parts = [arrays[path] if index is None else arrays[path][index] for path, index in own]
    stacked = own[0][1] is None
    return jax.device_put(jnp.stack(parts) if stacked else parts[0], sharding)
