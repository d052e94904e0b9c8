"""How much wider every matrix is than its proxy's, and what a law makes of that, parameter by parameter.

The proxy's widths come in one of three forms:

* a number, the size of the axis ``D``: every matrix has the factor D/base, as where all widths grow together;
* sizes by letter, ``{"D": 256, "F": 688, "H": 4}``: a matrix has the product of size/base over its *input* axes;
  input axes that are not listed count as fixed, but every matrix needs one that is listed;
* the proxy's parameters (arrays or ``jax.ShapeDtypeStruct``): fan-in over the proxy's fan-in. Batch axes may differ, so
  that a deeper model can have a shallow proxy.

Only matrices that grow on both sides have a factor. Embeddings, norms and biases are vector-like, and so is the output
head unless it counts as a matrix (see `width_scaled_decay`).
"""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.parameters.paths import path_string
from optax_decay.width.laws import Growth, WidthLaw, unknown, width_law

# The letter that a plain number as base width is the size of.
WIDTH = "D"

HEADS = ("vector", "matrix")


class Base:
    """The widths of the proxy, checked, in any of the three forms that `width_factors` takes."""

    def __init__(self, base_width: Any, axes: axes_lib.Axes):
        self.number: float | None = None
        self.letters: dict[str, float] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(base_width, Mapping) and _is_letters(base_width):
            for letter, size in base_width.items():
                check(f"base_width[{letter!r}]", size, 0.0, open_low=True)
            self.letters = {letter: float(size) for letter, size in base_width.items()}
            _check_letters(self.letters, axes)
        elif np.ndim(base_width) == 0 and isinstance(base_width, int | float | np.number):
            check("base_width", base_width, 0.0, open_low=True)
            self.number = float(base_width)
        else:
            leaves = jax.tree_util.tree_flatten_with_path(base_width)[0]
            if not leaves or not all(hasattr(leaf, "shape") for _, leaf in leaves):
                raise ValueError(
                    f"base_width={base_width!r} is neither a width, nor sizes by letter such as "
                    f"{{'D': 256, 'F': 688}}, nor the proxy's parameters (arrays or jax.ShapeDtypeStruct)."
                )
            self.shapes = {path_string(key): tuple(leaf.shape) for key, leaf in leaves}

    def factor(self, signature: axes_lib.Signature, width: float | None) -> float:
        """m of one matrix; `width` is the size of the letter D in the tree."""
        if signature.source in ("guess", "name"):
            raise ValueError(
                f"{signature.path!r}: width scaling needs to know which matrices grow with width; describe the "
                "parameters with axes=... (rules, signature strings or MuonDimensionNumbers)."
            )
        if self.number is not None:
            if width is None:
                raise ValueError(
                    f"base_width={self.number:g} is the proxy's size of the axis {WIDTH!r}, which no parameter here "
                    "has; give sizes by letter or the proxy's parameters instead."
                )
            return width / self.number
        if self.letters is not None:
            return self._by_letter(signature, self.letters)
        return self._by_shape(signature)

    def _by_letter(self, signature: axes_lib.Signature, letters: dict[str, float]) -> float:
        names = [(signature.names[i], signature.shape[i]) for i in signature.inputs]
        known = [(name, size) for name, size in names if name in letters]
        if not known:
            raise ValueError(
                f"base_width has no size for an input axis of {signature.path!r} "
                f"({' '.join(signature.names) or 'axes without names'}); it has {sorted(letters)}. A size that does "
                "not change with width is given as it is."
            )
        return math.prod(size / letters[name] for name, size in known)

    def _by_shape(self, signature: axes_lib.Signature) -> float:
        shape = self.shapes.get(signature.path)
        if shape is None or len(shape) != len(signature.shape):
            near = difflib.get_close_matches(signature.path, list(self.shapes), n=1, cutoff=0.0)[0]
            what = "no parameter" if shape is None else f"shape {shape}"
            raise ValueError(
                f"the tree of base shapes has {what} at {signature.path!r}, which has shape {signature.shape}; the "
                f"nearest path is {near!r} of shape {self.shapes[near]}."
            )
        return signature.fan_in / math.prod(shape[i] for i in signature.inputs)


def _is_letters(base_width: Mapping[Any, Any]) -> bool:
    return (
        len(base_width) > 0
        and all(isinstance(k, str) for k in base_width)
        and all(isinstance(v, int | float | np.number) for v in base_width.values())
    )


def _check_letters(letters: Mapping[str, float], axes: axes_lib.Axes) -> None:
    """A letter that no signature holds is a slip; what cannot be read before the parameters are there passes."""
    texts = [text for text in jax.tree.leaves(axes) if isinstance(text, str)]
    if not texts:
        return
    known = {name for text in texts for name in re.findall(r"[A-Za-z]\w*", text)}
    for letter in letters:
        if letter not in known:
            near = difflib.get_close_matches(letter, sorted(known), n=1, cutoff=0.0)
            raise ValueError(
                f"base_width names the axis {letter!r}, which no signature has"
                + (f"; the nearest is {near[0]!r}." if near else ".")
            )


def width_factors(
    signatures: Mapping[str, axes_lib.Signature], base: Base, head: str = "vector"
) -> dict[str, float | None]:
    """m of every matrix by path, and None for vector-like parameters.

    Args:
        signatures: of the parameters, from `axes.signatures`.
        base: the proxy's widths.
        head: ``"vector"`` or ``"matrix"``, how the output head counts.

    Raises:
        ValueError: parameters without axes, or a matrix whose base size is not known.
    """
    sizes = {
        s.shape[i] for s in signatures.values() for i, name in enumerate(s.names) if name == WIDTH
    }
    if base.number is not None and len(sizes) > 1:
        raise ValueError(
            f"base_width={base.number:g} is one width, but the axis {WIDTH!r} has the sizes {sorted(sizes)}; give the "
            "proxy's parameters (arrays or jax.ShapeDtypeStruct) as base_width."
        )
    width = float(next(iter(sizes))) if sizes else None
    matrices = ("hidden", "head") if head == "matrix" else ("hidden",)
    return {
        path: base.factor(s, width) if s.role in matrices else None
        for path, s in signatures.items()
    }


class WidthPlan(NamedTuple):
    """A law for the parameters of one kind of model; made by `width_plan`.

    Attributes:
        base: the proxy's widths.
        hidden: law of hidden matrices.
        head: law of the output head where that counts as a matrix.
        head_as: ``"vector"`` or ``"matrix"``.
    """

    base: Base
    hidden: WidthLaw
    head: WidthLaw
    head_as: str

    def laws(
        self, signatures: Mapping[str, axes_lib.Signature]
    ) -> dict[str, tuple[float | None, WidthLaw]]:
        """m (None: vector-like) and the law of every parameter, by path."""
        factors = width_factors(signatures, self.base, self.head_as)
        return {
            path: (m, self.head if signatures[path].role == "head" else self.hidden)
            for path, m in factors.items()
        }

    def rates(self, signatures: Mapping[str, axes_lib.Signature]) -> dict[str, float]:
        """Multiplier of η by path: m^-r, and 1 for vector-like parameters."""
        return {
            path: 1.0 if m is None else m**-law.rate
            for path, (m, law) in self.laws(signatures).items()
        }

    def decays(
        self, signatures: Mapping[str, axes_lib.Signature], rates_applied: bool
    ) -> dict[str, Any]:
        """Multiplier of λ by path: m^s, or m^(s-r) where no multiplier of η follows."""
        return {
            path: law.vectors
            if m is None
            else m ** (law.decay - law.rate if rates_applied else law.decay)
            for path, (m, law) in self.laws(signatures).items()
        }


def width_plan(
    base_width: Any,
    *,
    rule: str | WidthLaw = "fan2025",
    exponent: float | None = None,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    axes: axes_lib.Axes = None,
) -> WidthPlan:
    """Checks the arguments that everything about width has in common; see `width_scaled_decay` for them."""
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    return WidthPlan(
        Base(base_width, axes),
        width_law(rule, exponent=exponent, optimizer=optimizer),
        width_law(rule, exponent=exponent, optimizer="adam"),
        head,
    )


def decay_multipliers(
    params: Any,
    base_width: Any,
    *,
    rule: str | WidthLaw = "fan2025",
    exponent: float | None = None,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    rates_applied: bool = False,
    axes: axes_lib.Axes = None,
) -> Any:
    """What λ is multiplied with, as a tree of numbers like `params`, for training code with its own decay.

    Arguments as in `width_scaled_decay`. With AdamW's coupling and a learning rate per parameter the product
    ``η · learning_rate_multipliers · λ · decay_multipliers`` is the shrink per step.
    """
    plan = width_plan(
        base_width, rule=rule, exponent=exponent, optimizer=optimizer, head=head, axes=axes
    )
    return _like(params, plan.decays(axes_lib.signatures(axes, params), rates_applied))


def learning_rate_multipliers(
    params: Any,
    base_width: Any,
    *,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    axes: axes_lib.Axes = None,
) -> Any:
    """What η is multiplied with, as a tree of numbers like `params`: m^-r for matrices, else 1."""
    plan = width_plan(base_width, optimizer=optimizer, head=head, axes=axes)
    return _like(params, plan.rates(axes_lib.signatures(axes, params)))


def _like(params: Any, values: Mapping[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda key, _: values[path_string(key)], params)
