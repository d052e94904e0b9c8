"""How much wider every matrix is than that of the proxy, and the multipliers that a law derives from it.

The widths of the proxy, `base_width`, come in one of three forms:

* A number, the size of the axis ``D``. Every matrix has the factor D/base, which is right where all widths grow
  together.
* Sizes by letter, ``{"D": 256, "F": 688, "H": 4}``. A matrix has the product of size/base over its *input* axes. Input
  axes that are not listed count as fixed, but every matrix needs at least one listed input axis.
* The parameters of the proxy (arrays or ``jax.ShapeDtypeStruct``). A matrix has its fan-in over the fan-in in the
  proxy. Batch axes may differ, so a deeper model can have a shallow proxy.

Only matrices that grow on both sides have a factor. Embeddings, norms and biases are vector-like, and so is the output
head unless the law counts it as a matrix.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, nearest
from optax_decay.parameters.paths import path_string
from optax_decay.width import laws
from optax_decay.width.laws import Exponents, WidthLaw, check_law

BaseWidth = Any  # a number, sizes by letter, or a tree of arrays or jax.ShapeDtypeStruct

# A plain number as base width is the size of this axis.
WIDTH = "D"


class Base:
    """The checked widths of the proxy, in one of the three forms above.

    Args:
        base_width: the widths of the proxy.
        axes: of the parameters; signature strings serve to check the letters of `base_width`.

    Raises:
        ValueError: something that has none of the three forms, a size that is not positive, or an unknown letter.
    """

    def __init__(self, base_width: BaseWidth, axes: axes_lib.Axes):
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
        """The factor m of one matrix; `width` is the size of the axis D in the tree of parameters."""
        if signature.source in ("guess", "name"):
            raise ValueError(
                f"width scaling needs to know how {signature.path!r} grows with width; describe the parameters with "
                "axes=..., such as those that optax_decay.axes.infer(model) finds."
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
                f"({' '.join(signature.names) or 'axes without names'}); it has {sorted(letters)}. For an axis that "
                "does not change with width, give its size as it is."
            )
        return math.prod(size / letters[name] for name, size in known)

    def _by_shape(self, signature: axes_lib.Signature) -> float:
        shape = self.shapes.get(signature.path)
        if shape is None or len(shape) != len(signature.shape):
            near = nearest(signature.path, self.shapes)
            found = "no parameter" if shape is None else f"shape {shape}"
            raise ValueError(
                f"base_width has {found} at {signature.path!r}, which has shape {signature.shape}; the "
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
    """Raises ValueError for a letter that no signature string holds; passes where `axes` holds no such strings."""
    texts = [text for text in jax.tree.leaves(axes) if isinstance(text, str)]
    if not texts:
        return
    known = {name for text in texts for name in re.findall(r"[A-Za-z]\w*", text)}
    for letter in letters:
        if letter not in known:
            raise ValueError(
                f"base_width names the axis {letter!r}, which no signature has"
                + (f"; the nearest is {nearest(letter, sorted(known))!r}." if known else ".")
            )


def width_factors(
    signatures: Mapping[str, axes_lib.Signature], base: Base, roles: Sequence[str] = ("hidden",)
) -> dict[str, float | None]:
    """The factor m of every matrix by path, and None for vector-like parameters.

    Args:
        signatures: of the parameters, from `axes.signatures`.
        base: the widths of the proxy.
        roles: parameters of these roles have a factor.

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
    return {
        path: base.factor(s, width) if s.role in roles else None for path, s in signatures.items()
    }


class WidthPlan(NamedTuple):
    """A law and the proxy that it starts from. Build one with `width_plan`.

    Attributes:
        base: the widths of the proxy.
        law: how learning rate and decay follow the width.
    """

    base: Base
    law: WidthLaw

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the parameters that the law counts as matrices."""
        return ("hidden",) if self.law.head is None else ("hidden", "head")

    def exponents(
        self, signatures: Mapping[str, axes_lib.Signature]
    ) -> dict[str, tuple[float | None, Exponents]]:
        """The factor m (None for vector-like parameters) and the exponents of every parameter, by path."""
        factors = width_factors(signatures, self.base, self.roles)
        head = self.law.head or self.law.hidden
        return {
            path: (m, head if signatures[path].role == "head" else self.law.hidden)
            for path, m in factors.items()
        }

    def rates(self, signatures: Mapping[str, axes_lib.Signature]) -> dict[str, float]:
        """The multiplier of η by path: m^-r, and 1 for vector-like parameters."""
        return {
            path: 1.0 if m is None else m**-own.rate
            for path, (m, own) in self.exponents(signatures).items()
        }

    def decays(
        self, signatures: Mapping[str, axes_lib.Signature], rates_applied: bool
    ) -> dict[str, Any]:
        """The multiplier of λ by path: m^s, or m^(s-r) where no multiplier of η follows in the chain."""
        return {
            path: self.law.vectors
            if m is None
            else m ** (own.decay - own.rate if rates_applied else own.decay)
            for path, (m, own) in self.exponents(signatures).items()
        }


def width_plan(base_width: BaseWidth, law: WidthLaw, axes: axes_lib.Axes = None) -> WidthPlan:
    """Checks the arguments that all functions about width share; `width_scaled_decay` describes them."""
    check_law(law)
    return WidthPlan(Base(base_width, axes), law)


def decay_multipliers(
    params: optax.Params,
    base_width: BaseWidth,
    *,
    law: WidthLaw = laws.law(),
    rates_applied: bool = False,
    axes: axes_lib.Axes = None,
) -> Any:
    """The multiplier of λ of every parameter, for training code with its own decay.

    With AdamW's coupling and one learning rate per parameter, the shrink per step is
    ``η · learning_rate_multipliers · λ · decay_multipliers``.

    Args:
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        base_width, law, axes: as in `width_scaled_decay`.
        rates_applied: return m^(s-r) instead of m^s, for a decay that is not multiplied by the learning rate of its
            parameter.

    Returns:
        A tree of dimensionless numbers like `params`.

    Raises:
        ValueError: as in `width_scaled_decay`.
    """
    axes = axes_lib.inferred if axes is None else axes
    plan = width_plan(base_width, law, axes)
    return _like(params, plan.decays(axes_lib.signatures(axes, params), rates_applied))


def learning_rate_multipliers(
    params: optax.Params,
    base_width: BaseWidth,
    *,
    law: WidthLaw = laws.law(),
    axes: axes_lib.Axes = None,
) -> Any:
    """The multiplier of η of every parameter: m^-r for matrices, and 1 for the others.

    Args:
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        base_width, law, axes: as in `width_scaled_decay`.

    Returns:
        A tree of dimensionless numbers like `params`.

    Raises:
        ValueError: as in `width_scaled_decay`.
    """
    axes = axes_lib.inferred if axes is None else axes
    plan = width_plan(base_width, law, axes)
    return _like(params, plan.rates(axes_lib.signatures(axes, params)))


def _like(params: optax.Params, values: Mapping[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda key, _: values[path_string(key)], params)
