"""Huber decay and AdamHD: weight decay whose pull is bounded.

With u the incoming update, w the weight before the step, λ the rate (dimensionless), η_t the learning rate and δ the
threshold (units of the weights)::

    explicit   u ← u + λ_t · clip(w, -δ, δ)                                     `huber_decay`
    proximal   θ = w + u,  τ = η_t λ_t:                                          `huber_proximal_decay`
               w ← θ/(1+τ) if |θ| <= (1+τ)δ, else θ - τδ·sign θ

The threshold is a number, a schedule, or follows the weights of each matrix (per slice of a stacked leaf)::

    mean_size(c)              δ = c · mean|w|           rms_size(c)   δ = c · sqrt(mean w²)
    running_mean_size(c, β)   δ = c · μ_t,  μ_t = β μ_{t-1} + (1-β) mean|w_t|,  μ_0 = mean|w_0|

Reference: Guo and Fan, "AdamHD: Decoupled Huber Decay Regularization for Language Model Pre-training",
arXiv 2511.14721.

**Differs from the paper.** Only its abstract and third-party descriptions could be read; no code was released.

* Descriptions of the step disagree (explicit or proximal). Both are here; `adam_huber_decay` takes the explicit
  one, which becomes AdamW bit for bit as δ → ∞. The proximal form becomes ``w/(1+ηλ)``, which is not AdamW.
* One description shows Adam without bias correction. Bias correction belongs to the Adam link and stays on.
* c = 1.5 and β = 0.99 come from a third party's implementation, not from the paper.
* Which parameters decay is not stated. `huber_decay` follows optax (every leaf); `adam_huber_decay` decays hidden
  matrices and the output head.

**What to expect.** At equal λ the Huber pull is nowhere larger than AdamW's. With a fixed δ two properties of AdamW
are lost: the bound 1/λ on weights whose direction persists (such a weight drifts without bound once η·direction
exceeds ηλδ), and the equilibrium size sqrt(η/λ), which becomes η/(λδ). Thresholds that follow the weights restore
the second. As δ → 0 at fixed λ decay vanishes; it becomes L1 only when λδ is held. For normal weights δ = c·mean|w|
leaves 42.5 %, 23.1 %, 11.1 %, 1.7 % of them beyond the threshold at c = 1, 1.5, 2, 3. On small models that saw a
text 16 times (``RESULTS.md``), c = 1.5 and c = 0.5 reached AdamW's loss; with c = 0.5, at a λ two to four times
AdamW's, 36 to 39 % of each matrix could be pruned for 0.02 nats, with AdamW 21 to 22 %.

**Cost.** A number or schedule adds no pass over memory to AdamW. A threshold that follows the weights reads them
once more for its mean (44 instead of 40 bytes per weight on CPU, 32 instead of 28 on accelerators).
"""

from typing import Unpack

import jax
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import passes_options_to
from optax_decay.product import masks
from optax_decay.product.decay import (
    FixedPullOptions,
    ProductOptions,
    ProximalOptions,
    decay,
    in_order,
    proximal_decay,
)
from optax_decay.product.gates import Gate
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.pulls import huber
from optax_decay.product.thresholds import Threshold, mean_size


@passes_options_to(decay, "pull")
def huber_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    threshold: Threshold = mean_size(1.5),
    **options: Unpack[FixedPullOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ·clip(w, -δ, δ)`` to the update; stands between ``scale_by_adam`` and ``scale_by_learning_rate``.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        threshold: δ > 0 in units of the weights: a number, a schedule, or one of `thresholds`, which follow the
            weights of each matrix.
        options: multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Returns:
        A transformation with a `DecayState`: a counter, and what the threshold remembers.

    Raises:
        ValueError: a number out of its range or an unknown name; the message gives the nearest valid choice.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(b1=0.9, b2=0.95),
    ...     optax_decay.huber_decay(0.1, threshold=optax_decay.thresholds.mean_size(1.5)),
    ...     optax.scale_by_learning_rate(3e-4),
    ... )
    """
    return decay(weight_decay, pull=huber(threshold), **options)


@passes_options_to(proximal_decay, "pull")
def huber_proximal_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    threshold: Threshold = mean_size(1.5),
    *,
    learning_rate: optax.ScalarOrSchedule,
    **options: Unpack[ProximalOptions],
) -> optax.GradientTransformationExtraArgs:
    """Replaces the new weight by Huber's proximal map; stands last in the chain.

    δ is taken from the weights before the step. A step never changes the sign of a weight, whatever τ is.

    Args:
        weight_decay, threshold: as in `huber_decay`.
        learning_rate: η, the same number or schedule as in the chain.
        options: multiplier, mask, axes, coupling, metrics, as in `proximal_decay`.

    >>> import optax, optax_decay
    >>> schedule = optax.cosine_decay_schedule(3e-4, 1000)
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     optax.scale_by_learning_rate(schedule),
    ...     optax_decay.huber_proximal_decay(0.1, learning_rate=schedule),
    ... )
    """
    return proximal_decay(
        weight_decay, learning_rate=learning_rate, pull=huber(threshold), **options
    )


@passes_options_to(decay, "pull")
def adam_huber_decay(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    threshold: Threshold = mean_size(1.5),
    *,
    nesterov: bool = False,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    cautious: bool | Gate = False,
    **options: Unpack[ProductOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamHD: Adam with decoupled Huber decay.

    Decays hidden matrices and the output head, not embeddings, norms and biases. Without `axes`, names of parameters
    decide (`axes.signatures`). For the proximal form, chain ``optax.adam`` and `huber_proximal_decay`.

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as in ``optax.adam``.
        weight_decay, threshold: as in `huber_decay`.
        mask, axes, cautious: as in `decay`; ``mask=None`` decays every leaf.
        options: multiplier, coupling, metrics, as in `decay`; the chain has the right order for each coupling.

    >>> import optax_decay
    >>> tx = optax_decay.adam_huber_decay(3e-4, b2=0.95, weight_decay=0.1)
    """
    link = huber_decay(weight_decay, threshold, mask=mask, cautious=cautious, axes=axes, **options)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    return in_order(options, adam, link, scale_by_learning_rate(learning_rate))
