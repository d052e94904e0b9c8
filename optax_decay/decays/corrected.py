"""AdamC's corrected weight decay: ∝ η² on normalised layers, ∝ η on the others.

With η_t the learning rate, η_max its peak, w the weight, and the link standing before ``scale_by_learning_rate``::

    u ← u + λ (η_t/η_max) w    on layers whose output is normalised: shrink per step λ η_t²/η_max
    u ← u + λ w                on the others: λ η_t

A normalised layer settles where ``|gradient|/|weight| = sqrt(2λ/η_t)``. Under AdamW that ratio grows without bound
as η_t falls; with the correction it stays sqrt(2λ/η_max).

Reference: Defazio, "Why Gradients Rapidly Increase Near the End of Training", arXiv 2506.02285. The same factor follows
from another argument in Chou, "Correction of Decoupled Weight Decay", arXiv 2512.08217.

**Differs from the paper.** Nothing in the rule. The paper counts every linear layer but the output layer as normalised:
here the role ``"hidden"``, which needs `axes` to be told from embeddings. ``decay(coupling="corrected")`` corrects
every decayed leaf, as some implementations do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import masks
from optax_decay.product.couplings import ScalarOrSchedule, now
from optax_decay.product.decay import as_quantities, decay
from optax_decay.product.per_matrix import Context, Quantity, Value


def learning_rate_ratio(
    learning_rate: ScalarOrSchedule, peak_learning_rate: float, roles: Any = ("hidden",)
) -> Quantity:
    """η_t/η_max for parameters of the given roles, 1 for the others. No state."""
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    masks.check_mask(roles)
    check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return ()

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        ratio = now(learning_rate, context.count) / peak_learning_rate
        return {p: ratio if s.role in roles else 1.0 for p, s in context.signatures.items()}, state

    return Quantity(init, update)


def corrected_decay(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.1,
    peak_learning_rate: float | None = None,
    *,
    normalized: Any = ("hidden",),
    multiplier: Quantity | Sequence[Quantity] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ (η_t/η_max) w`` to the update of normalised layers and ``λ w`` to that of the others.

    Args:
        learning_rate: η, the same number or schedule as in the chain.
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        peak_learning_rate: η_max; may be left out when `learning_rate` is a number.
        normalized: role or roles of the layers whose output is normalised.
        multiplier: further factors, as in `decay`.
        options: pull, cautious, mask, axes, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; an unknown role; a schedule without its peak.

    >>> import optax, optax_decay
    >>> rate = optax.cosine_decay_schedule(3e-4, 1000)
    >>> link = optax_decay.corrected_decay(rate, 0.1, peak_learning_rate=3e-4)
    >>> tx = optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(rate))
    """
    check("learning_rate", learning_rate, 0.0)
    if peak_learning_rate is None:
        if callable(learning_rate):
            raise ValueError(
                "corrected_decay divides by the peak of the schedule: pass peak_learning_rate=..."
            )
        learning_rate = peak_learning_rate = 1.0  # a constant is its own peak
    ratio = learning_rate_ratio(learning_rate, peak_learning_rate, normalized)
    return decay(weight_decay, multiplier=(ratio, *as_quantities(multiplier)), **options)
