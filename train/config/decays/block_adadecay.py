"""AdaDecay with one factor per matrix."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import Count, Positive
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class BlockAdaDecay:
    """Decays each hidden matrix by a sigmoid of its gradient's norm among those of its block."""

    name: ClassVar[str] = "block_adadecay"
    gradients: ClassVar[bool] = True
    multipliers: ClassVar[bool] = True

    refresh_every: Count = 500
    """Between two measurements [steps]."""
    sharpness: Positive = 4.0
    """Slope of the sigmoid [1 over a standard deviation of the norms]."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        options = self.strength.options(setting, cautious=self.form == "cautious")
        return optax_decay.block_adadecay(
            self.strength.rate, self.refresh_every, self.sharpness, **options
        )
