"""Pseudo-Huber decay."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Explicit, Strength
from train.config.parts.thresholds import Mean, Threshold
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class PseudoHuber:
    """Pulls a weight w by w/sqrt(1 + (w/threshold)^2): a smooth Huber decay."""

    name: ClassVar[str] = "pseudo_huber"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    threshold: Threshold = dataclasses.field(default_factory=Mean)
    """Where the pull stops growing."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        pull = optax_decay.pulls.pseudo_huber(self.threshold.as_threshold())
        return self.strength.build(pull, self.form, setting)
