"""Stable weight decay (SWD): decay divided by the size of the gradients, as in AdamS.

With g the gradients, v̄_t the mean of Adam's bias-corrected second moment over all N parameters, λ the rate::

    v̄_t = (1/N) Σ_i v̂_t,i = EMA_β₂(mean g²)/(1-β₂ᵗ)                u ← u + λ w/sqrt(v̄_t)

λ has the units of a gradient. Shrink per step: η λ/sqrt(v̄), so that decay is as strong, relative to the average
effective learning rate η/sqrt(v̄), as in SGD. v̂ is linear in g², so one number of state replaces a look at Adam's own.

Reference: Xie, Sato and Sugiyama, "Stable Weight Decay Regularization", arXiv 2011.11152; their code
(zeke-xie/stable-weight-decay-regularization, class AdamS).

**Differs from the paper.**

* AMSGrad, which the authors' example switches on, is not offered: the mean of a maximum is not a maximum of means.
* Their mean runs over parameters that have a gradient; here over the tree of gradients that is given, None left out.
* λ is on another scale than AdamW's: theirs is 5e-4, and λ/sqrt(v̄) is what to compare with 0.1.
* All gradients 0 (v̄ = 0) means no decay instead of a division by 0.
* A step with a gradient that is not finite leaves the average as it was: it is shared, and one broken matrix would
  end the decay of all others for good.
* Decay follows the mask; theirs reaches every parameter (``mask=None``).
"""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product import masks
from optax_decay.product.decay import DecayOptions, ProductOptions, decay, in_order, times
from optax_decay.product.gates import Gate
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.product.product import increment
from optax_decay.product.running_means import share_seen
from optax_decay.product.tree_norms import square_sum


def inverse_gradient_rms(b2: float = 0.999) -> PerMatrix:
    """1/sqrt(v̄_t), in 1/gradient, the same for every parameter; 0 while every gradient has been 0.

    Needs the extra argument ``gradients`` (the whole tree). State: v̄ before bias correction, one float32 scalar.

    Raises:
        ValueError: β₂ outside [0, 1); when updated, no ``gradients``.
    """
    check("b2", b2, 0.0, 1.0, open_high=True)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return jnp.zeros([], float)

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        if context.extra.get("gradients") is None:
            raise ValueError(
                "stable decay divides by the size of the gradients, which a link after scale_by_adam cannot see: "
                "call tx.update(grads, state, params, gradients=grads), or use adam_stable_decay."
            )
        total, number = square_sum(jax.tree.leaves(context.extra["gradients"]))
        square = (total / number).astype(state.dtype)
        average = b2 * state + (1 - b2) * square
        average = jnp.where(jnp.isfinite(square), average, state)
        mean = average / share_seen(b2, increment(context.count), state.dtype)
        value = jnp.where(mean > 0, 1 / jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
        return dict.fromkeys(context.params, value), average

    return PerMatrix(init, update)


@passes_options_to(decay)
def stable_decay(
    weight_decay: optax.ScalarOrSchedule = 5e-4,
    b2: float = 0.999,
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ w/sqrt(v̄)`` to the update; call ``tx.update(grads, state, params, gradients=grads)``.

    Args:
        weight_decay: λ >= 0, in units of the gradients; a number or schedule.
        b2: β₂ in [0, 1); Adam's.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; β₂ out of range; when updated, no ``gradients``.
    """
    rms = inverse_gradient_rms(b2)
    return decay(weight_decay, **times(rms, options))


@passes_options_to(decay, "pull")
def adam_stable_decay(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 5e-4,
    *,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    cautious: bool | Gate = False,
    **options: Unpack[ProductOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamS: Adam with stable weight decay; hands its gradients to the decay by itself.

    Decays hidden matrices and the output head, not embeddings, norms and biases. Without `axes`, names of parameters
    decide (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps: as in ``optax.adam``; b2 also averages the decay's v̄.
        weight_decay: as in `stable_decay`.
        mask, axes, cautious: as in `decay`; ``mask=None`` decays every leaf.
        options: multiplier, coupling, metrics, as in `decay`; the chain has the right order for each coupling.

    >>> import optax_decay
    >>> tx = optax_decay.adam_stable_decay(1e-3, weight_decay=5e-4)
    """
    link = stable_decay(weight_decay, b2, mask=mask, axes=axes, cautious=cautious, **options)
    rate = scale_by_learning_rate(learning_rate)
    chain = in_order(options, optax.scale_by_adam(b1, b2, eps), link, rate)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> Any:
        return chain.update(updates, state, params, **{"gradients": updates, **extra})

    return optax.GradientTransformationExtraArgs(chain.init, update)
