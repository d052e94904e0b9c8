"""Fixed norms in place of decay (Hyperball, arXiv 2606.16899)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax

import optax_decay
from train.config.parts.sphere import Sphere
from train.config.parts.strength import Role
from train.config.ranges import NotNegative
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Hyperball:
    """Keeps the norms of matrices under any optimizer; the learning rate is the angle of a step. The head decays."""

    name: ClassVar[str] = "hyperball"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False
    last: ClassVar[bool] = False

    weight_decay: NotNegative = 0.1
    """Coefficient of the decay of parameters off the sphere; shrink per step: times the learning rate."""
    mask: tuple[Role, ...] = ("head",)
    """Roles of parameters that decay."""
    sphere: Annotated[Sphere, INLINE] = dataclasses.field(default_factory=Sphere)

    def build(self, setting: Setting) -> Any:
        return optax_decay.decay(
            self.weight_decay, mask=self.mask, axes=setting.axes, metrics=setting.metrics
        )

    def build_rate(self, setting: Setting) -> Any:
        """The learning rate, and the sphere behind it."""
        return optax.chain(optax.scale_by_learning_rate(setting.rate), self.sphere.build(setting))
