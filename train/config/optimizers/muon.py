"""Muon (Jordan et al., 2024; arXiv 2502.16982)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.orthogonal import Orthogonal
from train.config.parts.shape_scales import LargerSide, ShapeScale
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon: an orthogonalised momentum for hidden matrices, Adam for everything else."""

    name: ClassVar[str] = "muon"
    growth: ClassVar[str] = "muon"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    orthogonal: Annotated[Orthogonal, INLINE] = dataclasses.field(default_factory=Orthogonal)
    shape_scale: ShapeScale = dataclasses.field(default_factory=LargerSide)
    """By how much a step is multiplied, given the shape of its matrix."""

    @property
    def b1(self) -> float:
        return self.orthogonal.b1

    def build(self, setting: Setting) -> Any:
        return optax_decay.scale_by_muon(
            shape_scale=self.shape_scale.as_scale(), **self.orthogonal.options(setting)
        )
