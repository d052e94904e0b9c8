"""Weight decay and learning rate that follow the width: tuned on a narrow model, used on a wide one.

With m the width of a matrix over its width in the proxy (fan-in over fan-in), η and λ the proxy's learning rate and
decay coefficient, u the direction before the learning rate and w the weight::

    matrices       u ← u + λ m^s w,     then   u ← u m^-r,      then   w ← w - η_t u
    vector-like    u ← u                                               w ← w - η_t u

so that a matrix has the learning rate ``η m^-r``, the decay coefficient ``λ m^s`` and shrinks by ``ηλ m^(s-r)`` per
step. With Adam r = 1 and, by default, s = ½: η ∝ 1/m, λ ∝ √m. Vector-like are embeddings, norms, biases and, unless
told otherwise, the output head. `width_laws` holds the rules, `width_factors` what m is.

*Order, and what is counted once.* The learning rate's multiplier also multiplies a decay that stands before it. So::

    adam → width_scaled_decay → width_scaled_learning_rate → scale_by_learning_rate           (`width_scaling`)
    adam → width_scaled_learning_rate → width_scaled_decay(rates_applied=True) → scale_by_learning_rate
    adam → width_scaled_learning_rate → scale_by_learning_rate → width_scaled_decay(coupling=independent())

all shrink by m^(s-r): where no multiplier follows, the decay's own is m^(s-r) instead of m^s. A learning rate per
parameter that comes last, as with ``optax.partition``, counts as a multiplier that follows.

*The model's side.* The laws of η assume hidden matrices that start with variance ∝ 1/fan-in, logits multiplied by
1/m (with the head as ``"vector"``), and attention scores with 1/d_head instead of 1/sqrt(d_head) where heads get wider.

References: Fan, Liu, Zhao, Yuan and Gu, "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
arXiv 2510.15262; Yang et al., "Tensor Programs V", arXiv 2203.03466, for η.

**Differs from the paper.** Its abstract and second-hand descriptions could be read; no code was released.

* Which class embeddings and the output head are in was not readable. Here embeddings are vector-like, and the head is
  vector-like with a read-out multiplier 1/m in the model, as in microsoft/mup; ``head="matrix"`` gives it η/m and λ√m.
* The paper's s = ½ rests on σ_max ≈ sqrt(η/λ)·d^0.75, measured on LLaMA-style models. `exponent` (or
  `decay_exponent`) takes another; `spectral_gain_report` measures which one a model needs.
* m is per matrix, from fan-in, where the paper has one width.
* Rules for Conda, ROOT and Muon are derived here (`width_laws`).
* A fixed Huber threshold breaks the steady state sqrt(η/λ) that the law stands on: combine this with a threshold that
  follows the weights ("mean", "rms", "ema").
* Adam's eps is not scaled. Gradients of a matrix shrink with its width: keep eps below their size at the large width.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import passes_options_to
from optax_decay.parameters.paths import path_string
from optax_decay.product import masks, pulls
from optax_decay.product.decay import DecayOptions, ProductOptions, decay, in_order, times
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.product.pulls import Pull
from optax_decay.width.factors import width_plan
from optax_decay.width.laws import Growth, WidthLaw


def _from_signatures(values: Any) -> PerMatrix:
    """A quantity that depends on shapes alone. Plain numbers: nothing is computed on the device."""

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        values(signatures)  # so that unknown sizes raise here
        return ()

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        return values(context.signatures), state

    return PerMatrix(init, update)


def width_power(
    base_width: Any,
    exponent: float = 0.5,
    *,
    head: str = "vector",
    vectors: float = 0.0,
    axes: axes_lib.Axes = None,
) -> PerMatrix:
    """The multiplier ``m^exponent`` of every matrix, to put into any decay by hand.

    Where no multiplier of the learning rate follows in the chain (`proximal_decay`, or the coupling
    ``couplings.independent()``), the exponent is s - r.

    Args:
        base_width: as in `width_scaled_decay`.
        exponent: dimensionless.
        head: ``"vector"`` or ``"matrix"``.
        vectors: multiplier of vector-like parameters, >= 0.
        axes: only to check the letters of `base_width` early; the decay's own axes count.

    >>> import optax_decay
    >>> tx = optax_decay.huber_decay(
    ...     0.1, "mean", axes=(("up", "D -> F"),), multiplier=optax_decay.width_power(256)
    ... )
    """
    law = WidthLaw(0.0, exponent, vectors, 0.0)
    plan = width_plan(base_width, rule=law, head=head, axes=axes)
    return _from_signatures(lambda signatures: plan.decays(signatures, False))


class WidthOptions(DecayOptions, total=False):
    """Keyword arguments that `width_scaling` and `mup_adamw` pass on to `width_scaled_decay`, which describes them."""

    rule: str | WidthLaw
    exponent: float | None
    optimizer: str | Growth
    head: str


@passes_options_to(decay)
def width_scaled_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    base_width: Any = None,
    *,
    rule: str | WidthLaw = "fan2025",
    exponent: float | None = None,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    rates_applied: bool = False,
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ m^s ψ(w)`` to the updates of matrices; `width_scaled_learning_rate` belongs behind it.

    Args:
        weight_decay: λ of the proxy, dimensionless, >= 0; a number or schedule.
        base_width: the proxy's width: the size of its axis ``D``; sizes by letter, ``{"D": 256, "F": 688}``; or its
            parameters, arrays or ``jax.ShapeDtypeStruct``.
        rule: one of `RULES`, or a `WidthLaw`.
        exponent: s, in place of the rule's.
        optimizer: whose updates these are, one of `OPTIMIZERS` or a `Growth`. A head that counts as a matrix follows
            ``"adam"``, to which matrix optimizers leave it.
        head: ``"vector"`` (with a read-out multiplier 1/m in the model) or ``"matrix"``.
        rates_applied: updates already carry the multiplier of the learning rate (see the order above).
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`. The coupling
            ``couplings.independent()`` stands last in the chain and implies `rates_applied`; a learning rate in a
            coupling is the proxy's.

    Raises:
        ValueError: as `decay`; an unknown rule, optimizer or letter; at ``init``, parameters without axes or without
            a base size.

    >>> import optax, optax_decay
    >>> axes = ((r"up", "D -> F"), (r"norm", "D"))
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     optax_decay.width_scaled_decay(0.1, base_width=256, axes=axes),
    ...     optax_decay.width_scaled_learning_rate(base_width=256, axes=axes),
    ...     optax.scale_by_learning_rate(3e-3),
    ... )
    """
    axes, coupling = options.get("axes"), options.get("coupling")
    plan = width_plan(
        base_width, rule=rule, exponent=exponent, optimizer=optimizer, head=head, axes=axes
    )
    applied = rates_applied or (coupling is not None and coupling.after_rate)
    width = _from_signatures(lambda signatures: plan.decays(signatures, applied))
    passed = times(width, options)
    if (
        passed.get("mask") is None
        and isinstance(plan.hidden.vectors, float)
        and not plan.hidden.vectors
    ):
        # The same as multiplying by 0, without a pass over the embeddings where λ is a schedule.
        passed["mask"] = ("hidden", "head") if head == "matrix" else ("hidden",)
    return decay(weight_decay, **passed)


def width_scaled_learning_rate(
    base_width: Any,
    *,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    axes: axes_lib.Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of matrices by ``m^-r`` and leaves the others; has no state.

    Args:
        base_width, optimizer, head, axes: as in `width_scaled_decay`.

    Raises:
        ValueError: as `width_scaled_decay`.
    """
    plan = width_plan(base_width, optimizer=optimizer, head=head, axes=axes)

    def init(params: Any) -> optax.EmptyState:
        plan.rates(axes_lib.signatures(axes, params))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        rates = plan.rates(axes_lib.signatures(axes, updates if params is None else params))

        def scale(key: tuple[Any, ...], u: jax.Array) -> jax.Array:
            rate = rates[path_string(key)]
            if rate == 1.0:
                return u
            # A bfloat16 product would round the multiplier too.
            return (u.astype(jnp.promote_types(u.dtype, jnp.float32)) * rate).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


@passes_options_to(width_scaled_decay, "rates_applied")
def width_scaling(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    base_width: Any = None,
    **options: Unpack[WidthOptions],
) -> optax.GradientTransformationExtraArgs:
    """`width_scaled_decay` and `width_scaled_learning_rate` as one link, before ``scale_by_learning_rate``.

    Takes the place of the decay in any chain, and of a number as ``weight_decay`` of this library's optimizers:
    ``sophia(1e-3, weight_decay=width_scaling(0.1, 256, axes=axes))``.

    Arguments as in `width_scaled_decay`.

    Raises:
        ValueError: as `width_scaled_decay`; or the coupling ``couplings.independent()``, whose two links stand on
            either side of the learning rate.
    """
    coupling = options.get("coupling")
    if coupling is not None and coupling.after_rate:
        raise ValueError(
            "the coupling independent decays after the learning rate: chain width_scaled_learning_rate, "
            "scale_by_learning_rate and width_scaled_decay(coupling=couplings.independent())."
        )
    link = width_scaled_decay(weight_decay, base_width, **options)
    optimizer, head = options.get("optimizer", "adam"), options.get("head", "vector")
    axes = options.get("axes")
    rates = width_scaled_learning_rate(base_width, optimizer=optimizer, head=head, axes=axes)
    return optax.chain(link, rates)


@passes_options_to(decay)
def mup_adamw(
    learning_rate: optax.ScalarOrSchedule,
    base_width: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    rule: str | WidthLaw = "fan2025",
    exponent: float | None = None,
    head: str = "vector",
    nesterov: bool = False,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    cautious: bool = False,
    pull: Pull = pulls.l2(),
    **options: Unpack[ProductOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamW under μP with a decay that follows the width: η and λ of the proxy, at any width.

    At the base width it is AdamW that decays what `rule` and `mask` say: hidden matrices, by default.

    Args:
        learning_rate: η of the proxy, a number or schedule.
        base_width, rule, exponent, head: as in `width_scaled_decay`.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as in ``optax.adam``.
        weight_decay: λ of the proxy.
        pull, cautious, axes: as in `decay`; any pull, such as a Huber pull with a threshold that follows the weights.
        mask: as in `decay`, default hidden matrices and the head (which decays with ``head="matrix"`` or the rule
            ``"mup_package"`` only); None leaves it to the rule.
        options: multiplier, coupling, metrics, as in `decay`; the chain has the right order for each coupling.

    >>> import optax_decay
    >>> axes = ((r"embed", "V -> D"), (r"up", "D -> F"), (r"norm", "D"))
    >>> tx = optax_decay.mup_adamw(3e-3, base_width=256, b2=0.95, weight_decay=0.1, axes=axes)
    """
    link = width_scaled_decay(
        weight_decay,
        base_width,
        rule=rule,
        exponent=exponent,
        head=head,
        mask=mask,
        axes=axes,
        cautious=cautious,
        pull=pull,
        **options,
    )
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    rates = width_scaled_learning_rate(base_width, head=head, axes=axes)
    return in_order(options, adam, link, rates, optax.scale_by_learning_rate(learning_rate))
