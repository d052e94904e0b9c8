"""Decay towards a norm: AdamWN (arXiv 2311.11446)."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import NotNegative
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class TargetNorm:
    """Moves the size of each matrix towards a target, from above and from below (AdamWN)."""

    name: ClassVar[str] = "target_norm"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    target: Literal["initial"] | NotNegative = "initial"
    """Root of the mean square of a matrix [unit of the weights]. initial: its own at the first step."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        target = None if self.target == "initial" else self.target
        options = self.strength.options(setting, cautious=self.form == "cautious")
        return optax_decay.target_norm_decay(self.strength.rate, target, **options)
