"""What a weight feels: the pull ψ of a decay, and its proximal map.

With w a weight and δ the threshold of its matrix (units of the weights), each pull is the gradient of a penalty R:

============= ============================= =================================== =========================
name          ψ(w)                          R(w)                                proximal map of τR
============= ============================= =================================== =========================
l2            w                             w²/2                                θ/(1+τ)
l1            sign(w)                       \\|w\\|                               soft threshold at τ
huber         clip(w, -δ, δ)                Huber's function                    see `huber`
pseudo_huber  w/sqrt(1+(w/δ)²)              δ²(sqrt(1+(w/δ)²)-1)                not offered (a quartic)
log_cosh      δ·tanh(w/δ)                   δ²·log cosh(w/δ)                    not offered (no closed form)
fair          w/(1+\\|w\\|/δ)                 δ²(\\|w\\|/δ - log(1+\\|w\\|/δ))        see `fair`
============= ============================= =================================== =========================

The last four are bounded by δ, have slope 1 at 0 and become l2 as δ → ∞. Complex weights are pulled along their
phase: ``ψ(w) = ψ(|w|)·w/|w|``. Reference for Huber's function as a decay: AdamHD (arXiv 2511.14721).
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import check
from optax_decay.product.per_matrix import Quantity, constant, magnitude

# A number (units of the weights), an optax schedule of it, "mean", "rms", "ema", or any Quantity.
Threshold = Any
THRESHOLDS = ("mean", "rms", "ema")


class Pull(NamedTuple):
    """A pull ψ and, where it has a closed form, the proximal map of its penalty.

    Attributes:
        name: the name in the table above.
        apply: ``(w, δ) -> ψ(w)``, elementwise, in the dtype of w.
        prox: ``(θ, τ, δ, w) -> argmin_x (x-θ)²/2 + τR(x)``; w is the weight before the step, for penalties that are
            linearised there. None if there is no closed form.
        threshold: the quantity δ, or None if the pull has none.
    """

    name: str
    apply: Callable[[jax.Array, Any], jax.Array]
    prox: Callable[[jax.Array, Any, Any, jax.Array], jax.Array] | None = None
    threshold: Quantity | None = None


def _sign(w: jax.Array) -> jax.Array:
    return jnp.sign(w)  # for complex numbers w/|w|, and 0 at 0


def _shrink(w: jax.Array, amount: Any) -> jax.Array:
    """w moved towards 0 by `amount`, stopping at 0."""
    return _sign(w) * jnp.maximum(jnp.abs(w) - amount, 0)


def _soft(x: Any, dtype: Any) -> Any:
    # Python numbers stay weakly typed, so that a constant does not change the arithmetic of the step.
    return x if isinstance(x, int | float) else jnp.asarray(x, jnp.finfo(dtype).dtype)


def threshold_quantity(
    threshold: Threshold, factor: Any = 1.5, decay: float = 0.99, axis_name: Any = None
) -> Quantity:
    """The quantity behind a `threshold` argument.

    Args:
        threshold: a positive number or an optax schedule, in units of the weights; ``"mean"``, ``"rms"`` or ``"ema"``
            for `factor` times the size of each matrix's weights (`quantity.magnitude`); or a `Quantity`.
        factor: dimensionless, positive; used with the named thresholds only.
        decay: of ``"ema"``, in [0, 1).
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.

    Raises:
        ValueError: a threshold or factor that is not positive, an unknown name, a decay outside [0, 1).
    """
    if isinstance(threshold, Quantity):
        return threshold
    if isinstance(threshold, str):
        if threshold not in THRESHOLDS:
            near = difflib.get_close_matches(threshold, THRESHOLDS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"threshold={threshold!r} is not known; allowed: a positive number, a schedule, "
                f"{', '.join(map(repr, THRESHOLDS))} (did you mean {near!r}?)."
            )
        check("factor", factor, 0.0, open_low=True)
        if threshold == "ema":
            check("decay", decay, 0.0, 1.0, open_high=True)
        return magnitude(threshold, factor, decay=decay, axis_name=axis_name)
    check("threshold", threshold, 0.0, open_low=True)
    return constant(threshold)


def l2() -> Pull:
    """ψ(w) = w: the decay of AdamW."""
    return Pull("l2", lambda w, delta: w, lambda theta, tau, delta, w: theta / (1 + tau))


def l1() -> Pull:
    """ψ(w) = sign(w), and 0 at 0. Its proximal map gives exact zeros; the explicit form oscillates around 0."""
    return Pull("l1", lambda w, delta: _sign(w), lambda theta, tau, delta, w: _shrink(theta, tau))


def _with_threshold(
    name: str,
    apply: Any,
    prox: Any,
    threshold: Threshold,
    factor: Any,
    decay: float,
    axis_name: Any,
) -> Pull:
    quantity = threshold_quantity(threshold, factor, decay, axis_name)
    return Pull(
        name,
        lambda w, delta: apply(w, _soft(delta, w.dtype)),
        prox and (lambda theta, tau, delta, w: prox(theta, tau, _soft(delta, theta.dtype))),
        quantity,
    )


def huber(
    threshold: Threshold = "mean", factor: Any = 1.5, decay: float = 0.99, axis_name: Any = None
) -> Pull:
    """ψ(w) = clip(w, -δ, δ): l2 inside the threshold, a constant pull outside.

    Proximal map: ``θ/(1+τ)`` where ``|θ| <= (1+τ)δ``, else ``θ - τδ·sign θ``. Arguments as in `threshold_quantity`.
    """

    def apply(w: jax.Array, delta: Any) -> jax.Array:
        if jnp.iscomplexobj(w):
            size = jnp.abs(w)
            return w * jnp.where(size > delta, delta / jnp.where(size > 0, size, 1), 1)
        return jnp.clip(w, -delta, delta)

    def prox(theta: jax.Array, tau: Any, delta: Any) -> jax.Array:
        inside = jnp.abs(theta) <= (1 + tau) * delta
        return jnp.where(inside, theta / (1 + tau), theta - tau * delta * _sign(theta))

    return _with_threshold("huber", apply, prox, threshold, factor, decay, axis_name)


def pseudo_huber(
    threshold: Threshold = "mean", factor: Any = 1.5, decay: float = 0.99, axis_name: Any = None
) -> Pull:
    """ψ(w) = w/sqrt(1+(w/δ)²): a smooth Huber. Arguments as in `threshold_quantity`."""

    def apply(w: jax.Array, delta: Any) -> jax.Array:
        return w / jnp.sqrt(1 + jnp.square(jnp.abs(w) / delta))

    return _with_threshold("pseudo_huber", apply, None, threshold, factor, decay, axis_name)


def log_cosh(
    threshold: Threshold = "mean", factor: Any = 1.5, decay: float = 0.99, axis_name: Any = None
) -> Pull:
    """ψ(w) = δ·tanh(w/δ). Arguments as in `threshold_quantity`."""

    def apply(w: jax.Array, delta: Any) -> jax.Array:
        return delta * jnp.tanh(jnp.abs(w) / delta) * _sign(w)

    return _with_threshold("log_cosh", apply, None, threshold, factor, decay, axis_name)


def fair(
    threshold: Threshold = "mean", factor: Any = 1.5, decay: float = 0.99, axis_name: Any = None
) -> Pull:
    """``ψ(w) = w/(1+|w|/δ)``. Arguments as in `threshold_quantity`.

    Proximal map: the positive root x of ``x² + x(δ(1+τ) - |θ|) - δ|θ| = 0``, with the sign of θ.
    """

    def apply(w: jax.Array, delta: Any) -> jax.Array:
        return w / (1 + jnp.abs(w) / delta)

    def prox(theta: jax.Array, tau: Any, delta: Any) -> jax.Array:
        size = jnp.abs(theta)
        b = delta * (1 + tau) - size
        root = jnp.sqrt(b * b + 4 * delta * size)
        # Of the two equal forms of the root, the one without cancellation.
        x = jnp.where(b > 0, 2 * delta * size / (b + root), (root - b) / 2)
        return x * _sign(theta)

    return _with_threshold("fair", apply, prox, threshold, factor, decay, axis_name)


PULLS: dict[str, Callable[[], Pull]] = {
    "l2": l2,
    "l1": l1,
    "huber": huber,
    "pseudo_huber": pseudo_huber,
    "log_cosh": log_cosh,
    "fair": fair,
}


def as_pull(pull: str | Pull) -> Pull:
    """A `Pull`, given one or the name of one (with its default threshold).

    Raises:
        ValueError: an unknown name, or something else.
    """
    if isinstance(pull, Pull):
        return pull
    if isinstance(pull, str) and pull in PULLS:
        return PULLS[pull]()
    near = difflib.get_close_matches(str(pull), PULLS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"pull={pull!r} is not known; allowed: a Pull or one of {', '.join(PULLS)} (did you mean {near!r}?)."
    )
