"""EXAdam (arXiv 2412.20302)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Exadam:
    """EXAdam: Adam with debiasing terms that couple the moments. Its steps are 2 to 5 times Adam's."""

    name: ClassVar[str] = "exadam"
    growth: ClassVar[str] = "adam"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment that is kept per step."""
    eps: Positive = 1e-8
    """Added to both moments and to the denominator."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_exadam(self.b1, self.b2, self.eps)
