"""The product that every decay is: ``u ← u + λ(t) · m(parameter) · ψ(w)``.

With u the incoming update, w the weight before the step, and everything computed in float32 (float64 for float64) and
cast once to the dtype of u:

* λ(t), `weight_decay`: dimensionless rate, a number or an optax schedule of the step.
* m, `multiplier`: one dimensionless number per matrix (`quantity.Quantity`), a product of as many as are given.
* ψ, `pull`: what one weight feels, in units of the weight (`pulls.Pull`).
* `cautious`: only where the step and the decay agree, u·w >= 0 (arXiv 2510.12402).
* `mask`: which parameters, and how strongly (`masks`).

What λ = 0.1 multiplies is the coupling: see `couplings`.

`decay` is explicit: it adds the pull to the update. `proximal_decay` is implicit: it stands last in the chain and
replaces the new weight θ by the proximal map of η_t λ m times the penalty.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import masks
from optax_decay.product.couplings import ScalarOrSchedule, check_coupling, coupled_rate, now
from optax_decay.product.per_matrix import Quantity
from optax_decay.product.product import DecayState, Terms, by_path
from optax_decay.product.pulls import Pull, as_pull


class LowPrecisionDecayWarning(UserWarning):
    """Decay of weights stored in 16 bits, where ``w(1-ηλ)`` mostly rounds back to w."""


def _warn_if_lost(params: Any, terms: Terms, learning_rate: Any, weight_decay: Any) -> None:
    signatures, _ = terms.decayed(params)
    low = [
        path
        for path, w in by_path(params).items()
        if path in signatures and jnp.finfo(w.dtype).bits == 16
    ]
    numbers = [x for x in (learning_rate, weight_decay) if isinstance(x, int | float)]
    if low and not (len(numbers) == 2 and numbers[0] * numbers[1] >= 2.0**-9):
        warnings.warn(
            f"{low[0]!r} and {len(low) - 1} more decayed parameters are stored in 16 bits, where one step of decay "
            "below 2^-9 rounds to nothing: keep float32 weights, or apply updates with "
            "optax_decay.apply_updates (stochastic rounding or Kahan summation).",
            LowPrecisionDecayWarning,
            stacklevel=3,
        )


def decay(
    weight_decay: ScalarOrSchedule = 0.1,
    *,
    pull: str | Pull = "l2",
    multiplier: Quantity | Sequence[Quantity] | None = None,
    cautious: bool = False,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: str = "lr",
    learning_rate: ScalarOrSchedule | None = None,
    peak_learning_rate: float | None = None,
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ(t) · m · ψ(w)`` to the update, optionally only where that agrees with the step.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or an optax schedule of the step (first called with 0).
        pull: ψ; a `pulls.Pull` or the name of one. Default: w itself.
        multiplier: m; quantities to multiply, such as `spectral_alpha` or `width_power`.
        cautious: decay only weights with u·w >= 0, where u is the incoming update before the learning rate.
        mask: which parameters decay (`masks.resolve`). None: every leaf this link is given.
        axes: what the parameters' axes mean (`axes.signatures`); roles and slices of stacked leaves come from it.
        coupling: what λ is multiplied with per step: ``"lr"``, ``"schedule"``, ``"corrected"`` or ``"none"``. The
            first three stand before ``scale_by_learning_rate``, ``"none"`` stands after it.
        learning_rate: η, the chain's number or schedule; needed for ``"corrected"`` only.
        peak_learning_rate: η_max, needed for ``"schedule"`` and ``"corrected"``.
        metrics: keep `Metrics` of every decayed parameter in the state, at the cost of a few reductions per step.

    Returns:
        A transformation whose ``update`` needs params. Unknown extra arguments are passed to the quantities.

    Raises:
        ValueError: a number out of its range, an unknown name, a missing learning rate; at ``init``, a mask or axes
            that do not fit the parameters.

    >>> import jax.numpy as jnp, optax, optax_decay
    >>> params = {"w": jnp.array([[0.3, -2.0]])}
    >>> tx = optax_decay.decay(0.1, pull=optax_decay.huber(threshold=1.0))
    >>> tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)[0]["w"].round(3)
    Array([[ 0.03, -0.1 ]], dtype=float32)
    """
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling, learning_rate, peak_learning_rate)
    masks.check_mask(mask)
    chosen = as_pull(pull)
    terms = Terms(chosen, as_quantities(multiplier), mask, axes, metrics)
    # After scale_by_learning_rate updates already point downhill.
    sign = -1 if coupling == "none" else 1

    def init(params: Any) -> DecayState:
        _warn_if_lost(params, terms, learning_rate, weight_decay)
        return terms.init(params)

    def step(u: jax.Array, w: jax.Array, coefficient: Any, delta: Any) -> Any:
        if isinstance(coefficient, int | float) and coefficient == 0:
            return u, jnp.zeros_like(w)
        term = coefficient * chosen.apply(w, delta)
        if cautious:
            agree = sign * jnp.real(u * jnp.conj(w)) >= 0
            term = jnp.where(agree, term, jnp.zeros_like(term))
        return (u + term if sign > 0 else u - term), term

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        rate = coupled_rate(weight_decay, coupling, learning_rate, peak_learning_rate, state.count)
        return terms.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(init, update)


def proximal_decay(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.1,
    *,
    pull: str | Pull = "l2",
    multiplier: Quantity | Sequence[Quantity] | None = None,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: str = "lr",
    peak_learning_rate: float | None = None,
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the stepped weight θ = w + u by ``prox(θ, τ)`` with τ = η_t λ(t) m; stands last in the chain.

    With R the penalty of the pull, ``prox(θ, τ) = argmin_x (x-θ)²/2 + τ R(x)``: an implicit step, stable for any τ.
    The result is returned as the update ``prox(θ, τ) - w``; adding it to w rounds once more, so that weights may
    differ from the proximal map in the last bit (exact zeros stay exact).

    Args:
        learning_rate: η, the same number or schedule as the chain's ``scale_by_learning_rate``.
        pull: must have a proximal map: l2, l1, huber, fair.
        weight_decay, multiplier, mask, axes, coupling, peak_learning_rate, metrics: as in `decay`.

    Raises:
        ValueError: as in `decay`, and for a pull without a proximal map.
    """
    check("learning_rate", learning_rate, 0.0)
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling, learning_rate, peak_learning_rate)
    masks.check_mask(mask)
    chosen = as_pull(pull)
    prox = chosen.prox
    if prox is None:
        raise ValueError(
            f"pull={chosen.name!r} has no closed-form proximal map; use decay(pull=...) or a huber pull."
        )
    terms = Terms(chosen, as_quantities(multiplier), mask, axes, metrics)

    def init(params: Any) -> DecayState:
        _warn_if_lost(params, terms, learning_rate, weight_decay)
        return terms.init(params)

    def step(u: jax.Array, w: jax.Array, tau: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
        theta = w + u
        new = prox(theta, tau, delta, w)
        return new - w, theta - new

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        rate = coupled_rate(weight_decay, coupling, learning_rate, peak_learning_rate, state.count)
        if coupling != "none":
            rate = rate * now(learning_rate, state.count)
        return terms.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(init, update)


def as_quantities(multiplier: Quantity | Sequence[Quantity] | None) -> tuple[Quantity, ...]:
    """The factors behind a `multiplier` argument: none, one, or several."""
    if multiplier is None:
        return ()
    chosen = (multiplier,) if isinstance(multiplier, Quantity) else tuple(multiplier)
    for item in chosen:
        if not isinstance(item, Quantity):
            raise ValueError(
                f"multiplier={item!r} is not a Quantity, such as spectral_alpha() or constant(2.0)."
            )
    return chosen


def as_decay(
    weight_decay: Any,
    *,
    mask: masks.Mask = masks.MATRICES,
    weight_decay_mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The decay link of a ready-made optimizer: a number or schedule becomes `decay`, a transformation is kept.

    Args:
        weight_decay: λ with AdamW's coupling, or any transformation that belongs before ``scale_by_learning_rate``.
        mask, weight_decay_mask: two names for one argument (default: roles hidden and head); give one.
        axes, options: passed to `decay`.

    Raises:
        ValueError: both names of the mask are given, or a mask beside a transformation (which has its own).
    """
    mask = one_mask(mask, weight_decay_mask)
    if isinstance(weight_decay, optax.GradientTransformation):
        if mask is not masks.MATRICES:
            raise ValueError(
                "weight_decay is a transformation with a mask of its own; leave out mask=..."
            )
        return optax.with_extra_args_support(weight_decay)
    return decay(weight_decay, mask=mask, axes=axes, **options)


def one_mask(mask: masks.Mask, weight_decay_mask: masks.Mask) -> masks.Mask:
    """The mask of a ready-made optimizer, which takes optax's two names for it but not both at once."""
    if weight_decay_mask is None:
        return mask
    if mask is not masks.MATRICES:
        raise ValueError(
            "mask and weight_decay_mask are two names for one argument; give one of them."
        )
    return weight_decay_mask
