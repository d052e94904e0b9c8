"""MuonH: Muon with fixed norms (Hyperball, arXiv 2606.16899)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.orthogonal import Orthogonal
from train.config.parts.sphere import Sphere
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class MuonHyperball:
    """MuonH: Muon's direction, but matrices keep their norms; the learning rate is the angle of a step."""

    name: ClassVar[str] = "muon_hyperball"
    growth: ClassVar[str] = "muon"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    orthogonal: Annotated[Orthogonal, INLINE] = dataclasses.field(default_factory=Orthogonal)
    sphere: Annotated[Sphere, INLINE] = dataclasses.field(default_factory=Sphere)

    @property
    def b1(self) -> float:
        return self.orthogonal.b1

    def build(self, setting: Setting) -> Any:
        # The sphere reads the direction alone.
        scale = optax_decay.shape_scales.one()
        return optax_decay.scale_by_muon(shape_scale=scale, **self.orthogonal.options(setting))

    def build_last(self, setting: Setting) -> Any:
        return self.sphere.build(setting)
