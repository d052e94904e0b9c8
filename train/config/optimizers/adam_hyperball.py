"""AdamH: Adam with fixed norms (Hyperball, arXiv 2606.16899)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax

from train.config.parts.sphere import Sphere
from train.config.ranges import Momentum, Positive
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class AdamHyperball:
    """AdamH: Adam's direction, but matrices keep their norms; the learning rate is the angle of a step."""

    name: ClassVar[str] = "adam_hyperball"
    growth: ClassVar[str] = "muon"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    sphere: Annotated[Sphere, INLINE] = dataclasses.field(default_factory=Sphere)

    def build(self, setting: Setting) -> Any:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)

    def build_last(self, setting: Setting) -> Any:
        return self.sphere.build(setting)
