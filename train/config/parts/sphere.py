"""Matrices that keep their norm: which ones, and what shares a norm."""

import dataclasses
from typing import Any, Literal

import optax_decay
from train.config.parts.strength import Role
from train.config.ranges import NotNegative, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Sphere:
    """The norm of each matrix stays what it is at the start, and the learning rate is the angle of a step."""

    sphere: tuple[Role, ...] = ("hidden",)
    """Roles of parameters that keep their norm; hidden, or hidden and head."""
    per: Literal["matrix", "layer", "leaf", "output"] = "matrix"
    """What has one norm: a matrix, all matrices of a layer, a whole stack, or the inputs of one output."""
    radius: Positive | None = None
    """Root of the mean square of the weights that is kept; None: that of the initial weights."""
    min_direction: NotNegative = 0.0
    """RMS of a step before the learning rate, up to which a matrix rests."""

    angle: Positive = 1.0
    """Angle of a step over the learning rate; other parameters have the learning rate itself."""

    def build(self, setting: Setting) -> Any:
        """The link behind the learning rate."""
        return optax_decay.hyperball(
            learning_rate=lambda count: self.angle * setting.rate(count),
            radius=self.radius,
            per=self.per,
            min_direction=self.min_direction,
            mask=self.sphere,
            axes=setting.axes,
        )
