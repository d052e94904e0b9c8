"""Huber decay: AdamHD (arXiv 2511.14721)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Form, Strength
from train.config.parts.thresholds import Mean, Threshold
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class Huber:
    """Pulls a weight w by w clipped at plus and minus the threshold (AdamHD)."""

    name: ClassVar[str] = "huber"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    threshold: Threshold = dataclasses.field(default_factory=Mean)
    """Where the pull stops growing."""
    form: Form = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update; proximal: implicit, after it."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        pull = optax_decay.pulls.huber(self.threshold.as_threshold())
        return self.strength.build(pull, self.form, setting)
