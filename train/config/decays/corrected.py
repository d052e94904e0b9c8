"""Corrected decay: AdamC (arXiv 2506.02285)."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.parts.spectrum import Spectrum
from train.config.parts.strength import Explicit, Role
from train.config.ranges import NotNegative
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Corrected:
    """L2 decay that shrinks normalised layers with the square of the learning rate (AdamC)."""

    name: ClassVar[str] = "corrected"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True
    last: ClassVar[bool] = False

    weight_decay: NotNegative = 0.1
    """Coefficient; shrink per step, with r the learning rate: times r*r/peak on normalised layers, r on others."""
    normalized: tuple[Role, ...] = ("hidden",)
    """Roles whose output is normalised."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that decay."""
    form: Explicit = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update."""
    spectrum: Spectrum | None = None
    """Multiplies the decay of each hidden matrix by a map of its spectrum; None: it does not."""

    def build(self, setting: Setting) -> Any:
        spectrum = () if self.spectrum is None else (self.spectrum.build(setting.partition),)
        return optax_decay.corrected_decay(
            setting.rate,
            self.weight_decay,
            setting.peak,
            normalized=self.normalized,
            mask=self.mask,
            axes=setting.axes,
            cautious=self.form == "cautious",
            multiplier=(*setting.multipliers, *spectrum),
            metrics=setting.metrics,
        )
