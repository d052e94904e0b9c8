"""How strongly a decay acts, and on what: the numbers that most decays have in common."""

import dataclasses
from typing import Any, Literal

import optax_decay
from train.config.parts.spectrum import Spectrum
from train.config.ranges import NotNegative
from train.config.setting import Setting

Role = Literal["hidden", "head", "embedding", "vector"]
Explicit = Literal["explicit", "cautious"]
Form = Literal["explicit", "cautious", "proximal"]


@dataclasses.dataclass(frozen=True)
class Strength:
    """Coefficient, coupling, mask and spectral multiplier of a decay."""

    weight_decay: NotNegative = 0.1
    """Coefficient; the coupling says what multiplies it."""
    coupling: Literal["lr", "schedule", "corrected", "none"] = "lr"
    """Shrink per step, with r the learning rate: weight_decay times r, r/peak, r*r/peak, or 1."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that decay."""
    spectrum: Spectrum | None = None
    """Multiplies the decay of each hidden matrix by a map of its spectrum; None: it does not."""

    def options(self, setting: Setting, cautious: bool = False) -> dict[str, Any]:
        """Arguments that all explicit decays of the library share."""
        return self._shared(setting) | {"learning_rate": setting.rate, "cautious": cautious}

    def _shared(self, setting: Setting) -> dict[str, Any]:
        spectrum = () if self.spectrum is None else (self.spectrum.build(setting.partition),)
        return {
            "mask": self.mask,
            "axes": setting.axes,
            "coupling": self.coupling,
            "peak_learning_rate": setting.peak,
            "multiplier": (*setting.multipliers, *spectrum),
            "metrics": setting.metrics,
        }

    def build(self, pull: Any, form: Form, setting: Setting) -> Any:
        """The link of a pull."""
        if form == "proximal":
            return optax_decay.proximal_decay(
                setting.rate, self.weight_decay, pull=pull, **self._shared(setting)
            )
        options = self.options(setting, cautious=form == "cautious")
        return optax_decay.decay(self.weight_decay, pull=pull, **options)

    def last(self, form: str = "explicit") -> bool:
        """Whether the link stands behind the learning rate."""
        return self.coupling == "none" or form == "proximal"
