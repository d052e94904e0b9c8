"""How the step of an orthogonalised matrix follows its shape."""

import dataclasses
from typing import Any, ClassVar

import optax_decay
from train.config.ranges import NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class LargerSide:
    """`factor` times the root of the larger side: steps have the RMS `factor` (Moonshot, Kimi)."""

    name: ClassVar[str] = "larger_side"

    factor: Positive = 0.2
    """Root of the mean square of a matrix's step; Adam's is about 0.2."""

    def as_scale(self) -> Any:
        return optax_decay.shape_scales.sqrt_larger_side(self.factor)


@dataclasses.dataclass(frozen=True)
class OutputsPerInput:
    """Root of outputs over inputs, and of `at_least` where that is smaller (Jordan's Muon)."""

    name: ClassVar[str] = "outputs_per_input"

    at_least: NotNegative = 1.0
    """Smallest ratio; 0 for the plain root."""

    def as_scale(self) -> Any:
        return optax_decay.shape_scales.sqrt_outputs_per_input(self.at_least)


ShapeScale = LargerSide | OutputsPerInput
