"""How strongly a decay acts, and on what: the numbers that most decays have in common."""

import dataclasses
from typing import Any, Literal

import optax_decay
from train.config.parts.decay_schedules import DecaySchedule, Steady
from train.config.parts.spectrum import Spectrum
from train.config.ranges import NotNegative, Positive
from train.config.setting import Setting

Role = Literal["hidden", "head", "embedding", "vector"]
Explicit = Literal["explicit", "cautious"]
Form = Literal["explicit", "cautious", "proximal"]
Coupling = Literal["learning_rate", "schedule", "corrected", "independent"]


@dataclasses.dataclass(frozen=True)
class Strength:
    """Coefficient, coupling, mask and spectral multiplier of a decay."""

    weight_decay: NotNegative = 0.1
    """Coefficient; the coupling says what multiplies it."""
    timescale: Positive | None = None
    """Instead of weight_decay: the data in which an update fades to 1/e at the peak rate [tokens; of a ViT images]."""
    coupling: Coupling = "learning_rate"
    """Shrink per step, with r the learning rate: weight_decay times r, r/peak, r*r/peak, or 1."""
    schedule: DecaySchedule = dataclasses.field(default_factory=Steady)
    """How weight_decay changes over the run, beside what the coupling does."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that decay."""
    spectrum: Spectrum | None = None
    """Multiplies the decay of each hidden matrix by a map of its spectrum; None: it does not."""

    @property
    def rate(self) -> Any:
        """The coefficient: a number, or a function of the step."""
        return self.schedule.over_time(self.weight_decay)

    def options(self, setting: Setting, cautious: bool = False) -> dict[str, Any]:
        """Arguments that all explicit decays of the library share."""
        return self._shared(setting) | {"cautious": cautious}

    def _shared(self, setting: Setting) -> dict[str, Any]:
        spectrum = () if self.spectrum is None else (self.spectrum.build(setting.partition),)
        return {
            "mask": self.mask,
            "axes": setting.axes,
            "coupling": coupling(self.coupling, setting.rate, setting.peak),
            "multiplier": (*setting.multipliers, *spectrum),
            "metrics": setting.metrics,
        }

    def build(self, pull: Any, form: Form, setting: Setting) -> Any:
        """The link of a pull."""
        if form == "proximal":
            shared = self._shared(setting)
            if self.coupling == "independent":
                # The implicit step over a learning rate of 1.
                shared |= {"coupling": optax_decay.couplings.learning_rate(), "learning_rate": 1.0}
            else:
                shared |= {"learning_rate": setting.rate}
            return optax_decay.proximal_decay(self.rate, pull=pull, **shared)
        options = self.options(setting, cautious=form == "cautious")
        return optax_decay.decay(self.rate, pull=pull, **options)

    def last(self, form: str = "explicit") -> bool:
        """Whether the link stands behind the learning rate."""
        return self.coupling == "independent" or form == "proximal"


def coupling(name: str, rate: Any, peak: float) -> optax_decay.Coupling:
    """The coupling of a name, with the numbers that it needs."""
    match name:
        case "schedule":
            return optax_decay.couplings.schedule(peak)
        case "corrected":
            return optax_decay.couplings.corrected(rate, peak)
        case "independent":
            return optax_decay.couplings.independent()
    return optax_decay.couplings.learning_rate()
