r"""EXAdam: Adam with the current gradient added to the momentum, and debiasing terms that couple the two moments.

With g the gradient, η the learning rate, λ the decay, t = 1, 2, … the step, and every operation elementwise::

    m ← β₁ m + (1-β₁) g                      v ← β₂ v + (1-β₂) g²
    d₁ = 1 + β₂ᵗ v/(v + ε)                   d₂ = 1 + β₁ᵗ m²/(m² + ε)
    u = (m + g) d₁/(1-β₁ᵗ) / (sqrt(v d₂/(1-β₂ᵗ)) + ε)
    w ← w - η (ℓ_t u + λ w)                  ℓ_t = 1, or with log_growth  ln(2(t+1))/2

m has the units of g and v those of g²; u, d₁ and d₂ are dimensionless. The authors use one constant ε in all four
places, so it is compared with quantities in units of g and of g².

Reference: Adel, "EXAdam: The Power of Adaptive Cross-Moments", arXiv 2412.20302. The default is its second version.
``log_growth=True`` gives the growing step of the first version, which the second one dropped: ℓ_t is 0.69 at t = 1,
2.65 at t = 100, 4.95 at t = 10⁴, and unbounded, so it needs a learning rate that decays faster than ℓ_t grows.

**Read this before you compare EXAdam with Adam at equal learning rates.**

* The first step is 2·11/sqrt(1.9) = 15.95 η per coordinate for ordinary gradients, and 11 η where g² ≪ ε. Warm-up is
  essential.
* After about 1/(1-β₂) steps d₁ has faded, and after 1/(1-β₁) steps d₂ has. The step is then η (m + g)/(sqrt(v) + ε):
  quasi-hyperbolic Adam with ν₁ = 1/2 at *twice* the learning rate. At equal η it moves 2 times as far as Adam on
  constant gradients and 4.9 times as far on pure noise. The published comparisons use equal η and are confounded by
  that; divide η by 2 to 5.
* d₁ and d₂ depend on the scale of the gradients through ε: below ``|g|`` of about 1e-3, the usual range of language
  models, d₁ is nearly 1. The update is therefore not invariant to the scale of the loss.
* The evidence in the author's repository is a small image network and a character model with 14 M parameters. The
  latter fits the training set faster and overfits earlier (best validation loss 1.492, against 1.494 for AdamW; last
  validation loss 1.571, against 1.494). There is no evidence for pre-training.

**Differs from the paper.**

* The paper's algorithm has no weight decay. The author's code shrinks weights by 1 - ηλ before the step, which is the
  same update as here. The code's default λ = 0 is kept.
* The released code calls a function that it no longer imports and stops in its constructor. Its arithmetic is
  reproduced here.
* ε = 0 raises an error: a weight that never received a gradient would become 0/0.
* 1-βᵗ is computed without cancellation (``1 - 0.999**1`` in float32 is wrong by 5e-5), moments of 16-bit weights are
  float32 unless `mu_dtype` says otherwise, and ``|g|²`` replaces g² for complex weights.
"""

from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import increment
from optax_decay.product.running_means import power, share_seen


class ScaleByExadamState(NamedTuple):
    """State of `scale_by_exadam`; as large as Adam's.

    Attributes:
        count: int32 scalar, completed updates.
        mu: m, like params, in `mu_dtype` or at least float32.
        nu: v, like params, real, at least float32.
    """

    count: jax.Array
    mu: Any
    nu: Any


class ExadamOptions(TypedDict, total=False):
    """Keyword arguments that `exadam` passes on to `scale_by_exadam`, which describes them."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    mu_dtype: jax.typing.DTypeLike | None
    log_growth: bool


def scale_by_exadam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    log_growth: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by EXAdam's rule.

    Args:
        b1: β₁ in [0, 1), decay of the running mean of the gradient.
        b2: β₂ in [0, 1), decay of the running mean of the squared gradient.
        eps: ε > 0, added to v, to m² and to the denominator.
        mu_dtype: dtype of m. None: the parameters' dtype, but at least float32.
        log_growth: multiply by ln(2(t+1))/2, as the first version of the paper does.

    Returns:
        A transformation with a `ScaleByExadamState`. b1, b2 and eps may be traced.

    Raises:
        ValueError: a number out of its range.
    """
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("b2", b2, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0, open_low=True)

    def init(params: optax.Params) -> ScaleByExadamState:
        def first(p: jax.Array) -> jax.Array:
            return jnp.zeros_like(p, mu_dtype or jnp.promote_types(p.dtype, jnp.float32))

        def second(p: jax.Array) -> jax.Array:
            return jnp.zeros_like(p, accumulator_dtype(p.dtype))

        return ScaleByExadamState(
            jnp.zeros([], jnp.int32), jax.tree.map(first, params), jax.tree.map(second, params)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        del params, extra
        count = increment(state.count)

        def moment(old: jax.Array, new: jax.Array, beta: Any) -> jax.Array:
            return beta * old + (1 - beta) * new

        def first(g: jax.Array, m: jax.Array, v: jax.Array) -> Any:
            if g is None:
                return m
            dtype = jnp.promote_types(g.dtype, v.dtype)
            return moment(m.astype(dtype), g.astype(dtype), b1)

        def second(g: jax.Array, v: jax.Array) -> Any:
            if g is None:
                return v
            return moment(v, jnp.square(jnp.abs(g.astype(jnp.promote_types(g.dtype, v.dtype)))), b2)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> Any:
            if g is None:
                return None
            dtype = v.dtype
            # A traced eps cannot be checked; the smallest normal number prevents 0/0.
            tiny = jnp.maximum(jnp.asarray(eps, dtype), jnp.finfo(dtype).tiny)
            m2 = jnp.square(jnp.abs(m))
            d1 = 1 + power(b2, count, dtype) * (v / (v + tiny))
            d2 = 1 + power(b1, count, dtype) * (m2 / (m2 + tiny))
            scale = 1 / share_seen(b1, count, dtype)
            if log_growth:
                scale = scale * jnp.log(2 * (count.astype(dtype) + 1)) / 2
            root = jnp.sqrt(v * (d2 / share_seen(b2, count, dtype)))
            u = (m + g.astype(m.dtype)) * (d1 * scale) / (root + tiny)
            return u.astype(g.dtype)

        def hole(x: jax.Array) -> bool:
            return x is None

        mu = jax.tree.map(first, updates, state.mu, state.nu, is_leaf=hole)
        nu = jax.tree.map(second, updates, state.nu, is_leaf=hole)
        new_updates = jax.tree.map(direction, updates, mu, nu, is_leaf=hole)

        def keep_dtype(new: jax.Array, old: jax.Array) -> jax.Array:
            return new.astype(old.dtype)

        mu = jax.tree.map(keep_dtype, mu, state.mu)
        nu = jax.tree.map(keep_dtype, nu, state.nu)
        return new_updates, ScaleByExadamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


@passes_options_to(scale_by_exadam)
def exadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[ExadamOptions],
) -> optax.GradientTransformationExtraArgs:
    """EXAdam with decoupled weight decay. Its steps are 2 to 5 (at first 16) times as long as Adam's at equal η.

    Decays hidden matrices and the output head, not embeddings, norms and biases. Without `axes`, names of parameters
    decide (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule. The author suggests 1e-3 (vision) and 3e-4 (language).
        weight_decay: λ with AdamW's coupling, a number or schedule; or any decay of this library as a transformation.
            The author suggests 1e-4 (vision) and 1e-5 (language).
        mask: which leaves decay if `weight_decay` is a number or schedule (`masks.strengths`).
        axes: what the parameters' axes mean (`axes.signatures`); roles in `mask` come from it.
        options: b1, b2, eps, mu_dtype, log_growth, as in `scale_by_exadam`.

    Raises:
        ValueError: as in `scale_by_exadam`; a mask or axes beside a transformation, which has its own.

    >>> import optax_decay
    >>> tx = optax_decay.exadam(3e-4, weight_decay=optax_decay.huber_decay(0.1))
    """
    return optax.chain(
        scale_by_exadam(**options),
        as_decay(weight_decay, mask, axes, only_use_of_axes=True),
        scale_by_learning_rate(learning_rate),
    )
