"""ROOT (arXiv 2511.20626)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Root:
    """ROOT: an orthogonalised momentum without outliers for matrices, Adam for everything else."""

    name: ClassVar[str] = "root"
    growth: ClassVar[str] = "root"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    momentum: Momentum = 0.95
    """Share of the momentum of matrices that is kept per step."""
    b1: Momentum = 0.9
    """Share of the first moment of Adam that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment of Adam that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment of Adam."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_root(
            self.momentum, b1=self.b1, b2=self.b2, eps=self.eps, axes=setting.axes
        )
