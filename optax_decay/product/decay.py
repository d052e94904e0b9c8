"""The product that every decay is: ``u ← u + λ(t) · m(parameter) · ψ(w)``.

With u the incoming update, w the weight before the step, and everything computed in float32 (float64 for float64) and
cast once to the dtype of u:

* λ(t), `weight_decay`: dimensionless rate, a number or an optax schedule of the step.
* m, `multiplier`: one dimensionless number per matrix (`PerMatrix`), a product of as many as are given.
* ψ, `pull`: what one weight feels, in units of the weight (`pulls`).
* `cautious`: only where the step and the decay agree, u·w >= 0 (arXiv 2510.12402).
* `mask`: which parameters, and how strongly (`masks`).
* `coupling`: what λ is multiplied with (`couplings`).

`decay` is explicit: it adds the pull to the update. `proximal_decay` is implicit: it stands last in the chain and
replaces the new weight θ by the proximal map of η_t λ m times the penalty.
"""

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.parameters.placeholders import has_no_leaves
from optax_decay.product import couplings, links, masks, pulls
from optax_decay.product.couplings import Coupling, check_coupling, now
from optax_decay.product.gates import Gate, as_gate
from optax_decay.product.per_matrix import PerMatrix, Value
from optax_decay.product.product import DecayState, Product
from optax_decay.product.pulls import Pull, check_pull

Multiplier = PerMatrix | Sequence[PerMatrix] | None


class ProductOptions(TypedDict, total=False):
    """Keyword arguments that ready-made optimizers pass on to their decay; `decay` describes them."""

    multiplier: Multiplier
    coupling: Coupling
    metrics: bool


class ProximalOptions(ProductOptions, total=False):
    """Keyword arguments that every proximal decay passes on to `proximal_decay`, which describes them."""

    mask: masks.Mask
    axes: axes_lib.Axes


class FixedPullOptions(ProximalOptions, total=False):
    """Keyword arguments of an explicit decay whose pull is its own; `decay` describes them."""

    cautious: bool | Gate


class DecayOptions(FixedPullOptions, total=False):
    """Keyword arguments of an explicit decay that works with any pull; `decay` describes them."""

    pull: Pull


class LowPrecisionDecayWarning(UserWarning):
    """Decay of weights stored in 16 bits, where ``w(1-ηλ)`` mostly rounds back to w."""


def _warn_if_lost(params: optax.Params, product: Product, shrink: Any) -> None:
    """Warns of decayed weights in 16 bits, unless the shrink per step is known and large enough to act."""
    paths, signatures, _ = product.resolved(params)
    low = [
        path
        for path, w in zip(paths, jax.tree.leaves(params))
        if path in signatures and jnp.finfo(w.dtype).bits == 16
    ]
    if low and not (isinstance(shrink, int | float) and shrink >= 2.0**-9):
        warnings.warn(
            f"{low[0]!r} and {len(low) - 1} more decayed parameters are stored in 16 bits, where one step of decay "
            "below 2^-9 rounds to nothing: keep float32 weights, or apply updates with "
            "optax_decay.apply_updates (stochastic rounding or Kahan summation).",
            LowPrecisionDecayWarning,
            stacklevel=3,
        )


def decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    pull: Pull = pulls.l2(),
    multiplier: Multiplier = None,
    cautious: bool | Gate = False,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: Coupling = couplings.learning_rate(),
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ(t) · m · ψ(w)`` to the update, optionally only where that agrees with the step.

    Stands between the direction (such as ``optax.scale_by_adam``) and ``optax.scale_by_learning_rate``, or after the
    latter with ``coupling=couplings.independent()``.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or an optax schedule of the step (first called with 0).
        pull: ψ, one of `pulls`. Default: w itself.
        multiplier: m; one or several of `multipliers`, whose product is taken.
        cautious: decay only weights with u·w >= 0, where u is the incoming update before the learning rate; or another
            of `gates`.
        mask: which parameters decay (`masks.strengths`). None: every leaf this link is given.
        axes: what the parameters' axes mean (`axes.signatures`); roles and slices of stacked leaves come from it.
        coupling: what λ is multiplied with per step, one of `couplings`. Default: the learning rate, as in AdamW.
        metrics: keep `Metrics` of every decayed parameter in the state, at the cost of a few reductions per step.

    Returns:
        A transformation whose ``update`` needs params. Unknown extra arguments are passed to the multipliers.

    Raises:
        ValueError: a number out of its range, or something that is not a pull, multiplier or coupling; at ``init``, a
            mask or axes that do not fit the parameters.

    >>> import jax.numpy as jnp, optax, optax_decay
    >>> params = {"w": jnp.array([[0.3, -2.0]])}
    >>> tx = optax_decay.decay(0.1, pull=optax_decay.pulls.huber(threshold=1.0))
    >>> tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)[0]["w"].round(3)
    Array([[ 0.03, -0.1 ]], dtype=float32)
    """
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling)
    check_pull(pull)
    masks.check_mask(mask)
    gate = as_gate(cautious, coupling.after_rate)
    apply = pull.apply
    if apply is None:
        raise ValueError(f"the pull {pull.name!r} has a proximal step only: use proximal_decay.")
    product = Product(pull, as_multipliers(multiplier), mask, axes, metrics)
    sign = -1 if coupling.after_rate else 1  # after the learning rate updates point downhill

    def init(params: optax.Params) -> DecayState:
        _warn_if_lost(params, product, weight_decay if coupling.after_rate else None)
        _tell("decay", product, params, weight_decay, directed=gate is not None)
        return product.init(params)

    def step(
        u: jax.Array, w: jax.Array, coefficient: Value, delta: Value | None
    ) -> tuple[jax.Array, jax.Array]:
        if isinstance(coefficient, int | float) and coefficient == 0:
            return u, jnp.zeros_like(w)
        if gate is not None and gate.stepped:
            w = w + u
        term = coefficient * apply(w, delta)
        if gate is not None:
            term = jnp.where(gate.keeps(sign * u, w), term, jnp.zeros_like(term))
        return (u + term if sign > 0 else u - term), term

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> Any:
        rate = coupling.rate(weight_decay, state.count)
        return product.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(init, update)


def proximal_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    learning_rate: optax.ScalarOrSchedule,
    pull: Pull = pulls.l2(),
    multiplier: Multiplier = None,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: Coupling = couplings.learning_rate(),
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the stepped weight θ = w + u by ``prox(θ, τ)`` with τ = η_t c λ(t) m; stands last in the chain.

    With R the penalty of the pull, ``prox(θ, τ) = argmin_x (x-θ)²/2 + τ R(x)``: an implicit step, stable for any τ.
    c is what the coupling multiplies λ with before the learning rate.
    The result is returned as the update ``prox(θ, τ) - w``; adding it to w rounds once more, so that weights may
    differ from the proximal map in the last bit (exact zeros stay exact).

    Args:
        learning_rate: η, the same number or schedule as the chain's ``scale_by_learning_rate``; 1.0 for a decay that
            does not depend on it.
        pull: must have a proximal map: l2, l1, huber, fair, padam, elastic_net.
        weight_decay, multiplier, mask, axes, metrics: as in `decay`.
        coupling: as in `decay`, except ``couplings.independent()``, which is ``learning_rate=1.0``.

    Raises:
        ValueError: as in `decay`; a pull without a proximal map; ``couplings.independent()``.
    """
    check("learning_rate", learning_rate, 0.0)
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling)
    if coupling.after_rate:
        raise ValueError(
            "coupling=couplings.independent() would ignore the learning rate; for a proximal decay that does not "
            "depend on it, pass learning_rate=1.0."
        )
    check_pull(pull)
    masks.check_mask(mask)
    prox = pull.prox
    if prox is None:
        raise ValueError(
            f"the pull {pull.name!r} has no closed-form proximal map; use decay(pull=...), or the pull huber."
        )
    product = Product(pull, as_multipliers(multiplier), mask, axes, metrics)

    def init(params: optax.Params) -> DecayState:
        numbers = [x for x in (learning_rate, weight_decay) if isinstance(x, int | float)]
        _warn_if_lost(params, product, numbers[0] * numbers[1] if len(numbers) == 2 else None)
        _tell("proximal_decay", product, params, weight_decay)
        return product.init(params)

    def step(
        u: jax.Array, w: jax.Array, tau: Value, delta: Value | None
    ) -> tuple[jax.Array, jax.Array]:
        theta = w + u
        new = prox(theta, tau, delta, w)
        return new - w, theta - new

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> Any:
        rate = coupling.rate(weight_decay, state.count) * now(learning_rate, state.count)
        return product.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(init, update)


def _tell(
    name: str, product: Product, params: optax.Params, weight_decay: Any, directed: bool = False
) -> None:
    """Says which parameters decay by how much, unless nothing does."""
    if has_no_leaves(params) or (isinstance(weight_decay, int | float) and weight_decay == 0):
        return
    links.tell(
        links.Link(
            name,
            "pull",
            tuple(product.resolved(params).signatures),
            weight_decay=weight_decay,
            proportional=not directed and product.pull.proportional,
            uneven=bool(product.multipliers),
        )
    )


def as_multipliers(multiplier: Multiplier) -> tuple[PerMatrix, ...]:
    """The factors behind a `multiplier` argument: none, one, or several.

    Raises:
        ValueError: something that is not a `PerMatrix`.
    """
    if multiplier is None:
        return ()
    several = isinstance(multiplier, Sequence) and not isinstance(multiplier, PerMatrix | str)
    chosen = tuple(multiplier) if several else (multiplier,)
    for item in chosen:
        if isinstance(item, int | float):
            raise ValueError(
                f"multiplier={item!r} is a number; multiply weight_decay by it, or write"
                f" multiplier=optax_decay.multipliers.constant({float(item)}) to have a factor in a product."
            )
        if not isinstance(item, PerMatrix):
            raise ValueError(
                f"multiplier={item!r} is not one of optax_decay.multipliers, such as spectral_alpha() or constant(2.0)."
            )
    return chosen


Options = TypeVar("Options", FixedPullOptions, DecayOptions)


def times(own: PerMatrix, options: Options) -> Options:
    """The options of `decay` with a decay's own multiplier in front of those that the user gave."""
    given = options["multiplier"] if "multiplier" in options else None  # noqa: SIM401
    passed = options.copy()
    passed["multiplier"] = (own, *as_multipliers(given))
    return passed


def as_decay(
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation,
    mask: masks.Mask,
    axes: axes_lib.Axes,
    *,
    only_use_of_axes: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The decay link of a ready-made optimizer: a number or schedule becomes `decay`, a transformation is kept.

    Args:
        weight_decay: λ with AdamW's coupling, or any transformation that belongs before ``scale_by_learning_rate``.
        mask: what decays; `masks.MATRICES` is the default of ready-made optimizers.
        axes: as in `decay`.
        only_use_of_axes: True if nothing but the decay of the optimizer needs `axes`.

    Raises:
        ValueError: a mask, or axes for the decay alone, beside a transformation, which has its own.
    """
    if isinstance(weight_decay, optax.GradientTransformation):
        if mask is not masks.MATRICES:
            raise ValueError(
                f"mask={mask!r} would be ignored: weight_decay is a transformation with a mask of its own; give it to "
                "the transformation."
            )
        if only_use_of_axes and axes is not None:
            raise ValueError(
                "axes would be ignored: weight_decay is a transformation with axes of its own; give them to the "
                "transformation."
            )
        return optax.with_extra_args_support(weight_decay)
    return decay(weight_decay, mask=mask, axes=axes)


def in_order(
    options: ProductOptions,
    direction: optax.GradientTransformation,
    link: optax.GradientTransformation,
    *rates: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The chain of direction, decay link and learning rate, in the order that the coupling among the options needs."""
    coupling = options.get("coupling", couplings.learning_rate())
    return optax.chain(direction, *((*rates, link) if coupling.after_rate else (link, *rates)))
