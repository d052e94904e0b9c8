"""Where the pull of a decay stops growing: δ, one number per matrix, in the unit of the weights."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import Momentum, Positive


@dataclasses.dataclass(frozen=True)
class Mean:
    """`factor` times the mean of |w| in a matrix."""

    name: ClassVar[str] = "mean"

    factor: Positive = 1.5
    """Threshold over the mean of |w|."""

    def as_threshold(self) -> Any:
        return optax_decay.thresholds.mean_size(self.factor)


@dataclasses.dataclass(frozen=True)
class Rms:
    """`factor` times the root of the mean square of a matrix."""

    name: ClassVar[str] = "rms"

    factor: Positive = 1.5
    """Threshold over the root of the mean square."""

    def as_threshold(self) -> Any:
        return optax_decay.thresholds.rms_size(self.factor)


@dataclasses.dataclass(frozen=True)
class RunningMean:
    """`factor` times a running mean of the mean of |w| in a matrix."""

    name: ClassVar[str] = "running_mean"

    factor: Positive = 1.5
    """Threshold over the running mean."""
    memory: Momentum = 0.99
    """Share of the running mean that is kept per step."""

    def as_threshold(self) -> Any:
        return optax_decay.thresholds.running_mean_size(self.factor, self.memory)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """One number for all matrices; `--decay.threshold 0.05` picks it."""

    name: ClassVar[str] = "fixed"
    written_as: ClassVar[str] = "value"

    value: Positive = 0.05
    """The threshold [unit of the weights]."""

    def as_threshold(self) -> Any:
        return self.value


Threshold = Mean | Rms | RunningMean | Fixed
