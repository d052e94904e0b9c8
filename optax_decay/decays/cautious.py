"""Cautious weight decay: decay only where it agrees with the step.

With u the incoming update before the learning rate, w the weight before the step, elementwise::

    u ← u + λ_t · 1[u·w >= 0] · w

so a weight that the optimizer is moving away from zero is not held back. No new hyperparameter, no state.

Reference: Chen, Li, Liang, Su, Xie, Wang Pierse, Liang, Lao and Liu, "Cautious Weight Decay", arXiv 2510.12402.

**Differs from the paper.** Nothing in the rule. Where u·w is exactly 0 the paper and most codes decay (>=) and some
do not (>); this follows the paper. ``decay(0.1, cautious=gates.strict_agreement())`` follows the others (`gates`). The
test is on the update that arrives: put the link directly before ``scale_by_learning_rate``, after all rescaling, or
after it with ``coupling=couplings.independent()``, which turns the sign round. Any pull of the library can be gated.
``couplings.corrected`` makes λ_t = λ η_t/η_max, the scheduled form of the speed-run repositories, whose decay per step
is ∝ η².
"""

from typing import Unpack

import optax

from optax_decay.parameters.arguments import passes_options_to
from optax_decay.product import pulls
from optax_decay.product.decay import ProximalOptions, decay
from optax_decay.product.pulls import Pull


@passes_options_to(decay, "cautious")
def cautious_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    pull: Pull = pulls.l2(),
    **options: Unpack[ProximalOptions],
) -> optax.GradientTransformationExtraArgs:
    """`decay` with ``cautious=True``.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        pull: ψ, the pull that is gated, one of `pulls`; the paper's is w itself.
        options: multiplier, mask, axes, coupling, metrics, as in `decay`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.scale_by_adam(), optax_decay.cautious_decay(0.1), optax.scale_by_learning_rate(3e-4))
    """
    return decay(weight_decay, pull=pull, cautious=True, **options)
