"""The one place where a field's value follows from another field.

A field that follows from others has a name for that as its default, such as "tenth" for a warm-up of a tenth of the
schedule. When a config is made from a command line, `derived` puts numbers in place of these names:

    optimizer.schedule.steps          run         run.steps
    optimizer.schedule.warmup_steps   tenth       a tenth of the schedule, at most 2000
    optimizer.freeze                  fifth       a fifth of the schedule, at least the warm-up    (one_bit_adam)
    decay.bound.steps                 twice       twice the warm-up                                (cpr)

    decay.weight_decay            from decay.timescale, if that is given: B/(r T), with B the data of a step, T the
                                  timescale, and r the peak of the learning rate, or 1 where the coupling leaves it out

config.json holds the numbers: a run that is prolonged with run.steps keeps its schedule.
"""

import dataclasses
from typing import Any

import optax_decay
from train.config import tree
from train.config.fields import Config
from train.config.parts import schedules
from train.errors import UserError


def derived(config: Config) -> Config:
    """The config with a number in place of every name that stands for one."""
    schedule = schedules.derived(config.optimizer.schedule, config.run.steps)
    config = tree.replace(config, {"optimizer.schedule": schedule})
    steps = schedules.length(schedule, config.run.steps)
    return _with_timescale(_derived(config, steps, schedules.number(schedule.warmup_steps)))


def with_timescale_alone(config: Config, start: Config) -> Config:
    """Without the weight_decay that a config had from its start, such as a named experiment, if it has a timescale."""
    values, own = tree.flatten(config), tree.flatten(start)
    name = "decay.weight_decay"
    if values.get("decay.timescale") is None or values[name] != own.get(name):
        return config
    return tree.replace(config, {name: tree.flatten(type(config.decay)())["weight_decay"]})


# Decays that shrink a small weight by a fixed share in every step.
FADING = ("l2", "huber", "pseudo_huber", "log_cosh", "fair")


def _with_timescale(config: Config) -> Config:
    """The config with the weight_decay that its timescale stands for.

    Raises:
        UserError: another weight_decay is given as well, or the decay has no timescale.
    """
    values, untouched = tree.flatten(config.decay), tree.flatten(type(config.decay)())
    if (timescale := values.get("timescale")) is None:
        return config
    given = f"decay.timescale = {timescale:g}"
    if config.decay.name not in FADING or values["schedule.name"] == "log_time":
        what = f"decay.name {config.decay.name}"
        if config.decay.name in FADING:
            what = "decay.schedule log_time"
        raise UserError(
            f"{given} does not go with {what}, under which weights do not fade by a fixed share; allowed are decay.name"
            f" {', '.join(FADING)}, with the other schedules. Nearest: set decay.weight_decay instead."
        )
    from train.step import families  # here, because it imports all models: --help does without

    length = config.data.length if families.task(config.model.preset) == "language" else 1
    with_rate = values["coupling"] in ("learning_rate", "corrected")
    try:
        found = optax_decay.schedules.weight_decay_of(
            1.0,
            learning_rate=config.optimizer.learning_rate if with_rate else 1.0,
            tokens=timescale,
            tokens_per_step=config.data.batch_size * length,
        )
    except ValueError:  # a number that is out of its range, which the checks name
        return config
    if values["weight_decay"] not in (untouched["weight_decay"], found):
        raise UserError(
            f"{given} stands for decay.weight_decay = {found:.4g} here, but decay.weight_decay ="
            f" {values['weight_decay']:g} is given as well; nearest: leave one of the two out."
        )
    if found * (config.optimizer.learning_rate if with_rate else 1.0) >= 1:
        raise UserError(
            f"{given} is less than the data of one step, {config.data.batch_size * length}, so that a step would turn"
            f" weights around; nearest: {2 * config.data.batch_size * length}."
        )
    return tree.replace(config, {"decay.weight_decay": found})


def _derived(node: Any, steps: int, warmup_steps: int) -> Any:
    if hasattr(node, "derived"):
        node = node.derived(steps, warmup_steps)
    inside = {
        slot.field.name: _derived(getattr(node, slot.field.name), steps, warmup_steps)
        for slot in tree.slots(type(node))
        if slot.classes and getattr(node, slot.field.name) is not None
    }
    return dataclasses.replace(node, **inside) if inside else node
