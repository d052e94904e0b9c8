"""How the coefficient of a decay changes over the run, beside what its coupling makes of the learning rate.

A coefficient proportional to the learning rate r, so that a step shrinks weights by r*r, is the coupling `corrected`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import optax_decay
from train.config.parts.schedules import number
from train.config.ranges import Count

Length = Literal["run"] | Count


@dataclasses.dataclass(frozen=True)
class Steady:
    """The coefficient as it is."""

    name: ClassVar[str] = "constant"

    def over_time(self, weight_decay: Any) -> Any:
        return weight_decay


@dataclasses.dataclass(frozen=True)
class ToZero:
    """Falls to zero over the run (nanochat)."""

    name: ClassVar[str] = "to_zero"

    steps: Length = "run"
    """Where it is zero [steps]. run: where the schedule of the learning rate ends."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Half a cosine, or a straight line."""

    def derived(self, steps: int, warmup_steps: int) -> "ToZero":
        return dataclasses.replace(self, steps=steps) if self.steps == "run" else self

    def over_time(self, weight_decay: Any) -> Any:
        return optax_decay.schedules.to_zero(weight_decay, number(self.steps), self.shape)


@dataclasses.dataclass(frozen=True)
class LogTime:
    """weight_decay/(T/10 + t + 1) in step t of T, with the coupling schedule (ADANA, whose weight_decay is 4)."""

    name: ClassVar[str] = "log_time"

    steps: Length = "run"
    """T [steps]. run: where the schedule of the learning rate ends."""

    def derived(self, steps: int, warmup_steps: int) -> "LogTime":
        return dataclasses.replace(self, steps=steps) if self.steps == "run" else self

    def over_time(self, weight_decay: Any) -> Any:
        return optax_decay.schedules.log_time(number(self.steps), weight_decay)


@dataclasses.dataclass(frozen=True)
class HoldDropRamp:
    """0.8 of the coefficient, then a fall to 0.1, then a rise to 0.93 of it: for runs of many epochs (slowrun)."""

    name: ClassVar[str] = "hold_drop_ramp"

    steps: Length = "run"
    """Where the rise ends [steps]. run: where the schedule of the learning rate ends."""

    def derived(self, steps: int, warmup_steps: int) -> "HoldDropRamp":
        return dataclasses.replace(self, steps=steps) if self.steps == "run" else self

    def over_time(self, weight_decay: Any) -> Any:
        return optax_decay.schedules.hold_drop_ramp(weight_decay, number(self.steps))


DecaySchedule = Steady | ToZero | LogTime | HoldDropRamp
