"""The one place where a field's value follows from another field.

A field that follows from others has a name for that as its default, such as "tenth" for a warm-up of a tenth of the
schedule. When a config is made from a command line, `derived` puts numbers in place of these names:

    optimizer.schedule.steps          run         run.steps
    optimizer.schedule.warmup_steps   tenth       a tenth of the schedule, at most 2000
    optimizer.freeze                  fifth       a fifth of the schedule, at least the warm-up    (one_bit_adam)
    decay.bound.steps                 twice       twice the warm-up                                (cpr)

config.json holds the numbers: a run that is prolonged with run.steps keeps its schedule.
"""

import dataclasses
from typing import Any

from train.config import tree
from train.config.fields import Config
from train.config.parts import schedules


def derived(config: Config) -> Config:
    """The config with a number in place of every name that stands for one."""
    schedule = schedules.derived(config.optimizer.schedule, config.run.steps)
    config = tree.replace(config, {"optimizer.schedule": schedule})
    steps = schedules.length(schedule, config.run.steps)
    return _derived(config, steps, schedules.number(schedule.warmup_steps))


def _derived(node: Any, steps: int, warmup_steps: int) -> Any:
    if hasattr(node, "derived"):
        node = node.derived(steps, warmup_steps)
    inside = {
        slot.field.name: _derived(getattr(node, slot.field.name), steps, warmup_steps)
        for slot in tree.slots(type(node))
        if slot.classes and getattr(node, slot.field.name) is not None
    }
    return dataclasses.replace(node, **inside) if inside else node
