"""The optimizer of a config, as a chain of four named links:

    clip → direction → decay → rate

inside of `skip_on_spike`, which leaves out steps on NaN, infinities and, with `optimizer.spikes`, spikes. `direction`
turns gradients into steps of unit size and is built by a class of train/config/optimizers/; `decay` is built by a class
of train/config/decays/; `rate` multiplies by -η_t. Decays that need the finished step stand behind `rate`, and behind
everything a link `sphere` of optimizers that keep norms. With a `width` a link of that name before `rate` makes the
learning rate of matrices follow the width, and the decay follows by its rule. Links have names, so that the state of
each can be found in a checkpoint whatever stands beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_decay
from train.config.fields import Config
from train.config.optimizer import Optimizer
from train.config.parts.schedules import number
from train.config.parts.strength import coupling
from train.config.setting import Setting
from train.config.tree import flatten
from train.step import replicas


def build(config: Config, axes: Any, params: Any = None) -> optax.GradientTransformationExtraArgs:
    """The transformation of a config, for parameters described by `axes`; `params` as in `chain`."""
    links, spikes = chain(config, axes, params=params), config.optimizer.spikes
    if spikes is None:
        return optax_decay.skip_on_spike(links)
    return optax_decay.skip_on_spike(links, sigma=spikes.sigma, window=spikes.window)


def chain(
    config: Config, axes: Any, metrics: bool = False, params: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The links alone; their state is the `inner_state` of that of `build`.

    With `metrics` the state of the decay tells what it did (`optax_decay.states.Metrics`), and on a CPU an
    update takes twice as long: for `observe.py`, not for the step. `params` are the parameters' shardings, which
    one_bit_adam has to know, and by which AlphaDecay shares its matrices over devices.
    """
    around = setting(config, axes, metrics, params)
    links = [] if config.optimizer.clip is None else [("clip", clip(config.optimizer.clip))]
    links.append(("direction", config.optimizer.direction.build(around)))
    rates = [("rate", rate(config, around))]
    if config.width is not None:
        rates.insert(0, ("width", width(config, axes)))
    shrink = [("decay", config.decay.build(around))]
    last = [*rates, *shrink] if config.decay.last else [*shrink, *rates]
    if hasattr(config.optimizer.direction, "build_last"):
        last.append(("sphere", config.optimizer.direction.build_last(around)))
    return optax.named_chain(*links, *last)


def setting(config: Config, axes: Any, metrics: bool = False, params: Any = None) -> Setting:
    """What the links of a config depend on beside their own fields."""
    optimizer = config.optimizer
    multiplier, workers = width_multiplier(config, axes), replicas.used(config)
    split = params if workers else None
    return Setting(
        axes=axes,
        rate=schedule(optimizer),
        peak=optimizer.learning_rate,
        warmup_steps=number(optimizer.schedule.warmup_steps),
        b1=optimizer.direction.b1,
        multipliers=() if multiplier is None else (multiplier,),
        metrics=metrics,
        # Replicas that are workers of their own measure on their own: the mesh is not theirs to share matrices over.
        partition=None if workers else params,
        worker_axis=replicas.AXIS,
        specs=None if split is None else replicas.parameter_specs(split),
        mesh=None if split is None else jax.tree.leaves(split)[0].mesh,
    )


def rate(config: Config, around: Setting) -> optax.GradientTransformation:
    """The learning rate, or what a decay puts in its place."""
    if hasattr(config.decay, "build_rate"):
        return config.decay.build_rate(around)
    return optax.scale_by_learning_rate(around.rate)


def width(config: Config, axes: Any) -> optax.GradientTransformation:
    assert config.width is not None
    return optax_decay.width_scaled_learning_rate(config.width.base, law=law(config), axes=axes)


def law(config: Config) -> optax_decay.width.WidthLaw:
    """How learning rate and decay follow the width."""
    assert config.width is not None
    return optax_decay.width.law(config.width.rule, optimizer=config.optimizer.direction.growth)


def width_multiplier(config: Config, axes: Any) -> optax_decay.PerMatrix | None:
    """What the decay of matrices is multiplied with for the sake of their width."""
    if config.width is None:
        return None
    # Behind the learning rate nothing multiplies the decay by the learning rate of its matrix.
    return optax_decay.multipliers.width_power(
        config.width.base, law(config), rates_applied=config.decay.last, axes=axes
    )


def decay_table(
    config: Config, params: Any, axes: Any, tokens_per_step: int | None = None
) -> optax_decay.DecayTable | optax_decay.width.WidthTable | str:
    """What decays and how fast, at the peak of the learning rate."""
    fields = flatten(config.decay)
    step = number(config.optimizer.schedule.warmup_steps)
    if "weight_decay" not in fields:
        roles = ", ".join(fields["mask"])
        return f"decay {config.decay.name} on the roles {roles}; its state holds how fast"
    rate, peak = schedule(config.optimizer), config.optimizer.learning_rate
    coupled = coupling(fields.get("coupling", "learning_rate"), rate, peak)
    strength: Any = getattr(config.decay, "strength", None)
    coefficient = fields["weight_decay"] if strength is None else strength.rate
    if config.width is not None:
        return optax_decay.width.width_table(
            params,
            peak,
            float(coefficient(step)) if callable(coefficient) else coefficient,
            config.width.base,
            law=law(config),
            mask=fields["mask"],
            coupling=coupled,
            axes=axes,
        )
    return optax_decay.decay_table(
        params,
        coefficient,
        mask=fields["mask"],
        axes=axes,
        coupling=coupled,
        learning_rate=rate,
        tokens_per_step=tokens_per_step,
        step=step,
    )


def fixed_norms(config: Config, params: Any, axes: Any) -> str:
    """Which parameters keep their norms, and what shares one; empty if none do."""
    if not hasattr(config.optimizer.direction, "build_last") and not hasattr(
        config.decay, "build_rate"
    ):
        return ""
    everything: Any = {optax_decay.axes.ROLES: chain(config, axes)}
    table = optax_decay.role_table(params, everything, axes=axes)
    spheres = {row.path: row.sphere for row in table.rows if row.sphere}
    width = max(map(len, spheres), default=0)
    lines = [f"{path.ljust(width)}  one norm per {sphere}" for path, sphere in spheres.items()]
    return "\n".join(["", f"{len(lines)} arrays keep their norms:", *lines]) if lines else ""


def schedule(config: Optimizer) -> Any:
    """Learning rate of step 0, 1, ..."""
    return config.schedule.build(config.learning_rate)


def clip(longest: float) -> optax.GradientTransformation:
    """Shortens gradients to a global norm of at most `longest`.

    Written as one factor, which fuses into the pass over the weights that follows; optax's form
    selects between two trees and costs the CPU another pass.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, longest / optax.tree.norm(updates))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
