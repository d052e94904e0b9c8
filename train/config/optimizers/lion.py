"""Lion (arXiv 2302.06675)."""

import dataclasses
from typing import Any, ClassVar

import optax

from train.config.ranges import Momentum
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Lion:
    """Lion: the sign of a momentum. Its learning rates are 3 to 10 times smaller than Adam's."""

    name: ClassVar[str] = "lion"
    growth: ClassVar[str] = "lion"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the momentum in the step; the rest is of the gradient."""
    b2: Momentum = 0.95
    """Share of the momentum that is kept per step."""

    def build(self, setting: Setting) -> Any:
        return optax.scale_by_lion(self.b1, self.b2)
