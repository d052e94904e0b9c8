"""AdaDecay (arXiv 1907.08931)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import Positive
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class AdaDecay:
    """Decays each weight by a sigmoid of its gradient among those of its matrix (AdaDecay)."""

    name: ClassVar[str] = "adadecay"
    gradients: ClassVar[bool] = True
    multipliers: ClassVar[bool] = True

    sharpness: Positive = 4.0
    """Slope of the sigmoid [1 over a standard deviation of the gradient]."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        options = self.strength.options(setting, cautious=self.form == "cautious")
        return optax_decay.adadecay(self.strength.rate, self.sharpness, **options)
