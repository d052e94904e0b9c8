"""The optimizer of a config, as a chain of four named links:

    clip → direction → decay → rate

inside of `skip_on_spike`, which leaves out steps on NaN, infinities and, with a spike_sigma, spikes.
`direction` turns gradients into steps of unit size, `decay` is the product of `optax_decay.decay`,
`rate` multiplies by -η_t. With a `model.base_width` a link `width` before `rate` makes the learning
rate of matrices follow the width, and the decay follows by its rule. A new optimizer is one case of
`direction`, a new pull one of `pull`. Links have names, so that the state of each can be found in a
checkpoint whatever stands beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_decay
from optax_decay.product.masks import MATRICES
from optax_decay.width.laws import OPTIMIZERS
from train.config.fields import Config, Decay, Optimizer
from train.step import replicas


def build(config: Config, axes: Any, params: Any = None) -> optax.GradientTransformationExtraArgs:
    """The transformation of a resolved config, for parameters described by `axes`; `params` as in `chain`."""
    sigma, window = config.optimizer.spike_sigma, config.optimizer.spike_window or 128
    return optax_decay.skip_on_spike(chain(config, axes, params=params), sigma=sigma, window=window)


def chain(
    config: Config, axes: Any, metrics: bool = False, params: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The links alone; their state is the `inner_state` of that of `build`.

    With `metrics` the state of the decay tells what it did (`optax_decay.Metrics`), and on a CPU an
    update takes twice as long: for `observe.py`, not for the step. `params` are the parameters' shardings, which
    one_bit_adam has to know, and by which AlphaDecay shares its matrices over devices.
    """
    rate = schedule(config.optimizer)
    links = [] if config.optimizer.clip is None else [("clip", clip(config.optimizer.clip))]
    links.append(("direction", direction(config.optimizer, axes, params)))
    rates = [("rate", optax.scale_by_learning_rate(rate))]
    if config.model.base_width is not None:
        rates.insert(0, ("width", width(config, axes)))
    shrink = [("decay", decay(config, rate, axes, metrics, params))]
    last = [*rates, *shrink] if on_the_finished_step(config.decay) else [*shrink, *rates]
    return optax.named_chain(*links, *last)


def on_the_finished_step(config: Decay) -> bool:
    """Whether the decay stands last in the chain, behind the learning rate."""
    return config.coupling == "none" or config.proximal


def direction(config: Optimizer, axes: Any, params: Any = None) -> optax.GradientTransformation:
    b1, b2, eps, every = config.b1, config.b2, config.eps or 0.0, config.refresh_every or 1
    match config.name:
        case "adam":
            return optax.scale_by_adam(b1, b2, eps)
        case "nadam":
            return optax.scale_by_adam(b1, b2, eps, nesterov=True)
        case "lion":
            return optax.scale_by_lion(b1, b2)
        case "exadam":
            return optax_decay.scale_by_exadam(b1, b2, eps)
        case "conda":
            scale = config.scale or 0.0
            return optax_decay.scale_by_conda(
                b1, b2, eps, refresh_every=every, scale=scale, axes=axes
            )
        case "root":
            return optax_decay.scale_by_root(
                config.momentum or 0.0, b1=b1, b2=b2, eps=eps, axes=axes
            )
        case "sophia":
            gamma = config.gamma or 0.0
            return optax_decay.scale_by_sophia(b1, b2, eps, gamma, update_interval=every)
        case "one_bit_adam":
            return one_bit(config, axes, params)


def one_bit(config: Optimizer, axes: Any, params: Any) -> optax.GradientTransformation:
    """1-bit Adam over the replicas, which have hidden matrices and the head in common as signs."""
    freeze = config.freeze or 1
    if freeze == "settled":
        freeze = optax_decay.VarianceCriterion(min_steps=max(1, config.warmup_steps or 0))
    return optax_decay.scale_by_one_bit_adam(
        replicas.AXIS,
        freeze,
        config.b1,
        config.b2,
        config.eps or 0.0,
        layout=config.layout or "joined",
        compress=MATRICES,
        axes=axes,
        param_specs=None if params is None else replicas.parameter_specs(params),
        mesh=None if params is None else jax.tree.leaves(params)[0].mesh,
        bias_correction=bool(config.bias_correction),
        largest_direction=config.largest_direction,
    )


def pull(config: Decay) -> optax_decay.Pull:
    bound = (config.threshold, config.factor or 1.0, config.memory or 0.0)
    match config.pull:
        case "l2":
            return optax_decay.l2()
        case "l1":
            return optax_decay.l1()
        case "huber":
            return optax_decay.huber(*bound)
        case "pseudo_huber":
            return optax_decay.pseudo_huber(*bound)
        case "log_cosh":
            return optax_decay.log_cosh(*bound)
        case "fair":
            return optax_decay.fair(*bound)


def decay(
    config: Config, rate: Any, axes: Any, metrics: bool, params: Any
) -> optax.GradientTransformation:
    shared = {
        "pull": pull(config.decay),
        "mask": config.decay.mask,
        "axes": axes,
        "coupling": config.decay.coupling,
        "peak_learning_rate": config.optimizer.learning_rate,
        "multiplier": multipliers(config, axes, params),
        "metrics": metrics,
    }
    if config.decay.proximal:
        return optax_decay.proximal_decay(rate, config.decay.weight_decay, **shared)
    return optax_decay.decay(
        config.decay.weight_decay,
        cautious=config.decay.cautious,
        learning_rate=rate,
        **shared,
    )


def multipliers(config: Config, axes: Any, params: Any) -> tuple[optax_decay.Quantity, ...]:
    """What the decay of each matrix is multiplied with."""
    # Replicas that are workers of their own measure on their own: the mesh is not theirs to share matrices over.
    partition = None if replicas.used(config) else params
    found = [width_multiplier(config, axes), spectral(config.decay, partition)]
    return tuple(quantity for quantity in found if quantity is not None)


def spectral(config: Decay, partition: Any = None) -> optax_decay.Quantity | None:
    if config.spectral is None:
        return None
    return optax_decay.spectral_alpha(
        metric=config.spectral,
        min_ratio=config.spectral_low or 0.0,
        max_ratio=config.spectral_high or 0.0,
        refresh_every=config.spectral_every,
        min_eigenvalues=config.spectral_size or 1,
        partition=partition,
    )


def growth(config: Optimizer) -> str:
    """The row of `optax_decay.width_laws.OPTIMIZERS` for a direction."""
    return config.name if config.name in OPTIMIZERS else "adam"


def width(config: Config, axes: Any) -> optax.GradientTransformation:
    return optax_decay.width_scaled_learning_rate(
        config.model.base_width, optimizer=growth(config.optimizer), axes=axes
    )


def width_multiplier(config: Config, axes: Any) -> optax_decay.Quantity | None:
    """What the decay of matrices is multiplied with for the sake of their width."""
    if config.model.base_width is None or config.decay.width_rule is None:
        return None
    law = optax_decay.width_law(config.decay.width_rule, optimizer=growth(config.optimizer))
    # Behind the learning rate nothing multiplies the decay by the learning rate of its matrix.
    exponent = law.decay - law.rate if on_the_finished_step(config.decay) else law.decay
    return optax_decay.width_power(
        config.model.base_width, exponent, vectors=law.vectors, axes=axes
    )


def decay_table(
    config: Config, params: Any, axes: Any, tokens_per_step: int | None = None
) -> optax_decay.DecayTable | optax_decay.WidthTable:
    """What decays and how fast, at the peak of the learning rate."""
    if config.model.base_width is not None:
        return optax_decay.width_table(
            params,
            config.optimizer.learning_rate,
            config.decay.weight_decay,
            config.model.base_width,
            rule=config.decay.width_rule or "fan2025",
            optimizer=growth(config.optimizer),
            mask=config.decay.mask,
            coupling=config.decay.coupling,
            axes=axes,
        )
    return optax_decay.decay_table(
        params,
        config.decay.weight_decay,
        mask=config.decay.mask,
        axes=axes,
        coupling=config.decay.coupling,
        learning_rate=schedule(config.optimizer),
        peak_learning_rate=config.optimizer.learning_rate,
        tokens_per_step=tokens_per_step,
        step=config.optimizer.warmup_steps or 0,
    )


def schedule(config: Optimizer) -> Any:
    """Learning rate of step 0, 1, …: a linear climb, then the shape, then the final rate for good."""
    peak, warmup, final = config.learning_rate, config.warmup_steps or 0, config.final or 0.0
    rest = max(1, (config.schedule_steps or 0) - warmup)

    def rate(step: jax.Array) -> jax.Array:
        # One more than the step, so that no step is wasted on a rate of zero.
        climb = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        match config.schedule:
            case "cosine":
                shape = final + (1 - final) * (1 + jnp.cos(jnp.pi * done)) / 2
            case "linear":
                shape = final + (1 - final) * (1 - done)
            case "constant":
                shape = 1.0
        return peak * climb * shape

    return rate


def clip(longest: float) -> optax.GradientTransformation:
    """Shortens gradients to a global norm of at most `longest`.

    Written as one factor, which fuses into the pass over the weights that follows; optax's form
    selects between two trees and costs the CPU another pass.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, longest / optax.tree.norm(updates))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
