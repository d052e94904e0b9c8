"""Which parameters decay, and how strongly: masks by role, rule, tree, prefix or function.

Every form ends as one number per parameter: 0 leaves it alone, 1 decays it, 0.5 decays it half as strongly.
"""

import re
import types
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters import paths
from optax_decay.parameters.arguments import one_of

Mask = Any  # what `strengths` accepts

# The default of ready-made optimizers: embeddings, norms and biases do not decay.
MATRICES = ("hidden", "head")


# Words of a path that contradict the guess of a role: parameters with these names are not hidden matrices, not vectors.
_ADVICE = "pass axes=..., such as those that optax_decay.axes.infer(model) finds"
_NOT_HIDDEN = {
    *("norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "rms", "scale", "gamma"),
    *("beta", "offset", "bias", "embed", "embedding", "embeddings", "emb", "wte", "wpe"),
}
_NOT_VECTOR = {"kernel", "weight"}


def _is_roles(mask: Any) -> bool:
    return isinstance(mask, str) or (
        isinstance(mask, tuple | list | set | frozenset)
        and len(mask) > 0
        and all(isinstance(m, str) for m in mask)
    )


def _is_rules(mask: Any) -> bool:
    return (
        isinstance(mask, tuple | list)
        and len(mask) > 0
        and all(
            isinstance(r, tuple | list)
            and len(r) == 2
            and isinstance(r[0], str)
            and not isinstance(r[1], str)
            for r in mask
        )
    )


class GuessedRolesWarning(UserWarning):
    """A mask by role where neither axes nor names say what a parameter is."""


def check_mask(mask: Mask) -> None:
    """Raises ValueError for role names that do not exist; other forms can only be checked against parameters."""
    for role in (mask,) if isinstance(mask, str) else mask if _is_roles(mask) else ():
        one_of("mask", role, axes_lib.ROLES)


def _number(value: jax.typing.ArrayLike, path: str) -> float:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"the mask at {path!r} is traced; masks are decided when a step is compiled."
        )
    shape = np.shape(value) if isinstance(value, np.ndarray | jax.Array) else ()
    numeric = shape == () and isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    number = float(np.asarray(value)) if numeric else -1.0
    if not 0.0 <= number < float("inf"):
        found = f"an array of shape {shape}" if shape else repr(value)
        raise ValueError(f"the mask at {path!r} is {found}; allowed: True, False or a number >= 0.")
    return number


def _called(mask: Any, params: optax.Params) -> Any:
    """The tree that a mask function returns for the tree of parameters.

    Raises:
        ValueError: the function does not take a tree, or returns one value for all of it.
    """
    form = (
        "It is called once, with the tree; return a tree of numbers (jax.tree.map or "
        'jax.tree_util.tree_map_with_path), or write rules, such as mask=((".*kernel", True), (".*", False)).'
    )
    try:
        found = mask(paths.shapes(params))
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"the mask function failed on the tree of parameters ({type(error).__name__}: {error}). {form}"
        ) from error
    one = found is None or jax.tree.leaves(found) == [found]
    if one and jax.tree.leaves(params) != [params]:
        raise ValueError(
            f"the mask function returned {found!r} for the whole tree of parameters. {form}"
        )
    return found


def strengths(
    mask: Mask, params: optax.Params, signatures: dict[str, axes_lib.Signature]
) -> dict[str, float]:
    """The number of every parameter, by path.

    Args:
        mask: None (every leaf); a role or several (`axes.ROLES`); rules ``((path pattern, value), ...)``
            where the first match wins and every parameter and every rule must match; a tree of values, or any
            prefix of one; or a function from a tree of ``jax.ShapeDtypeStruct`` to such a tree, so that a rule
            on values, which would change between gradients and weights, cannot be written. Values are True,
            False or non-negative numbers.
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        signatures: `axes.signatures` of the same tree.

    Raises:
        ValueError: an unknown role, or one that could only be guessed against the name of a parameter; a pattern
            without a parameter or the reverse; a bad value; a function that does not return a tree.
    """
    if not signatures:
        return {}
    if mask is None:
        return dict.fromkeys(signatures, 1.0)
    if _is_roles(mask):
        check_mask(mask)
        roles = (mask,) if isinstance(mask, str) else tuple(mask)
        _refuse_contradicted(roles, signatures)
        warn_of_guesses(f"mask={roles!r}", signatures)
        return {path: float(s.role in roles) for path, s in signatures.items()}
    if _is_rules(mask):
        values = paths.match_rules(mask, params, "mask")
        return {path: _number(values[path], path) for path in signatures}
    if isinstance(mask, types.FunctionType | types.MethodType) or (
        callable(mask) and jax.tree.leaves(mask) == [mask]
    ):
        mask = _called(mask, params)
    flat: list[Any] = []
    try:
        jax.tree.map(
            lambda value, part: flat.extend([value] * len(jax.tree.leaves(part))),
            mask,
            params,
            is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode),
        )
    except ValueError as error:
        raise ValueError(
            f"the mask is neither a prefix of the parameter tree nor a role, rules or a function: {error}"
        ) from error
    return {path: _number(value, path) for path, value in zip(signatures, flat, strict=True)}


def _refuse_contradicted(
    roles: tuple[str, ...], signatures: Mapping[str, axes_lib.Signature]
) -> None:
    """Raises where the name of a parameter contradicts the guess of its role."""
    for s in signatures.values():
        if s.source != "guess" or len(s.shape) < 2:
            continue
        against = {"hidden": _NOT_HIDDEN, "vector": _NOT_VECTOR}.get(s.role, set())
        words = [word for word in re.split(r"[/._\d]+", s.path.lower()) if word in against]
        if words:
            raise ValueError(
                f"mask={roles!r} goes by roles, and nothing but its shape {s.shape} says which role {s.path!r} has; "
                f"that would make it {s.role!r}, which {words[0]!r} in its name contradicts: {_ADVICE}, or write rules."
            )


def warn_of_guesses(what: str, signatures: Mapping[str, axes_lib.Signature]) -> None:
    """Warns when a choice by role rests on a guess.

    Args:
        what: the choice, as the subject of a sentence.
        signatures: `axes.signatures` of the parameters.
    """
    guessed = [s for s in signatures.values() if s.source == "guess" and len(s.shape) > 1]
    if guessed:
        first = guessed[0]
        more = f" (and that of {len(guessed) - 1} more)" if guessed[1:] else ""
        warnings.warn(
            f"{what} goes by roles, and the role of {first.path!r} with shape {first.shape} is guessed to be "
            f"{first.role!r}{more}: {_ADVICE}.",
            GuessedRolesWarning,
            stacklevel=4,
        )
