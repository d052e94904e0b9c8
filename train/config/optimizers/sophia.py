"""Sophia-G (arXiv 2305.14342)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import Count, Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Sophia:
    """Sophia-G: a momentum divided by the curvature of sampled labels, clipped."""

    name: ClassVar[str] = "sophia"
    growth: ClassVar[str] = "adam"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = True

    b1: Momentum = 0.9
    """Share of the momentum that is kept per step."""
    b2: Momentum = 0.95
    """Share of the curvature that is kept per step."""
    eps: Positive = 1e-15
    """Added to the curvature."""
    refresh_every: Count = 10
    """Between two curvatures [steps]."""
    gamma: Positive = 0.05
    """Curvature times gamma is the momentum at which a step is clipped."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_sophia(
            self.b1, self.b2, self.eps, self.gamma, update_interval=self.refresh_every
        )
