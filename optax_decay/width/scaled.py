"""Weight decay and learning rate that follow the width: tuned on a narrow model, used on a wide one.

With m the width of a matrix over its width in the proxy (fan-in over fan-in), η and λ the learning rate and the decay
coefficient of the proxy, u the direction before the learning rate and w the weight::

    matrices       u ← u + λ m^s w,     then   u ← u m^-r,      then   w ← w - η_t u
    vector-like    u ← u                                               w ← w - η_t u

A matrix therefore has the learning rate ``η m^-r`` and the decay coefficient ``λ m^s``, and shrinks by
``ηλ m^(s-r)`` per step. With Adam r = 1 and, by default, s = ½: η ∝ 1/m and λ ∝ √m. Embeddings, norms, biases and, by
default, the output head are vector-like. `width.law` holds r and s; `factors` says what m is.

*Order.* The multiplier of the learning rate also multiplies a decay that stands before it. These three chains shrink
matrices by the same m^(s-r)::

    adam → width_scaled_decay → width_scaled_learning_rate → scale_by_learning_rate           (`width_scaling`)
    adam → width_scaled_learning_rate → decay(multiplier=width_power(rates_applied=True)) → scale_by_learning_rate
    adam → width_scaled_learning_rate → scale_by_learning_rate → width_scaled_decay(coupling=independent())

Where no multiplier of the learning rate follows, as in the last two, the multiplier of the decay is m^(s-r) instead of
m^s. Learning rates per parameter that come last, as with ``optax.partition``, count as a multiplier that follows.

*The model.* The laws of η assume hidden matrices that start with variance ∝ 1/fan-in; logits multiplied by 1/m where
the head is vector-like; and attention scores multiplied by 1/d_head instead of 1/sqrt(d_head) where heads get wider.

References: Fan, Liu, Zhao, Yuan and Gu, "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
arXiv 2510.15262; Yang et al., "Tensor Programs V", arXiv 2203.03466, for η.

**Differs from the paper.** Only its abstract and second-hand descriptions could be read; no code was released.

* The paper's class for embeddings and the output head could not be read. Here embeddings are vector-like, and the head
  is vector-like with a read-out multiplier 1/m in the model, as in microsoft/mup. ``law(head="matrix")`` gives the head
  η/m and λ√m.
* The s = ½ of the paper rests on σ_max ≈ sqrt(η/λ)·d^0.75, measured on LLaMA-style models. ``law(exponent=...)`` takes
  another s; `decay_exponent` computes it, and `spectral_gain_report` measures which one a model needs.
* m is per matrix, from fan-in, where the paper has one width.
* The exponents for Conda, ROOT and Muon are derived here (`laws`).
* A fixed Huber threshold breaks the steady state sqrt(η/λ) on which the law rests. Combine the law with a threshold
  that follows the weights (`thresholds`).
* Adam's eps is not scaled. Gradients of a matrix shrink with its width: keep eps below their size at the large width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import passes_options_to
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import couplings, masks
from optax_decay.product.couplings import check_coupling
from optax_decay.product.decay import DecayOptions, ProductOptions, decay, in_order, times
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.product.pulls import Pull
from optax_decay.width import laws
from optax_decay.width.factors import BaseWidth, width_plan
from optax_decay.width.laws import WidthLaw

Values = Callable[[Mapping[str, axes_lib.Signature]], dict[str, Value]]


def _from_signatures(values: Values) -> PerMatrix:
    """A multiplier that depends on shapes alone. Its values are plain numbers: nothing is computed on the device."""

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        values(signatures)  # raises for unknown sizes before the first step
        return ()

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        return values(context.signatures), state

    return PerMatrix(init, update)


def width_power(
    base_width: BaseWidth,
    law: WidthLaw = laws.law(),
    *,
    rates_applied: bool = False,
    axes: axes_lib.Axes = None,
) -> PerMatrix:
    """The multiplier m^s of every matrix, to put into any decay by hand.

    Args:
        base_width, law: as in `width_scaled_decay`.
        rates_applied: use m^(s-r) instead of m^s: for a decay after `width_scaled_learning_rate`, and for one that
            stands last in the chain (`proximal_decay`, or the coupling ``couplings.independent()``).
        axes: used only to check the letters of `base_width` at construction; the axes of the decay decide.

    Raises:
        ValueError: as in `width_scaled_decay`.

    >>> import optax_decay
    >>> tx = optax_decay.huber_decay(
    ...     0.1, axes=(("up", "D -> F"),), multiplier=optax_decay.multipliers.width_power(256)
    ... )
    """
    plan = width_plan(base_width, law, axes)
    return _from_signatures(lambda signatures: plan.decays(signatures, rates_applied))


class WidthOptions(DecayOptions, total=False):
    """Keyword arguments that `width_scaling` passes on to `width_scaled_decay`, which describes them."""

    law: WidthLaw


class MupOptions(ProductOptions, total=False):
    """The same for `mup_adamw`, which has a mask of its own."""

    law: WidthLaw
    pull: Pull
    cautious: bool
    axes: axes_lib.Axes


@passes_options_to(decay)
def width_scaled_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    base_width: BaseWidth = None,
    *,
    law: WidthLaw = laws.law(),
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ m^s ψ(w)`` to the updates of matrices; `width_scaled_learning_rate` belongs after it.

    Args:
        weight_decay: λ of the proxy, dimensionless, >= 0; a number or schedule.
        base_width: the width of the proxy: the size of its axis ``D``; or sizes by letter, ``{"D": 256, "F": 688}``;
            or its parameters, arrays or ``jax.ShapeDtypeStruct``.
        law: how learning rate and decay follow the width, `width.law`. The default is the rule of the paper for Adam.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`. With the coupling
            ``couplings.independent()`` the link stands last in the chain, and its multiplier is m^(s-r). A learning
            rate in a coupling is that of the proxy.

    Raises:
        ValueError: as in `decay`; something that is not a law; an unknown letter or a size that is not positive; at
            ``init``, parameters without axes or without a base size.

    >>> import optax, optax_decay
    >>> axes = ((r"up", "D -> F"), (r"norm", "D"))
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(),
    ...     optax_decay.width_scaled_decay(0.1, base_width=256, axes=axes),
    ...     optax_decay.width_scaled_learning_rate(base_width=256, axes=axes),
    ...     optax.scale_by_learning_rate(3e-3),
    ... )
    """
    if options.get("axes") is None:
        options["axes"] = axes_lib.inferred
    plan = width_plan(base_width, law, options["axes"])
    applied = _stands_last(options)
    width = _from_signatures(lambda signatures: plan.decays(signatures, applied))
    passed = times(width, options)
    if passed.get("mask") is None and isinstance(law.vectors, float) and law.vectors == 0:
        # The same as multiplying by 0, without a pass over the embeddings where λ is a schedule.
        passed["mask"] = plan.roles
    return decay(weight_decay, **passed)


def width_scaled_learning_rate(
    base_width: BaseWidth,
    *,
    law: WidthLaw = laws.law(),
    axes: axes_lib.Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of matrices by ``m^-r`` and leaves the others as they are. Has no state.

    Args:
        base_width, law, axes: as in `width_scaled_decay`. Of the law, r decides.

    Raises:
        ValueError: as in `width_scaled_decay`.
    """
    plan = width_plan(base_width, law, axes)
    axes = axes_lib.inferred if axes is None else axes
    rates_of = once_per_structure(lambda params: plan.rates(axes_lib.signatures(axes, params)))

    def init(params: optax.Params) -> optax.EmptyState:
        rates_of(params)  # raises for unknown sizes before the first step
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        del extra
        rates = rates_of(updates if params is None else params)

        def scale(key: tuple[Any, ...], u: jax.Array) -> jax.Array:
            rate = rates[path_string(key)]
            if isinstance(rate, float) and rate == 1.0:
                return u
            # A bfloat16 product would round the multiplier too.
            return (u.astype(jnp.promote_types(u.dtype, jnp.float32)) * rate).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _stands_last(options: DecayOptions) -> bool:
    """Whether the coupling among the options puts the decay after the learning rate."""
    coupling = options.get("coupling", couplings.learning_rate())
    check_coupling(coupling)
    return coupling.after_rate


def _rates(
    base_width: BaseWidth, options: WidthOptions | MupOptions
) -> optax.GradientTransformationExtraArgs:
    """`width_scaled_learning_rate` with those of a decay's options that it shares."""
    shared: Any = {name: options[name] for name in ("law", "axes") if name in options}
    return width_scaled_learning_rate(base_width, **shared)


@passes_options_to(width_scaled_decay)
def width_scaling(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    base_width: BaseWidth = None,
    **options: Unpack[WidthOptions],
) -> optax.GradientTransformationExtraArgs:
    """`width_scaled_decay` and `width_scaled_learning_rate` as one link, before ``scale_by_learning_rate``.

    It can replace the decay in any chain, and the number that is the ``weight_decay`` of this library's optimizers:
    ``conda(1e-3, weight_decay=width_scaling(0.1, 256, law=width.law(optimizer="conda"), axes=axes), axes=axes)``.

    Args:
        weight_decay, base_width: as in `width_scaled_decay`.
        options: law, as in `width_scaled_decay`; and pull, multiplier, cautious, mask, axes, coupling, metrics, as in
            `decay`.

    Raises:
        ValueError: as in `width_scaled_decay`; or the coupling ``couplings.independent()``, whose two links stand on
            either side of the learning rate.
    """
    if _stands_last(options):
        raise ValueError(
            "the coupling independent decays after the learning rate: chain width_scaled_learning_rate, "
            "scale_by_learning_rate and width_scaled_decay(coupling=couplings.independent())."
        )
    link = width_scaled_decay(weight_decay, base_width, **options)
    return optax.chain(link, _rates(base_width, options))


@passes_options_to(width_scaled_decay)
def mup_adamw(
    learning_rate: optax.ScalarOrSchedule,
    base_width: BaseWidth,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    nesterov: bool = False,
    mask: masks.Mask = masks.MATRICES,
    **options: Unpack[MupOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamW under μP with a decay that follows the width: takes η and λ of the proxy at any width.

    At the base width it is AdamW that decays what the law and `mask` say: hidden matrices, by default.

    Args:
        learning_rate: η of the proxy, a number or schedule.
        base_width: as in `width_scaled_decay`.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as in ``optax.adam``.
        weight_decay: λ of the proxy, dimensionless, >= 0; a number or schedule.
        mask: as in `decay`. Default: hidden matrices and the head, which decays only if the law counts it as a matrix
            or is that of the rule ``"mup_package"``. None leaves it to the law.
        options: law, as in `width_scaled_decay`; and pull, multiplier, cautious, axes, coupling, metrics, as in
            `decay`. The chain has the right order for each coupling.

    Raises:
        ValueError: as in `width_scaled_decay`.

    >>> import optax_decay
    >>> axes = ((r"embed", "V -> D"), (r"up", "D -> F"), (r"norm", "D"))
    >>> tx = optax_decay.mup_adamw(3e-3, base_width=256, b2=0.95, weight_decay=0.1, axes=axes)
    """
    link = width_scaled_decay(weight_decay, base_width, mask=mask, **options)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    rates = _rates(base_width, options)
    return in_order(options, adam, link, rates, scale_by_learning_rate(learning_rate))
