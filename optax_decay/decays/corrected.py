"""AdamC's corrected weight decay: ∝ η² on normalised layers, ∝ η on the others.

With η_t the learning rate, η_max its peak, w the weight, and the link standing before ``scale_by_learning_rate``::

    u ← u + λ (η_t/η_max) w    on layers whose output is normalised: shrink per step λ η_t²/η_max
    u ← u + λ w                on the others: λ η_t

A normalised layer settles where ``|gradient|/|weight| = sqrt(2λ/η_t)``. Under AdamW that ratio grows without bound
as η_t falls; with the correction it stays sqrt(2λ/η_max).

Reference: Defazio, "Why Gradients Rapidly Increase Near the End of Training", arXiv 2506.02285. The same factor follows
from another argument in Chou, "Correction of Decoupled Weight Decay", arXiv 2512.08217.

**Differs from the paper.** Nothing in the rule. The paper counts every linear layer but the output layer as normalised:
here the role ``"hidden"``; it takes `axes` to tell hidden matrices from embeddings. The coupling
``couplings.corrected`` corrects every decayed leaf, as some implementations do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product import masks
from optax_decay.product.couplings import now, peak_of
from optax_decay.product.decay import DecayOptions, decay, times
from optax_decay.product.per_matrix import Context, PerMatrix, Value


def learning_rate_ratio(
    learning_rate: optax.ScalarOrSchedule,
    peak_learning_rate: float | None = None,
    roles: str | Sequence[str] = ("hidden",),
) -> PerMatrix:
    """η_t/η_max for parameters of the given roles, 1 for the others. No state.

    Args:
        learning_rate: η, a number or schedule.
        peak_learning_rate: η_max > 0; may be left out for a number, which is its own peak.
        roles: one or several of `axes.ROLES`.

    Raises:
        ValueError: an unknown role, a number out of its range, a schedule without its peak.
    """
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    masks.check_mask(roles)
    check("learning_rate", learning_rate, 0.0)
    constant = peak_learning_rate is None and not callable(learning_rate)
    peak = 1.0 if constant else peak_of(learning_rate, peak_learning_rate)
    learning_rate = 1.0 if constant else learning_rate  # so that a rate of 0 is its own peak too

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return ()

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        ratio = now(learning_rate, context.count) / peak
        return {p: ratio if s.role in roles else 1.0 for p, s in context.signatures.items()}, state

    return PerMatrix(init, update)


@passes_options_to(decay)
def corrected_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    learning_rate: optax.ScalarOrSchedule,
    peak_learning_rate: float | None = None,
    normalized: str | Sequence[str] = ("hidden",),
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ (η_t/η_max) w`` to the update of normalised layers and ``λ w`` to that of the others.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        learning_rate: η, the same number or schedule as in the chain.
        peak_learning_rate: η_max; may be left out when `learning_rate` is a number.
        normalized: role or roles of the layers whose output is normalised.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; an unknown role; a schedule without its peak.

    >>> import optax, optax_decay
    >>> rate = optax.cosine_decay_schedule(3e-4, 1000)
    >>> link = optax_decay.corrected_decay(0.1, learning_rate=rate, peak_learning_rate=3e-4)
    >>> tx = optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(rate))
    """
    ratio = learning_rate_ratio(learning_rate, peak_learning_rate, normalized)
    return decay(weight_decay, **times(ratio, options))
