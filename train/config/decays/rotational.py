"""Rotational updates: AdamW's equilibrium from the first step on (arXiv 2305.17212)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.parts.strength import Role
from train.config.ranges import Momentum, Positive
from train.config.setting import Setting
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rotational:
    """Rotates hidden matrices by the angle at which AdamW settles, and keeps their norms; the head decays."""

    name: ClassVar[str] = "rotational"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False
    last: ClassVar[bool] = False

    weight_decay: Positive = 0.1
    """Coefficient of the AdamW whose equilibrium is kept."""
    mask: tuple[Role, ...] = ("head",)
    """Roles of parameters that decay as in AdamW; hidden matrices rotate."""
    memory: Momentum = 0.9
    """Share of the mean squared size of a matrix's steps that is kept per step."""
    zero_mean: bool = True
    """Whether the mean of every row is taken out of its steps."""
    per_neuron: bool = True
    """Whether the inputs of each output rotate by themselves, instead of the whole matrix."""

    def check(self, config: Any) -> None:
        direction = config.optimizer.direction
        if not direction.adam:
            raise UserError(
                f"decay.name = rotational turns matrices by an angle that holds for Adam's steps, not for those of"
                f" optimizer.name = {direction.name}; nearest: optimizer.name adam, or decay.name l2."
            )

    def build(self, setting: Setting) -> Any:
        return optax_decay.decay(
            self.weight_decay, mask=self.mask, axes=setting.axes, metrics=setting.metrics
        )

    def build_rate(self, setting: Setting) -> Any:
        """The link in place of the learning rate; the angle assumes Adam's moments, with its b1."""
        return optax_decay.rotational_update(
            setting.rate,
            self.weight_decay,
            setting.b1,
            average=self.memory,
            zero_mean=self.zero_mean,
            per_neuron=self.per_neuron,
            mask="hidden",
            axes=setting.axes,
        )
