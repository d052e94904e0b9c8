"""Radial brake (Emerging-Optimizers; records of modded-nanogpt)."""

import dataclasses
from typing import Any, ClassVar, Literal

import optax

import optax_decay
from train.config.parts.strength import Role
from train.config.ranges import NotNegative, Share
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class RadialBrake:
    """Takes away a share of every growth of a matrix's norm, and decays as AdamW does."""

    name: ClassVar[str] = "radial_brake"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False
    last: ClassVar[bool] = False

    outward: Share = 0.5
    """Share of a change of norm that is kept where the norm grows."""
    inward: Share = 1.0
    """The same where it shrinks, by the decay too."""
    rule: Literal["norm", "first_order"] = "norm"
    """norm: of the norm itself; first_order: of the step's part along the weights, without growth of second order."""
    per: Literal["matrix", "layer", "leaf", "output"] = "matrix"
    """What has one norm: a matrix, all matrices of a layer, a whole stack, or the inputs of one output."""
    braked: tuple[Role, ...] = ("hidden",)
    """Roles of parameters that are braked; they must be matrices."""
    weight_decay: NotNegative = 0.1
    """Coefficient of the decay; shrink per step: times the learning rate."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that decay."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.decay(
            self.weight_decay, mask=self.mask, axes=setting.axes, metrics=setting.metrics
        )

    def build_rate(self, setting: Setting) -> Any:
        """The learning rate, and the brake behind it."""
        brake = optax_decay.radial_brake(
            self.outward,
            self.inward,
            rule=self.rule,
            per=self.per,
            mask=self.braked,
            axes=setting.axes,
        )
        return optax.chain(optax.scale_by_learning_rate(setting.rate), brake)
