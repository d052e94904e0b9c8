"""Stable weight decay: AdamS (arXiv 2011.11152)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import Momentum
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Stable:
    """Decays in inverse proportion to the size of the gradients; with the optimizer adam it is AdamS."""

    name: ClassVar[str] = "stable"
    gradients: ClassVar[bool] = True
    multipliers: ClassVar[bool] = True

    b2: Momentum = 0.95
    """Share of the mean squared gradient that is kept per step; AdamS takes Adam's b2."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(
        default_factory=lambda: Strength(weight_decay=5e-4)
    )

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        options = self.strength.options(setting, cautious=self.form == "cautious")
        return optax_decay.stable_decay(self.strength.rate, self.b2, **options)
