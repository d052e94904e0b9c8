"""AWD: adaptive weight decay (arXiv 2210.00094)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.ranges import Momentum
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Awd:
    """Decays in proportion to the norm of the gradient over that of the weights (AWD)."""

    name: ClassVar[str] = "awd"
    gradients: ClassVar[bool] = True
    multipliers: ClassVar[bool] = True

    memory: Momentum = 0.1
    """Share of the running mean of that ratio that is kept per step."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        options = self.strength.options(setting, cautious=self.form == "cautious")
        return optax_decay.awd_decay(self.strength.rate, memory=self.memory, **options)
