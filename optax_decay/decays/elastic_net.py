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

from typing import Unpack

import optax

from optax_decay.parameters.arguments import passes_options_to
from optax_decay.product.decay import FixedPullOptions, ProximalOptions, decay, proximal_decay
from optax_decay.product.pulls import elastic_net


@passes_options_to(decay, "pull")
def elastic_net_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    l1_ratio: float = 0.5,
    **options: Unpack[FixedPullOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ (ρ sign(w) + (1-ρ) w)`` to the update.

    Args:
        weight_decay: λ >= 0; a number or schedule.
        l1_ratio: ρ in [0, 1], the share of L1.
        options: multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; ρ out of range.
    """
    return decay(weight_decay, pull=elastic_net(l1_ratio), **options)


@passes_options_to(proximal_decay, "pull")
def elastic_net_proximal_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    l1_ratio: float = 0.5,
    *,
    learning_rate: optax.ScalarOrSchedule,
    **options: Unpack[ProximalOptions],
) -> optax.GradientTransformationExtraArgs:
    """Soft threshold at ηλρ, then division by 1 + ηλ(1-ρ); stands last in the chain.

    Args:
        weight_decay: λ >= 0; a number or schedule.
        l1_ratio: ρ in [0, 1]; 1 is the soft threshold alone.
        learning_rate: η, the same number or schedule as in the chain.
        options: multiplier, mask, axes, coupling, metrics, as in `proximal_decay`.

    Raises:
        ValueError: as in `proximal_decay`; ρ out of range.

    >>> import optax, optax_decay
    >>> link = optax_decay.elastic_net_proximal_decay(0.01, l1_ratio=1.0, learning_rate=1e-3)
    >>> tx = optax.chain(optax.adam(1e-3), link)
    """
    pull = elastic_net(l1_ratio)
    return proximal_decay(weight_decay, learning_rate=learning_rate, pull=pull, **options)
