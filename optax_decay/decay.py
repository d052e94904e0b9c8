"""The product that every decay is: ``u ← u + λ(t) · m(parameter) · ψ(w)``.

With u the incoming update, w the weight before the step, and everything computed in float32 (float64 for float64) and
cast once to the dtype of u:

* λ(t), `weight_decay`: dimensionless rate, a number or an optax schedule of the step.
* m, `multiplier`: one dimensionless number per matrix (`quantity.Quantity`), a product of as many as are given.
* ψ, `pull`: what one weight feels, in units of the weight (`pulls.Pull`).
* `cautious`: only where the step and the decay agree, u·w >= 0 (arXiv 2510.12402).
* `mask`: which parameters, and how strongly (`masks`).

What λ = 0.1 multiplies is the *coupling*. With η_t the learning rate of step t, the weight shrinks per step by

============ ====================== ================================================ ==========================
coupling     shrink per step        place in the chain                               who means this
============ ====================== ================================================ ==========================
lr           η_t λ                  before ``scale_by_learning_rate``                torch AdamW, optax.adamw
schedule     (η_t/η_max) λ          before ``scale_by_learning_rate``                AdamW's paper, big_vision
corrected    (η_t²/η_max) λ         before ``scale_by_learning_rate``                AdamC (arXiv 2506.02285)
none         λ                      after ``scale_by_learning_rate``                 "independent" decay
============ ====================== ================================================ ==========================

`convert_weight_decay` turns one into another. `decay` is explicit: it adds the pull to the update. `proximal_decay`
is implicit: it stands last in the chain and replaces the new weight θ by the proximal map of η_t λ m times the penalty.
"""

import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay import axes as axes_lib
from optax_decay import masks
from optax_decay.metrics import Metrics, measure
from optax_decay.pulls import Pull, as_pull, check
from optax_decay.quantity import Context, Quantity, accumulator_dtype

ScalarOrSchedule = Any
COUPLINGS = ("lr", "schedule", "corrected", "none")


class LowPrecisionDecayWarning(UserWarning):
    """Decay of weights stored in 16 bits, where ``w(1-ηλ)`` mostly rounds back to w."""


class DecayState(NamedTuple):
    """State of `decay` and `proximal_decay`. Its structure does not depend on whether λ is a number or a schedule.

    Attributes:
        count: int32 scalar, completed updates.
        threshold: memory of the pull's threshold; empty unless it has any.
        multipliers: tuple, memory of each multiplier.
        metrics: `Metrics` by path if asked for, else empty.
    """

    count: jax.Array
    threshold: Any
    multipliers: tuple[Any, ...]
    metrics: Any


class _Leaf(NamedTuple):
    path: str
    update: Any
    param: Any


def _check_coupling(coupling: str, learning_rate: Any, peak_learning_rate: Any) -> None:
    if coupling not in COUPLINGS:
        near = difflib.get_close_matches(str(coupling), COUPLINGS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"coupling={coupling!r} is not known; allowed: {', '.join(COUPLINGS)} (did you mean {near!r}?)."
        )
    if coupling in ("schedule", "corrected") and peak_learning_rate is None:
        raise ValueError(
            f"coupling={coupling!r} divides by the peak of the learning rate: pass peak_learning_rate=..."
        )
    if coupling == "corrected" and learning_rate is None:
        raise ValueError(
            "coupling='corrected' needs learning_rate=..., the number or schedule of the chain."
        )
    if peak_learning_rate is not None:
        check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)


def _now(value: ScalarOrSchedule, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def _rate(weight_decay: Any, coupling: str, learning_rate: Any, peak: Any, count: jax.Array) -> Any:
    """λ(t) with its coupling, as the factor of ψ at the decay's place in the chain."""
    rate = _now(weight_decay, count)
    if coupling == "schedule":
        return rate / peak
    if coupling == "corrected":
        return rate * (_now(learning_rate, count) / peak)
    return rate


def _flatten(updates: Any, params: Any) -> tuple[list[_Leaf], Any]:
    """Leaves of updates with their paths and parameters; a None update is a leaf, a MaskedNode is not."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
    weights = treedef.flatten_up_to(params)
    return [_Leaf(axes_lib.path_string(k), u, w) for (k, u), w in zip(keyed, weights)], treedef


def _spread(value: Any, signature: axes_lib.Signature, dtype: Any) -> Any:
    if isinstance(value, int | float):
        return value
    value = jnp.asarray(value, accumulator_dtype(dtype))
    return signature.spread(value) if value.ndim else value


def _by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {axes_lib.path_string(key): leaf for key, leaf in leaves}


class _Terms(NamedTuple):
    """The parts that `decay` and `proximal_decay` share, resolved for one tree of parameters."""

    pull: Pull
    multipliers: tuple[Quantity, ...]
    mask: Any
    axes: Any
    metrics: bool

    def decayed(self, params: Any) -> tuple[dict[str, axes_lib.Signature], dict[str, float]]:
        signatures = axes_lib.signatures(self.axes, params)
        strength = masks.resolve(self.mask, params, signatures)
        return {path: s for path, s in signatures.items() if strength[path]}, strength

    def init(self, params: Any) -> DecayState:
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # optax.tree.map_params calls init with a leafless placeholder and needs a prefix of the real state.
            hole = jnp.zeros([], jnp.int32)
            return DecayState(count, hole, tuple(hole for _ in self.multipliers), hole)
        signatures, _ = self.decayed(params)
        chosen = {p: w for p, w in _by_path(params).items() if p in signatures}
        metrics = {}
        for path, w in chosen.items():
            # Five arrays, not one array five times: a donated buffer must not appear twice.
            zeros = (
                jnp.zeros(signatures[path].batch_shape, accumulator_dtype(w.dtype))
                for _ in range(5)
            )
            if self.metrics:
                metrics[path] = Metrics(*zeros)
        return DecayState(
            count,
            self.pull.threshold.init(chosen, signatures) if self.pull.threshold else (),
            tuple(m.init(chosen, signatures) for m in self.multipliers),
            metrics,
        )

    def update(
        self,
        updates: Any,
        state: DecayState,
        params: Any,
        extra: dict[str, Any],
        rate: Any,
        step: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, jax.Array]],
    ) -> tuple[Any, DecayState]:
        """Runs ``step(u, w, coefficient, δ) -> (new update, decay term)`` on every decayed leaf."""
        if params is None:
            raise ValueError(
                "weight decay needs the weights: call tx.update(updates, state, params)."
            )
        if not jax.tree.leaves(params):
            return updates, state._replace(count=optax.safe_increment(state.count))
        signatures, strength = self.decayed(params)
        leaves, treedef = _flatten(updates, params)
        chosen = {
            leaf.path: leaf
            for leaf in leaves
            if leaf.update is not None and leaf.path in signatures
        }
        context = Context(
            {path: leaf.update for path, leaf in chosen.items()},
            {p: w for p, w in _by_path(params).items() if p in signatures},
            signatures,
            state.count,
            extra,
        )
        deltas: dict[str, Any] = {}
        threshold = state.threshold
        if self.pull.threshold:
            deltas, threshold = self.pull.threshold.update(context, state.threshold)
        factors, memories = [], []
        for multiplier, memory in zip(self.multipliers, state.multipliers, strict=True):
            values, memory = multiplier.update(context, memory)
            factors.append(values)
            memories.append(memory)
        results, metrics = {}, dict(state.metrics)
        for path, leaf in chosen.items():
            signature = signatures[path]
            # Promote first: Python numbers are weakly typed and leave a plain AdamW's arithmetic untouched.
            dtype = jnp.promote_types(
                jnp.promote_types(leaf.update.dtype, leaf.param.dtype), jnp.float32
            )
            coefficient = _spread(rate, signature, dtype)
            if strength[path] != 1.0:
                coefficient = coefficient * strength[path]
            for values in factors:
                coefficient = coefficient * _spread(values[path], signature, dtype)
            delta = _spread(deltas[path], signature, dtype) if deltas else None
            w = leaf.param.astype(dtype)
            new, term = step(leaf.update.astype(dtype), w, coefficient, delta)
            results[path] = new.astype(leaf.update.dtype)
            if self.metrics:
                metrics[path] = measure(signature, coefficient, term, leaf.update, w, delta)
        flat = [results.get(leaf.path, leaf.update) for leaf in leaves]
        new_state = DecayState(
            optax.safe_increment(state.count), threshold, tuple(memories), metrics
        )
        return jax.tree.unflatten(treedef, flat), new_state


def _warn_if_lost(params: Any, terms: "_Terms", learning_rate: Any, weight_decay: Any) -> None:
    signatures, _ = terms.decayed(params)
    low = [
        path
        for path, w in _by_path(params).items()
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
        coupling: what λ is multiplied with per step: ``"lr"``, ``"schedule"``, ``"corrected"`` or ``"none"``. The first
            three stand before ``scale_by_learning_rate``, ``"none"`` stands after it.
        learning_rate: η, the chain's number or schedule; needed for ``"corrected"`` only.
        peak_learning_rate: η_max, needed for ``"schedule"`` and ``"corrected"``.
        metrics: keep `Metrics` of every decayed parameter in the state, at the cost of a few reductions per step.

    Returns:
        A transformation whose ``update`` needs params. Unknown extra arguments are passed to the quantities.

    Raises:
        ValueError: a number out of its range, an unknown name, a missing learning rate; at ``init``, a mask or axes that do
            not fit the parameters.

    >>> import jax.numpy as jnp, optax, optax_decay
    >>> params = {"w": jnp.array([[0.3, -2.0]])}
    >>> tx = optax_decay.decay(0.1, pull=optax_decay.huber(threshold=1.0))
    >>> tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)[0]["w"].round(3)
    Array([[ 0.03, -0.1 ]], dtype=float32)
    """
    check("weight_decay", weight_decay, 0.0)
    _check_coupling(coupling, learning_rate, peak_learning_rate)
    masks.check_mask(mask)
    chosen = as_pull(pull)
    terms = _Terms(chosen, _as_tuple(multiplier), mask, axes, metrics)
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
        rate = _rate(weight_decay, coupling, learning_rate, peak_learning_rate, state.count)
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

    With R the penalty of the pull, ``prox(θ, τ) = argmin_x (x-θ)²/2 + τ R(x)``: an implicit step, stable for any τ. The
    result is returned as the update ``prox(θ, τ) - w``; adding it to w rounds once more, so that weights may differ
    from the proximal map in the last bit (exact zeros stay exact).

    Args:
        learning_rate: η, the same number or schedule as the chain's ``scale_by_learning_rate``.
        pull: must have a proximal map: l2, l1, huber, fair.
        weight_decay, multiplier, mask, axes, coupling, peak_learning_rate, metrics: as in `decay`.

    Raises:
        ValueError: as in `decay`, and for a pull without a proximal map.
    """
    check("learning_rate", learning_rate, 0.0)
    check("weight_decay", weight_decay, 0.0)
    _check_coupling(coupling, learning_rate, peak_learning_rate)
    masks.check_mask(mask)
    chosen = as_pull(pull)
    prox = chosen.prox
    if prox is None:
        raise ValueError(
            f"pull={chosen.name!r} has no closed-form proximal map; use decay(pull=...) or a huber pull."
        )
    terms = _Terms(chosen, _as_tuple(multiplier), mask, axes, metrics)

    def init(params: Any) -> DecayState:
        _warn_if_lost(params, terms, learning_rate, weight_decay)
        return terms.init(params)

    def step(u: jax.Array, w: jax.Array, tau: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
        theta = w + u
        new = prox(theta, tau, delta, w)
        return new - w, theta - new

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        rate = _rate(weight_decay, coupling, learning_rate, peak_learning_rate, state.count)
        if coupling != "none":
            rate = rate * _now(learning_rate, state.count)
        return terms.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_tuple(multiplier: Quantity | Sequence[Quantity] | None) -> tuple[Quantity, ...]:
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


def convert_weight_decay(
    weight_decay: float, source: str, target: str, *, peak_learning_rate: float
) -> float:
    """λ under another coupling, with the same shrink per step at the peak of the learning rate.

    Args:
        weight_decay: λ under `source`.
        source, target: ``"lr"``, ``"schedule"``, ``"corrected"`` or ``"none"``.
        peak_learning_rate: η_max.

    >>> convert_weight_decay(0.1, "lr", "schedule", peak_learning_rate=3e-4)
    3e-05
    """
    check("weight_decay", weight_decay, 0.0)
    check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)
    scale = {
        "lr": peak_learning_rate,
        "corrected": peak_learning_rate,
        "schedule": 1.0,
        "none": 1.0,
    }
    for name in (source, target):
        if name not in scale:
            _check_coupling(name, None, None)
    return float(f"{weight_decay * scale[source] / scale[target]:.15g}")
