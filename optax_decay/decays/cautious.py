"""Cautious weight decay: decay only where it agrees with the step.

With u the incoming update before the learning rate, w the weight before the step, elementwise::

    u ← u + λ_t · 1[u·w >= 0] · w

so a weight that the optimizer is moving away from zero is not held back. No new hyperparameter, no state.

Reference: Chen, Li, Liang, Su, Xie, Wang Pierse, Liang, Lao and Liu, "Cautious Weight Decay", arXiv 2510.12402.

**Differs from the paper.** Nothing in the rule. Where u·w is exactly 0 the paper and most codes decay (>=) and some
do not (>); this follows the paper. The test is on the update that arrives: put the link directly before
``scale_by_learning_rate``, after all rescaling, and with ``coupling="none"`` after it (the sign is then turned
round). Any pull of the library can be gated. ``coupling="corrected"`` makes λ_t = λ η_t/η_max, the scheduled form of
the speed-run repositories, whose decay per step is ∝ η².
"""

from typing import Any

import optax

from optax_decay.product.couplings import ScalarOrSchedule
from optax_decay.product.decay import decay
from optax_decay.product.pulls import Pull


def cautious_decay(
    weight_decay: ScalarOrSchedule = 0.1,
    *,
    pull: str | Pull = "l2",
    coupling: str = "lr",
    learning_rate: ScalarOrSchedule | None = None,
    peak_learning_rate: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`decay` with ``cautious=True``.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        pull: what is gated; the paper's is w itself.
        coupling: ``"lr"``; ``"corrected"`` for the scheduled form, which needs both learning rates; or as in `decay`.
        learning_rate, peak_learning_rate: η and η_max, as in `decay`.
        options: multiplier, mask, axes, metrics, as in `decay`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.scale_by_adam(), optax_decay.cautious_decay(0.1), optax.scale_by_learning_rate(3e-4))
    """
    return decay(
        weight_decay,
        pull=pull,
        cautious=True,
        coupling=coupling,
        learning_rate=learning_rate,
        peak_learning_rate=peak_learning_rate,
        **options,
    )
