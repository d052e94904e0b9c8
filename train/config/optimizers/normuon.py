"""NorMuon (arXiv 2510.05491)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.orthogonal import Orthogonal
from train.config.parts.shape_scales import LargerSide, ShapeScale
from train.config.ranges import Momentum
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Normuon:
    """NorMuon: Muon whose outputs get steps of equal size."""

    name: ClassVar[str] = "normuon"
    growth: ClassVar[str] = "muon"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    orthogonal: Annotated[Orthogonal, INLINE] = dataclasses.field(default_factory=Orthogonal)
    shape_scale: ShapeScale = dataclasses.field(default_factory=LargerSide)
    """By how much a step is multiplied, given the shape of its matrix."""
    output_memory: Momentum = 0.95
    """Share of the mean square of an output's steps that is kept per step."""

    @property
    def b1(self) -> float:
        return self.orthogonal.b1

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_normuon(
            shape_scale=self.shape_scale.as_scale(),
            output_memory=self.output_memory,
            **self.orthogonal.options(setting),
        )
