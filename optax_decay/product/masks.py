"""Which parameters decay, and how strongly: masks by role, rule, tree, prefix or function.

Every form ends as one number per parameter: 0 leaves it alone, 1 decays it, 0.5 decays it half as strongly.
"""

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


def _is_roles(mask: Any) -> bool:
    return isinstance(mask, str) or (
        isinstance(mask, tuple | list) and len(mask) > 0 and all(isinstance(m, str) for m in mask)
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
    numeric = np.ndim(value) == 0 and not isinstance(value, str) and value is not None
    number = float(np.asarray(value)) if numeric else -1.0
    if not 0.0 <= number < float("inf"):
        raise ValueError(
            f"the mask at {path!r} is {value!r}; allowed: True, False or a number >= 0."
        )
    return number


def strengths(
    mask: Mask, params: optax.Params, signatures: dict[str, axes_lib.Signature]
) -> dict[str, float]:
    """The number of every parameter, by path.

    Args:
        mask: None (every leaf); a role or tuple of roles (`axes.ROLES`); rules ``((path pattern, value), ...)``
            where the first match wins and every parameter and every rule must match; a tree of values, or any
            prefix of one; or a function from a tree of ``jax.ShapeDtypeStruct`` to such a tree, so that a rule
            on values, which would change between gradients and weights, cannot be written. Values are True,
            False or non-negative numbers.
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        signatures: `axes.signatures` of the same tree.

    Raises:
        ValueError: an unknown role, a pattern without a parameter or the reverse, a bad value.
    """
    if not signatures:
        return {}
    if mask is None:
        return dict.fromkeys(signatures, 1.0)
    if _is_roles(mask):
        check_mask(mask)
        roles = (mask,) if isinstance(mask, str) else tuple(mask)
        warn_of_guesses(f"mask={roles!r}", signatures)
        return {path: float(s.role in roles) for path, s in signatures.items()}
    if _is_rules(mask):
        values = paths.match_rules(mask, params, "mask")
        return {path: _number(values[path], path) for path in signatures}
    if isinstance(mask, types.FunctionType | types.MethodType) or (
        callable(mask) and jax.tree.leaves(mask) == [mask]
    ):
        mask = mask(paths.shapes(params))
        if isinstance(mask, bool | np.bool):
            raise ValueError(
                f"the mask function returned {mask!r} for the whole tree of parameters. It is called once, with the "
                "tree; return a tree of numbers (jax.tree.map or jax.tree_util.tree_map_with_path), or write rules, "
                'such as mask=((".*kernel", True), (".*", False)).'
            )
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
            f"{first.role!r}{more}: pass axes=..., such as those that optax_decay.axes.infer(model) finds.",
            GuessedRolesWarning,
            stacklevel=4,
        )
