"""p-norm weight decay: the penalty ``λ Σ|w|^p`` for any 0 < p <= 2, as an explicit pull or as pAdam's implicit step.

With u the incoming update, w the weight before the step, λ the rate (weight^(2-p)) and τ = η_t λ_t::

    explicit   u ← u + λ p |w|^(p-1) sign(w),  1 <= p <= 2                          `lp_decay`
    proximal   θ = w + u,   w ← θ X/(X + pτ)                                         `lp_proximal_decay`
               X = |w|^(2-p)  (linearize_at="old", pAdam)  or  |θ|^(2-p)  ("new", its late form)

The proximal form replaces ``|w|^p`` by the quadratic that touches it at the old (or new) weight, ``|w|^(p-2) θ² p/2``,
and takes the exact proximal step of that. It never diverges; weights far below (pτ)^(1/(2-p)) collapse to 0 faster than
geometrically, for p < 2.

Reference: Outmezguine and Levi, "Decoupled Weight Decay for Any p Norm", arXiv 2404.10824; their code
(Nadav-out/PAdam, classes PAdam, Adam_L1, AdamP).

**Differs from the paper.**

* The factor p is the code's (penalty ``λ Σ|w|^p``); the paper's formula ``w/(1 + ηλ|w|^(p-2))`` has none. At p = 2 the
  code's step is θ/(1 + 2ηλ): implicit decay at twice λ, not AdamW.
* The explicit form is decoupled; the code's explicit class adds the pull to the gradient. Put `lp_decay` before
  ``scale_by_adam`` for that. It takes p >= 1 only: below, the pull is infinite at 0.
* 0/0 at w = 0 and τ = 0 is 1 here (no decay).

**What to know.** With ``linearize_at="old"`` a weight that is exactly 0 stays 0 whatever its gradient: a matrix that is
initialised to 0 never learns. Use ``"new"`` there, or a mask. The authors find the sparsest networks for p < 1 and
the best accuracy for 1 < p < 2; their script uses p = 0.8, λ = 1e-3.
"""

from typing import Unpack

import optax

from optax_decay.parameters.arguments import passes_options_to
from optax_decay.product.decay import FixedPullOptions, ProximalOptions, decay, proximal_decay
from optax_decay.product.pulls import lp, padam


@passes_options_to(decay, "pull")
def lp_decay(
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    p: float = 1.0,
    **options: Unpack[FixedPullOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ p |w|^(p-1) sign(w)`` to the update.

    Args:
        weight_decay: λ >= 0, in weight^(2-p); a number or schedule.
        p: in [1, 2].
        options: multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; p outside [1, 2].

    >>> import optax_decay
    >>> tx = optax_decay.lp_decay(1e-3, p=1.5, mask="hidden")
    """
    return decay(weight_decay, pull=lp(p), **options)


@passes_options_to(proximal_decay, "pull")
def lp_proximal_decay(
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    p: float = 0.8,
    *,
    learning_rate: optax.ScalarOrSchedule,
    linearize_at: str = "old",
    **options: Unpack[ProximalOptions],
) -> optax.GradientTransformationExtraArgs:
    """pAdam's step: multiplies the new weight by ``X/(X + pηλ)``; stands last in the chain.

    Args:
        weight_decay: λ >= 0; 0 leaves every weight alone.
        p: in (0, 2].
        learning_rate: η, the same number or schedule as in the chain.
        linearize_at: ``"old"`` (pAdam; exact zeros never leave) or ``"new"`` (its late form).
        options: multiplier, mask, axes, coupling, metrics, as in `proximal_decay`.

    Raises:
        ValueError: as in `proximal_decay`; p out of range, an unknown `linearize_at`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax.adam(1e-3), optax_decay.lp_proximal_decay(1e-3, p=0.8, learning_rate=1e-3))
    """
    pull = padam(p, linearize_at)
    return proximal_decay(weight_decay, learning_rate=learning_rate, pull=pull, **options)
