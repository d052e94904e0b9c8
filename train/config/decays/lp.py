"""p-norm decay with an explicit pull."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import Range
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Lp:
    """Pulls a weight w by p |w|^(p-1), for p from 1 to 2; lp_proximal is for smaller p."""

    name: ClassVar[str] = "lp"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    p: Annotated[float, Range(1, 2)] = 1.5
    """Exponent of the penalty |w|^p; its coefficient is weight_decay [weight^(2-p)]."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(
        default_factory=lambda: Strength(weight_decay=1e-3)
    )

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        return self.strength.build(optax_decay.lp(self.p), self.form, setting)
