"""pAdam's step: p-norm decay as a proximal map."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import optax_decay
from train.config.parts.strength import Strength
from train.config.ranges import Range
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class LpProximal:
    """Shrinks a weight by the implicit step of the penalty |w|^p, for p up to 2 (pAdam)."""

    name: ClassVar[str] = "lp_proximal"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True
    last: ClassVar[bool] = True

    p: Annotated[float, Range(0, 2, above=True)] = 0.8
    """Exponent of the penalty |w|^p; its coefficient is weight_decay [weight^(2-p)]."""
    linearize_at: Literal["old", "new"] = "old"
    """Weight at which the penalty is linearised: before the update, or after it."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(
        default_factory=lambda: Strength(weight_decay=1e-3)
    )

    def build(self, setting: Setting) -> Any:
        pull = optax_decay.lp(self.p, self.linearize_at)
        return self.strength.build(pull, "proximal", setting)
