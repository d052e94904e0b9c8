"""Pulls ψ of a decay on a single weight, and their proximal maps.

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
lp            p\\|w\\|^(p-1) sign(w)             \\|w\\|^p                             not offered, see `padam`
padam         not offered                   \\|w\\|^p, by a quadratic              see `padam`
elastic_net   ρ sign(w) + (1-ρ) w           ρ\\|w\\| + (1-ρ)w²/2                   soft threshold, then shrink
============= ============================= =================================== =========================

huber, pseudo_huber, log_cosh and fair are bounded by δ, have slope 1 at 0 and become l2 as δ → ∞. Complex weights are
pulled along their phase: ``ψ(w) = ψ(|w|)·w/|w|``. Reference for Huber's function as a decay: AdamHD (arXiv 2511.14721).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import check, nearest, one_of
from optax_decay.product.per_matrix import PerMatrix, Value
from optax_decay.product.thresholds import Threshold, as_threshold, mean_size


class Pull(NamedTuple):
    """A pull ψ and, where it has a closed form, the proximal map of its penalty.

    Attributes:
        name: the name in the table above.
        apply: ``(w, δ) -> ψ(w)``, elementwise, in the dtype of w. None if only the proximal step exists.
        prox: ``(θ, τ, δ, w) -> argmin_x (x-θ)²/2 + τR(x)``; w is the weight before the step, for penalties that are
            linearised there. None if there is no closed form.
        threshold: δ, or None if the pull has none.
        proportional: whether ψ(w) is a multiple of w, so that a rule that fixes norms undoes the decay (`links`).
    """

    name: str
    apply: Callable[[jax.Array, Any], jax.Array] | None
    prox: Callable[[jax.Array, Any, Any, jax.Array], jax.Array] | None = None
    threshold: PerMatrix | None = None
    proportional: bool = False


def _sign(w: jax.Array) -> jax.Array:
    return jnp.sign(w)  # for complex numbers w/|w|, and 0 at 0


def _shrink(w: jax.Array, amount: Value) -> jax.Array:
    """w moved towards 0 by `amount`, stopping at 0."""
    return _sign(w) * jnp.maximum(jnp.abs(w) - amount, 0)


def _soft(x: Value, dtype: jax.typing.DTypeLike) -> Any:
    # Python numbers stay weakly typed, so that a constant does not change the arithmetic of the step.
    return x if isinstance(x, int | float) else jnp.asarray(x, jnp.finfo(dtype).dtype)


def l2() -> Pull:
    """ψ(w) = w: the decay of AdamW."""
    prox = lambda theta, tau, delta, w: theta / (1 + tau)
    return Pull("l2", lambda w, delta: w, prox, proportional=True)


def l1() -> Pull:
    """ψ(w) = sign(w), and 0 at 0. Its proximal map gives exact zeros; the explicit form oscillates around 0."""
    return Pull("l1", lambda w, delta: _sign(w), lambda theta, tau, delta, w: _shrink(theta, tau))


def _ratio(size: jax.Array, delta: Value) -> jax.Array:
    """``|w|/δ``; 0 where the threshold is 0, as that of a matrix of zeros is."""
    if isinstance(delta, int | float):
        return size / delta
    zero = delta == 0
    return jnp.where(zero, 0, size) / jnp.where(zero, 1, delta)


def _bounded(value: jax.Array, delta: Value) -> jax.Array:
    """A pull that is bounded by δ: 0 where δ is 0. A NaN stays visible."""
    return value if isinstance(delta, int | float) else jnp.where(delta == 0, 0 * value, value)


def _with_threshold(
    name: str,
    apply: Any,
    prox: Any,
    threshold: Threshold,
) -> Pull:
    return Pull(
        name,
        lambda w, delta: apply(w, _soft(delta, w.dtype)),
        prox and (lambda theta, tau, delta, w: prox(theta, tau, _soft(delta, theta.dtype))),
        as_threshold(threshold),
    )


def huber(threshold: Threshold = mean_size(1.5)) -> Pull:
    """ψ(w) = clip(w, -δ, δ): l2 inside the threshold, a constant pull outside.

    δ is `threshold`, in units of the weights (`thresholds`). Proximal map: ``θ/(1+τ)`` where ``|θ| <= (1+τ)δ``, else
    ``θ - τδ·sign θ``.
    """

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        if jnp.iscomplexobj(w):
            size = jnp.abs(w)
            return w * jnp.where(size > delta, delta / jnp.where(size > 0, size, 1), 1)
        return jnp.clip(w, -delta, delta)

    def prox(theta: jax.Array, tau: Value, delta: Value) -> jax.Array:
        inside = jnp.abs(theta) <= (1 + tau) * delta
        return jnp.where(inside, theta / (1 + tau), theta - tau * delta * _sign(theta))

    return _with_threshold("huber", apply, prox, threshold)


def pseudo_huber(threshold: Threshold = mean_size(1.5)) -> Pull:
    """ψ(w) = w/sqrt(1+(w/δ)²): a smooth Huber. δ is `threshold`, in units of the weights (`thresholds`)."""

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        return _bounded(w / jnp.sqrt(1 + jnp.square(_ratio(jnp.abs(w), delta))), delta)

    return _with_threshold("pseudo_huber", apply, None, threshold)


def log_cosh(threshold: Threshold = mean_size(1.5)) -> Pull:
    """ψ(w) = δ·tanh(w/δ). δ is `threshold`, in units of the weights (`thresholds`)."""

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        return delta * jnp.tanh(_ratio(jnp.abs(w), delta)) * _sign(w)

    return _with_threshold("log_cosh", apply, None, threshold)


def fair(threshold: Threshold = mean_size(1.5)) -> Pull:
    """``ψ(w) = w/(1+|w|/δ)``. δ is `threshold`, in units of the weights (`thresholds`).

    Proximal map: the positive root x of ``x² + x(δ(1+τ) - |θ|) - δ|θ| = 0``, with the sign of θ.
    """

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        return _bounded(w / (1 + _ratio(jnp.abs(w), delta)), delta)

    def prox(theta: jax.Array, tau: Value, delta: Value) -> jax.Array:
        size = jnp.abs(theta)
        b = delta * (1 + tau) - size
        root = jnp.sqrt(b * b + 4 * delta * size)
        # Of the two equal forms of the root, the one without cancellation. At δ = θ = 0 both would divide 0 by 0.
        x = jnp.where(b > 0, 2 * delta * size / jnp.where(b > 0, b + root, 1), (root - b) / 2)
        return x * _sign(theta)

    return _with_threshold("fair", apply, prox, threshold)


def lp(p: float = 1.0) -> Pull:
    """The pull ``p |w|^(p-1) sign(w)`` of the penalty ``|w|^p``, for `decay`; `padam` is its step for `proximal_decay`.

    Args:
        p: a Python number in [1, 2]; below 1 the pull is infinite at 0.

    Raises:
        ValueError: p out of range.
    """
    check("p", p, 1.0, 2.0)

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        return p * jnp.power(jnp.abs(w), p - 1) * jnp.sign(w)

    return Pull("lp", apply, proportional=p == 2)


LINEARIZE_AT = ("old", "new")


def padam(p: float = 0.8, linearize_at: str = "old") -> Pull:
    """pAdam's step for the penalty ``|w|^p``: the proximal map of the quadratic that touches it; no explicit pull.

    Args:
        p: a Python number in (0, 2].
        linearize_at: ``"old"`` or ``"new"``, the weight at which the step takes ``|w|^(p-2)``.

    Raises:
        ValueError: p out of range, an unknown `linearize_at`.
    """
    check("p", p, 0.0, 2.0, open_low=True)
    one_of("linearize_at", linearize_at, LINEARIZE_AT)

    def prox(theta: jax.Array, tau: Value, delta: Value, w: jax.Array) -> jax.Array:
        x = jnp.power(jnp.abs(w if linearize_at == "old" else theta), 2 - p)
        total = x + p * tau
        return theta * jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 1)

    return Pull("padam", None, prox, proportional=p == 2)


def elastic_net(l1_ratio: float = 0.5) -> Pull:
    """The pull ρ sign(w) + (1-ρ) w with its proximal map; `l1_ratio` is ρ in [0, 1], and may be traced.

    Raises:
        ValueError: ρ out of range.
    """
    check("l1_ratio", l1_ratio, 0.0, 1.0)

    def apply(w: jax.Array, delta: Value) -> jax.Array:
        return l1_ratio * jnp.sign(w) + (1 - l1_ratio) * w

    def prox(theta: jax.Array, tau: Value, delta: Value, w: jax.Array) -> jax.Array:
        size = jnp.maximum(jnp.abs(theta) - tau * l1_ratio, 0)
        return jnp.sign(theta) * size / (1 + tau * (1 - l1_ratio))

    radial = isinstance(l1_ratio, int | float) and l1_ratio == 0
    return Pull("elastic_net", apply, prox, proportional=radial)


NAMES = ("l2", "l1", "huber", "pseudo_huber", "log_cosh", "fair", "lp", "padam", "elastic_net")


def check_pull(pull: object) -> None:
    """Raises ValueError unless `pull` is a `Pull`; names the nearest one."""
    if not isinstance(pull, Pull):
        name = getattr(pull, "__name__", pull)
        raise ValueError(
            f"pull={pull!r} is not a Pull; allowed: {', '.join(f'pulls.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.pulls.{nearest(name, NAMES)}()?)."
        )
