"""Elastic net: decay by a mixture of L1 and L2, with exact zeros in the proximal form.

With ρ the share of L1, λ the rate and τ = η_t λ_t::

    penalty    ρ|w| + (1-ρ) w²/2,      pull  ρ sign(w) + (1-ρ) w                   `elastic_net`
    proximal   θ = w + u,   w ← sign(θ) max(|θ| - τρ, 0) / (1 + τ(1-ρ))            `elastic_net_proximal_decay`

ρ = 1 is the soft threshold (the lasso), ρ = 0 the implicit form of AdamW. λρ has the units of a weight.

References: Zou and Hastie, "Regularization and variable selection via the elastic net", 2005; the class Adam_L1 of
Nadav-out/PAdam, which is this step with its own two rates λ₁ = λρ and λ₂ = λ(1-ρ).

**Differs from the code.** One rate and a share in place of two rates, so that multipliers and schedules act on both
parts alike. The explicit pull, ``decay(pull=elastic_net(...))``, oscillates around 0 by up to τρ; use the proximal
form for zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters.arguments import check
from optax_decay.product.couplings import ScalarOrSchedule
from optax_decay.product.decay import proximal_decay
from optax_decay.product.pulls import Pull


def elastic_net(l1_ratio: float = 0.5) -> Pull:
    """The pull ρ sign(w) + (1-ρ) w with its proximal map; `l1_ratio` is ρ in [0, 1], and may be traced.

    Raises:
        ValueError: ρ out of range.
    """
    check("l1_ratio", l1_ratio, 0.0, 1.0)

    def apply(w: jax.Array, delta: Any) -> jax.Array:
        return l1_ratio * jnp.sign(w) + (1 - l1_ratio) * w

    def prox(theta: jax.Array, tau: Any, delta: Any, w: jax.Array) -> jax.Array:
        size = jnp.maximum(jnp.abs(theta) - tau * l1_ratio, 0)
        return jnp.sign(theta) * size / (1 + tau * (1 - l1_ratio))

    return Pull("elastic_net", apply, prox)


def elastic_net_proximal_decay(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.1,
    l1_ratio: float = 0.5,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Soft threshold at ηλρ, then division by 1 + ηλ(1-ρ); stands last in the chain.

    Args:
        learning_rate: η, the same number or schedule as in the chain.
        weight_decay: λ >= 0; a number or schedule.
        l1_ratio: ρ in [0, 1]; 1 is the soft threshold alone.
        options: as in `proximal_decay`: multiplier, mask, axes, coupling, peak_learning_rate, metrics.

    Raises:
        ValueError: as in `proximal_decay`; ρ out of range.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.adam(1e-3), optax_decay.elastic_net_proximal_decay(1e-3, 0.01, l1_ratio=1.0))
    """
    return proximal_decay(learning_rate, weight_decay, pull=elastic_net(l1_ratio), **options)
