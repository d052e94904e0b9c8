"""Shapes of the learning rate: a linear climb, then the shape, then the last rate for good.

With η the peak, w the warm-up, T the length of the schedule and f the final share, step t = 0, 1, ... has

    η · min(1, (t + 1)/(w + 1)) · shape(min(1, max(0, t - w)/(T - w)))

One more than the step, so that no step is wasted on a rate of zero. optax's schedules are not used: they give these
rates to 2e-7 of the peak, but not to the last bit (`optax.linear_schedule` subtracts the climb from its end, which
leaves the first of 2000 rates off by a thousand roundings; tests/train/config/test_schedules.py measures it).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp

from train.config.ranges import Count, Range, Share, Whole
from train.errors import UserError

Rate = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to the final rate."""

    name: ClassVar[str] = "cosine"

    steps: Literal["run"] | Count = "run"
    """Its end [steps]; the rate then stays. run: run.steps."""
    warmup_steps: Literal["tenth"] | Whole = "tenth"
    """Climb [steps]. tenth: of the schedule, at most 2000."""
    final: Share = 0.1
    """Learning rate at the end, as a share of its peak."""

    def build(self, peak: float) -> Rate:
        def shape(done: Any) -> Any:
            return self.final + (1 - self.final) * (1 + jnp.cos(jnp.pi * done)) / 2

        return _climb_and(shape, peak, number(self.warmup_steps), number(self.steps))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A straight line from the peak to the final rate."""

    name: ClassVar[str] = "linear"

    steps: Literal["run"] | Count = "run"
    """Its end [steps]; the rate then stays. run: run.steps."""
    warmup_steps: Literal["tenth"] | Whole = "tenth"
    """Climb [steps]. tenth: of the schedule, at most 2000."""
    final: Share = 0.1
    """Learning rate at the end, as a share of its peak."""

    def build(self, peak: float) -> Rate:
        def shape(done: Any) -> Any:
            return self.final + (1 - self.final) * (1 - done)

        return _climb_and(shape, peak, number(self.warmup_steps), number(self.steps))


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak for good."""

    name: ClassVar[str] = "constant"

    warmup_steps: Literal["tenth"] | Whole = "tenth"
    """Climb to the peak [steps]. tenth: a tenth of run.steps, at most 2000."""

    def build(self, peak: float) -> Rate:
        return _climb_and(lambda done: 1.0, peak, number(self.warmup_steps), 0)


@dataclasses.dataclass(frozen=True)
class Trapezoid:
    """The peak, and at the end of the schedule a straight line to the final rate."""

    name: ClassVar[str] = "trapezoid"

    steps: Literal["run"] | Count = "run"
    """Its end [steps]; the rate then stays. run: run.steps."""
    warmup_steps: Literal["tenth"] | Whole = "tenth"
    """Climb [steps]. tenth: of the schedule, at most 2000."""
    fall: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Share of the schedule in which the rate falls."""
    final: Share = 0.1
    """Learning rate at the end, as a share of its peak."""

    def build(self, peak: float) -> Rate:
        warmup, steps = number(self.warmup_steps), number(self.steps)
        fall = min(
            1.0, self.fall * steps / max(1, steps - warmup)
        )  # share of what the climb leaves

        def shape(done: Any) -> Any:
            return self.final + (1 - self.final) * jnp.minimum(1.0, (1 - done) / fall)

        return _climb_and(shape, peak, warmup, steps)


Schedule = Cosine | Linear | Trapezoid | Constant


def _climb_and(shape: Rate, peak: float, warmup: int, steps: int) -> Rate:
    rest = max(1, steps - warmup)

    def rate(step: Any) -> Any:
        climb = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        return peak * climb * shape(done)

    return rate


def length(schedule: Schedule, run_steps: int) -> int:
    """Steps that warm-ups and phases are shares of."""
    steps = getattr(schedule, "steps", "run")
    return run_steps if steps == "run" else number(steps)


def derived(schedule: Schedule, run_steps: int) -> Schedule:
    """The schedule with numbers in place of `run` and `tenth`."""
    steps, numbers = length(schedule, run_steps), {}
    if not isinstance(schedule, Constant):
        numbers["steps"] = steps
    if schedule.warmup_steps == "tenth":
        numbers["warmup_steps"] = min(steps // 10, 2000)
    return dataclasses.replace(schedule, **numbers)


def check(schedule: Schedule) -> None:
    """Raises UserError for a derived schedule that ends before its warm-up does."""
    if isinstance(schedule, Constant):
        return
    steps, warmup = number(schedule.steps), number(schedule.warmup_steps)
    if warmup > steps:
        raise UserError(
            f"optimizer.schedule.warmup_steps = {warmup} is longer than the schedule;"
            f" allowed is 0 to {steps} steps, nearest: {steps}."
        )


def number(value: Any) -> int:
    """A number of steps; a name that stands for one has to be derived first (train/config/derived.py)."""
    if isinstance(value, str):
        raise TypeError(f"{value!r} stands for a number of steps: call train.config.derived first")
    return int(value)
