"""Adaptive weight decay (AWD): decay in proportion to the ratio of gradient to weight norm.

With ‖g‖ and ‖w‖ Euclidean norms over all decayed parameters together, before the step::

    r_t = ‖g_t‖/(‖w_t‖ + 1e-8),      r̄_t = 0.1 r̄_{t-1} + 0.9 r_t,   r̄_0 = 0,      u ← u + λ r̄_t w

λ is dimensionless: the norm of the decay term is λ times the gradient's.

Reference: Ghiasi, Shafahi and Ardekani, "Improving Robustness with Adaptive Weight Decay", arXiv 2210.00094.

The authors add λ r̄ w to the gradient of SGD; the AlphaDecay program, which compares with it, to the gradient that goes
into Adam. Both are this link *before* the rest of the chain, where the updates are the gradients::

    optax.chain(awd_decay(0.1), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))

Standing after ``scale_by_adam`` it is decoupled and must be given them:
``tx.update(grads, state, params, gradients=grads)``. Without that it would take Adam's direction for the gradient.

**Differs from the paper and the program.** The rule is the authors' algorithm (their line 8 is the average above);
1e-8 is the program's. The program puts λ = 100 times its ``weight_decay`` for language models and 50 times for ViT,
counts every tensor that has a gradient (``mask=None``, the default here) and loses r̄ when it resumes; here r̄ is in
the state. A step whose ratio is not finite, since one gradient or weight is not, keeps r̄ as it was: r̄ is shared, and
one broken matrix would make all others NaN for good.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product.decay import DecayOptions, decay, times
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.product.tree_norms import square_sum


def gradient_to_weight(memory: float = 0.1, eps: float = 1e-8) -> PerMatrix:
    """r̄_t, the same for every parameter. State: one float32 scalar.

    Args:
        memory: the share of r̄ that is kept per step, in [0, 1).
        eps: added to ‖w‖, >= 0.
    """
    check("memory", memory, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return jnp.zeros([], float)

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        gradients = context.gradients()
        squares, _ = square_sum(gradients.values())
        weights, _ = square_sum(context.params[path] for path in gradients)
        ratio = (jnp.sqrt(squares) / (jnp.sqrt(weights) + eps)).astype(state.dtype)
        average = memory * state + (1 - memory) * ratio
        state = jnp.where(jnp.isfinite(ratio), average, state)
        return dict.fromkeys(context.params, state), state

    return PerMatrix(init, update)


@passes_options_to(decay)
def awd_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    memory: float = 0.1,
    eps: float = 1e-8,
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ r̄ w`` to the update; stands before ``scale_by_adam``, or after it with ``gradients=`` given.

    Args:
        weight_decay: λ >= 0 (λ_awd in the paper); a number or schedule, which then multiplies the averaged ratio.
        memory, eps: as in `gradient_to_weight`.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; `memory` or `eps` out of range.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax_decay.awd_decay(0.02), optax.sgd(0.1, momentum=0.9))
    """
    ratio = gradient_to_weight(memory, eps)
    return decay(weight_decay, **times(ratio, options))
