"""Migrates the state of one optimizer to another: leaves with the same name are kept, and all changes are reported.

A leaf of an optimizer state has a path ("inner_state/0/mu/head/kernel"), which changes with every wrapper and link of a
chain, and a name ("ScaleByAdamState.mu/head/kernel"), which consists of the innermost state type, its field, and the
path below. A leaf is kept if a leaf of the old state has the same path and name, or else if the name identifies exactly
one leaf. The name contains the state type because fields of the same name differ in meaning: Adam's `mu` is not
Conda's. The parameters and the step are always kept, and must be complete.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.axes import leaf_paths, path_string
from train.errors import UserError
from train.run.relayout import Pieces


def leaf_names(state: Any) -> dict[str, str]:
    """Path to name of every array of a state."""
    names = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        node, start, owner = state, 0, ""
        for depth, key in enumerate(keys):
            if isinstance(node, tuple) and hasattr(node, "_fields"):
                start, owner = depth, type(node).__name__ + "."
            node = _child(node, key)
        path = path_string(keys)
        names[path] = owner + "/".join(path.split("/")[start:])
    return names


def _child(node: Any, key: Any) -> Any:
    """The child of a tree node under a key; None if the node does not support the key."""
    match key:
        case jax.tree_util.DictKey():
            return node[key.key]
        case jax.tree_util.SequenceKey():
            return node[key.idx]
        case jax.tree_util.GetAttrKey():
            return getattr(node, key.name)
    return None


@dataclasses.dataclass(frozen=True)
class MigrationPlan:
    """What happens to each leaf."""

    kept: dict[str, str]  # new path to old path
    reset: tuple[str, ...]  # new paths that start with their initial values
    dropped: tuple[str, ...]  # old paths that are not used
    # What the kept leaves of another layout of layers are made of (relayout.py), by path in the new one.
    pieces: dict[str, Pieces] = dataclasses.field(default_factory=dict)

    @property
    def changes(self) -> bool:
        moved = any(a != b for a, b in self.kept.items())
        return bool(self.reset or self.dropped or moved or self.pieces)

    def __str__(self) -> str:
        moved = {new: old for new, old in self.kept.items() if new != old}
        groups = (
            ("kept", [p for p in self.kept if p not in moved and p not in self.pieces]),
            ("kept, from another layout of the layers", sorted(self.pieces)),
            ("kept, moved", [f"{old} -> {new}" for new, old in moved.items()]),
            ("reset to their initial values", self.reset),
            ("dropped", self.dropped),
        )
        lines = [
            f"{len(paths)} arrays {what}\n" + _listed(paths) for what, paths in groups if paths
        ]
        return "\n".join(lines)


def _listed(paths: Any) -> str:
    return "\n".join(f"    {path}" for path in paths)


def plan_migration(
    old: dict[str, tuple[str, str]], new: dict[str, tuple[str, str]]
) -> MigrationPlan:
    """Decides which leaf of `old` each leaf of `new` keeps; both map paths to (name, "dtype[shape]").

    Raises:
        UserError: the parameters or the step differ.
    """
    fixed = ("params/", "step")
    a, b = ({p: v for p, v in side.items() if p.startswith(fixed)} for side in (old, new))
    if a != b:
        path = next(p for p in sorted(a.keys() | b.keys()) if a.get(p) != b.get(p))
        kinds = [side[path][1] if path in side else "absent" for side in (a, b)]
        raise UserError(
            f"Only the optimizer of a run can change, not its model: {path} is {kinds[0]} in the"
            f" checkpoint and {kinds[1]} now. Start a new run for another model."
        )
    same = [path for path in new if path in old and compatible(old[path], new[path])]
    kept = {path: path for path in same}
    free, open_ = (_by_name(side, kept) for side in (old, new))
    for path, value in new.items():
        if path not in kept:
            near = [p for p in free.get(value[0], ()) if compatible(old[p], value)]
            rivals = [p for p in open_[value[0]] if compatible(value, new[p])]
            chosen = _nearest(path, near, rivals)
            if chosen is not None:
                kept[path] = chosen
    used = set(kept.values())
    return MigrationPlan(
        kept,
        tuple(path for path in new if path not in kept),
        tuple(path for path in old if path not in used),
    )


# What was measured when the run began. Measured again from trained weights, it would be something else.
OF_THE_START = {
    "HyperballState.radius": ("the norms of the matrices", "radius"),
    "TowardInitialState.initial": ("the initial weights", None),
}


def refuse_lost_start(plan: MigrationPlan, names: dict[str, str], config: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint lacks what a rule remembers of the first step.

    Args:
        plan: of the migration.
        names: of the new leaves, by path.
        config: of the run that goes on, as in config.json.
    """
    for path in plan.reset:
        kind = names[path].split("/")[0]
        if kind not in OF_THE_START:
            continue
        what, number = OF_THE_START[kind]
        part = next(
            (part for part in ("optimizer", "decay") if number in config.get(part, {})), None
        )
        if part and config[part][number] is not None:
            continue
        advice = (
            f"set {part}.{number} to a number, or start a new run" if part else "start a new run"
        )
        raise UserError(
            f"The checkpoint does not hold {what} at the start of the run, {path}, and they cannot be measured from"
            f" trained weights; nearest: {advice}."
        )


def _by_name(side: dict[str, tuple[str, str]], without: Any) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for path, (name, _) in side.items():
        if path not in without:
            grouped.setdefault(name, []).append(path)
    return grouped


def compatible(old: tuple[str, str], new: tuple[str, str]) -> bool:
    """Whether an old leaf can become a new one: same name and shape, and the same type or two floating-point types."""
    if old == new:
        return True
    try:
        a, b = (parse_shape(text) for text in (old[1], new[1]))
    except ValueError:  # random keys only fit the same type
        return False
    floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b))
    return old[0] == new[0] and a.shape == b.shape and floats


def _nearest(path: str, candidates: list[str], rivals: list[str]) -> str | None:
    """The candidate with the longest common end with `path`, if it is unique, and has no longer one with a rival."""
    best = _most_alike(path, candidates)
    return best if best is not None and _most_alike(best, rivals) == path else None


def _most_alike(path: str, others: list[str]) -> str | None:
    scores = {other: _common_end(path, other) for other in others}
    best = [other for other in others if scores[other] == max(scores.values())]
    return best[0] if len(best) == 1 else None


def _common_end(a: str, b: str) -> int:
    count = 0
    for x, y in zip(reversed(a.split("/")), reversed(b.split("/"))):
        if x != y:
            break
        count += 1
    return count


_SHAPE = re.compile(r"([a-z][a-z0-9_]{0,30})\[((?:\d{1,18}(?:, \d{1,18}){0,15})?)\]")


def parse_shape(text: str) -> jax.ShapeDtypeStruct:
    """Parses a string such as "float32[3, 5]"; raises ValueError for any other string."""
    parts = _SHAPE.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text[:60]!r} must be a type and a shape, such as 'float32[3, 5]'")
    try:
        dtype = jnp.dtype(parts[1])
    except TypeError:
        dtype = None
    if dtype is None or not (dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)):
        raise ValueError(f"{parts[1]!r} is not a numeric type")
    return jax.ShapeDtypeStruct(tuple(int(n) for n in parts[2].split(", ") if n), dtype)


def replace_leaves(state: Any, kept: dict[str, Any]) -> Any:
    """Replaces the leaves of `state` at the paths in `kept`, converted to the types in `state`."""
    leaves, treedef = jax.tree.flatten(state)
    new = [
        kept[path].astype(leaf.dtype) if path in kept else leaf
        for path, leaf in zip(leaf_paths(state), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)
