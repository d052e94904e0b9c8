"""Adam (arXiv 1412.6980)."""

import dataclasses
from typing import Any, ClassVar

import optax

from train.config.ranges import Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam. With the decay huber it is AdamHD, with l2 AdamW."""

    name: ClassVar[str] = "adam"
    growth: ClassVar[str] = "adam"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = True
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""

    def build(self, setting: Setting) -> Any:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)
