"""Conda (arXiv 2509.24218)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import Count, Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Conda:
    """Conda: Adam in a basis of each matrix's momentum. Its learning rates are about ten times Adam's."""

    name: ClassVar[str] = "conda"
    growth: ClassVar[str] = "conda"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    refresh_every: Count = 2000
    """Between two bases [steps]."""
    scale: Positive = 0.25
    """Step of matrices over that of everything else, which Adam updates."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_conda(
            self.b1,
            self.b2,
            self.eps,
            refresh_every=self.refresh_every,
            scale=self.scale,
            axes=setting.axes,
        )
