"""L2 decay: that of AdamW."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Form, Strength
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class L2:
    """Pulls a weight w by w itself, as AdamW does."""

    name: ClassVar[str] = "l2"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    form: Form = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update; proximal: implicit, after it."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        return self.strength.build(optax_decay.l2(), self.form, setting)
