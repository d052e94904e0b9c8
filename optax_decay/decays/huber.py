"""Huber decay and AdamHD: weight decay whose pull is bounded.

With u the incoming update, w the weight before the step, λ the rate (dimensionless), η_t the learning rate and δ the
threshold (units of the weights)::

    explicit   u ← u + λ_t · clip(w, -δ, δ)                                     `huber_decay`
    proximal   θ = w + u,  τ = η_t λ_t:                                          `huber_proximal_decay`
               w ← θ/(1+τ) if |θ| <= (1+τ)δ, else θ - τδ·sign θ

The threshold is a number, a schedule, or follows the weights of each matrix (per slice of a stacked leaf)::

    "mean"   δ = c · mean|w|        "rms"   δ = c · sqrt(mean w²)
    "ema"    δ = c · μ_t,  μ_t = β μ_{t-1} + (1-β) mean|w_t|,  μ_0 = mean|w_0|

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
leaves 42.5 %, 23.1 %, 11.1 %, 1.7 % of them beyond the threshold at c = 1, 1.5, 2, 3.

**Cost.** A number or schedule adds no pass over memory to AdamW. A threshold that follows the weights reads them
once more for its mean (44 instead of 40 bytes per weight on CPU, 32 instead of 28 on accelerators).
"""

from typing import Any

import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.product import masks
from optax_decay.product.couplings import ScalarOrSchedule
from optax_decay.product.decay import decay, one_mask, proximal_decay
from optax_decay.product.per_matrix import Quantity
from optax_decay.product.pulls import Threshold, huber


def huber_decay(
    weight_decay: ScalarOrSchedule = 0.1,
    threshold: Threshold = "mean",
    *,
    factor: Any = 1.5,
    decay_rate: float = 0.99,
    axis_name: Any = None,
    multiplier: Quantity | tuple[Quantity, ...] | None = None,
    cautious: bool = False,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: str = "lr",
    learning_rate: ScalarOrSchedule | None = None,
    peak_learning_rate: float | None = None,
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ·clip(w, -δ, δ)`` to the update; stands between ``scale_by_adam`` and ``scale_by_learning_rate``.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        threshold: δ. A positive number or schedule in units of the weights; ``"mean"``, ``"rms"`` or ``"ema"`` to
            follow each matrix's weights; or a `Quantity`.
        factor: c of the named thresholds, dimensionless, positive; a number or schedule.
        decay_rate: β of ``"ema"``, in [0, 1).
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.
        multiplier, cautious, mask, axes, coupling, learning_rate, peak_learning_rate, metrics: as in `decay`.

    Returns:
        A transformation with a `DecayState`: a counter, and one float32 per slice for ``"ema"``.

    Raises:
        ValueError: a number out of its range or an unknown name; the message gives the nearest valid choice.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(b1=0.9, b2=0.95),
    ...     optax_decay.huber_decay(weight_decay=0.1, threshold="mean", factor=1.5),
    ...     optax.scale_by_learning_rate(3e-4),
    ... )
    """
    return decay(
        weight_decay,
        pull=huber(threshold, factor, decay_rate, axis_name),
        multiplier=multiplier,
        cautious=cautious,
        mask=mask,
        axes=axes,
        coupling=coupling,
        learning_rate=learning_rate,
        peak_learning_rate=peak_learning_rate,
        metrics=metrics,
    )


def huber_proximal_decay(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.1,
    threshold: Threshold = "mean",
    *,
    factor: Any = 1.5,
    decay_rate: float = 0.99,
    axis_name: Any = None,
    multiplier: Quantity | tuple[Quantity, ...] | None = None,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: str = "lr",
    peak_learning_rate: float | None = None,
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the new weight by Huber's proximal map; stands last in the chain.

    δ is taken from the weights before the step. A step never changes the sign of a weight, whatever τ is.

    Args:
        learning_rate: η, the same number or schedule as in the chain.
        weight_decay, threshold, factor, decay_rate, axis_name: as in `huber_decay`.
        multiplier, mask, axes, coupling, peak_learning_rate, metrics: as in `proximal_decay`.

    >>> import optax, optax_decay
    >>> schedule = optax.cosine_decay_schedule(3e-4, 1000)
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     optax.scale_by_learning_rate(schedule),
    ...     optax_decay.huber_proximal_decay(schedule, weight_decay=0.1),
    ... )
    """
    return proximal_decay(
        learning_rate,
        weight_decay,
        pull=huber(threshold, factor, decay_rate, axis_name),
        multiplier=multiplier,
        mask=mask,
        axes=axes,
        coupling=coupling,
        peak_learning_rate=peak_learning_rate,
        metrics=metrics,
    )


def adam_huber_decay(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 0.1,
    threshold: Threshold = "mean",
    *,
    factor: Any = 1.5,
    decay_rate: float = 0.99,
    axis_name: Any = None,
    multiplier: Quantity | tuple[Quantity, ...] | None = None,
    cautious: bool = False,
    mask: masks.Mask = masks.MATRICES,
    weight_decay_mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: str = "lr",
    peak_learning_rate: float | None = None,
    proximal: bool = False,
    nesterov: bool = False,
    metrics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamHD: Adam with decoupled Huber decay.

    Decays hidden matrices and the output head, not embeddings, norms and biases. That needs `axes`: without a
    description, every leaf of exactly two dimensions counts as a hidden matrix, embeddings included.

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as in ``optax.adam``.
        weight_decay, threshold, factor, decay_rate, axis_name, multiplier, cautious, axes, metrics: as in
            `huber_decay`.
        mask: as in `decay`; None decays every leaf. `weight_decay_mask` is another name for it.
        coupling: as in `decay`; the chain is put in the right order for each.
        peak_learning_rate: η_max; may be left out when `learning_rate` is a number.
        proximal: the proximal form instead of the explicit one; excludes `cautious`.

    >>> import optax_decay
    >>> tx = optax_decay.adam_huber_decay(3e-4, b2=0.95, weight_decay=0.1)
    """
    mask = one_mask(mask, weight_decay_mask)
    if coupling in ("schedule", "corrected") and not callable(learning_rate):
        peak_learning_rate = learning_rate if peak_learning_rate is None else peak_learning_rate
    shared = {
        "factor": factor,
        "decay_rate": decay_rate,
        "axis_name": axis_name,
        "multiplier": multiplier,
        "mask": mask,
        "axes": axes,
        "coupling": coupling,
        "peak_learning_rate": peak_learning_rate,
        "metrics": metrics,
    }
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    rate = optax.scale_by_learning_rate(learning_rate)
    if proximal:
        if cautious:
            raise ValueError("cautious=True gates the explicit decay; use proximal=False with it.")
        last = huber_proximal_decay(learning_rate, weight_decay, threshold, **shared)
        return optax.chain(adam, rate, last)
    link = huber_decay(
        weight_decay, threshold, cautious=cautious, learning_rate=learning_rate, **shared
    )
    return optax.chain(adam, rate, link) if coupling == "none" else optax.chain(adam, link, rate)
