"""Decay towards the initial weights: L2-SP (arXiv 1802.01483)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.parts.strength import Coupling, Explicit, Role, coupling
from train.config.ranges import NotNegative
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class TowardInitial:
    """Pulls a weight towards its initial value instead of towards zero (L2-SP). Keeps a copy of the initial weights."""

    name: ClassVar[str] = "toward_initial"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False

    weight_decay: NotNegative = 0.1
    """Coefficient; the coupling says what multiplies it."""
    coupling: Coupling = "learning_rate"
    """Shrink per step, with r the learning rate: weight_decay times r, r/peak, r*r/peak, or 1."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that are pulled."""

    @property
    def last(self) -> bool:
        return self.coupling == "independent"

    def build(self, setting: Setting) -> Any:
        return optax_decay.toward_initial_decay(
            self.weight_decay,
            cautious=self.form == "cautious",
            mask=self.mask,
            axes=setting.axes,
            coupling=coupling(self.coupling, setting.rate, setting.peak),
        )
