"""Names of leaves, and ordered rules over them in which nothing is missed silently."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from optax_decay.parameters.arguments import nearest


def _is_hole(x: object) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def path_string(path: jax.tree_util.KeyPath) -> str:
    """The ``/``-joined path of a leaf; the ``value`` that Flax appends to variables is dropped."""
    return re.sub(r"/\.?value$", "", jax.tree_util.keystr(path, simple=True, separator="/"))


def leaf_paths(tree: optax.Params) -> list[str]:
    """Paths of the leaves of `tree`, in flattening order."""
    return [path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def matches(pattern: str, path: str) -> bool:
    """True when `pattern` matches the end of `path`, starting at a path component."""
    try:
        return re.search(rf"(?:^|/)(?:{pattern})$", path) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def match_rules(
    rules: Sequence[tuple[str, Any]], params: optax.Params, what: str
) -> dict[str, Any]:
    """First matching rule's value per leaf path; raises for leaves and rules left over.

    Leaves hidden by `optax.masked` or `optax.partition` count as matched, so that one list of rules serves every
    part of a partitioned tree.
    """
    items = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_hole)[0]
    used: set[str] = set()
    values: dict[str, Any] = {}
    for key, leaf in items:
        path = path_string(key)
        hits = [(pattern, value) for pattern, value in rules if matches(pattern, path)]
        if hits:
            used.add(hits[0][0])
            if not _is_hole(leaf):
                values[path] = hits[0][1]
        elif not _is_hole(leaf):
            if not rules:
                raise ValueError(f"the list of {what} rules is empty.")
            raise ValueError(
                f"no {what} rule matches the parameter {path!r} of shape {tuple(leaf.shape)}; "
                f"the nearest pattern is {nearest(path, (p for p, _ in rules))!r}."
            )
    paths = [path_string(key) for key, _ in items]
    for pattern, _ in rules:
        if paths and pattern not in used:
            shadowed = any(matches(pattern, path) for path in paths)
            raise ValueError(
                f"the {what} rule {pattern!r} matches no parameter"
                + (" that an earlier rule leaves over" if shadowed else "")
                + f"; the nearest path is {nearest(pattern, paths)!r}."
            )
    return values


def shapes(params: optax.Params) -> Any:
    """`params` with every leaf replaced by its ``jax.ShapeDtypeStruct``: all that a rule may look at."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
