"""How momenta of hidden matrices are orthogonalised: what Muon and its relatives have in common."""

import dataclasses
from typing import Annotated, Any, Literal

import optax_decay
from train.config.ranges import Momentum, Positive, Range
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """Momentum, iteration, and Adam for everything but hidden matrices."""

    momentum: Momentum = 0.95
    """Share of the momentum of matrices that is kept per step."""
    momentum_form: Literal["nesterov", "plain", "bias_corrected_nesterov"] = "nesterov"
    """Whether the latest gradient counts once more; bias_corrected_nesterov is optax's way."""
    b1: Momentum = 0.9
    """Share of the first moment of Adam that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment of Adam that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment of Adam, and to the norm of a momentum."""
    newton: Literal["muon", "dion", "polar_express"] = "muon"
    """Coefficients of the iteration: muon repeats one triple, the others change from step to step."""
    newton_steps: Annotated[int, Range(1, 20)] = 5
    """Iterations that orthogonalise a momentum."""
    iteration: Literal["float32", "bfloat16"] = "float32"
    """Type of the products in the iteration."""

    def options(self, setting: Setting) -> dict[str, Any]:
        """Arguments of the library's Muon and its relatives."""
        return {
            "momentum": self.momentum,
            "coefficients": getattr(optax_decay.newton, self.newton)(self.newton_steps),
            "momentum_form": self.momentum_form,
            "b1": self.b1,
            "b2": self.b2,
            "eps": self.eps,
            "adam_eps": self.eps,
            "iteration_dtype": None if self.iteration == "float32" else self.iteration,
            "axes": setting.axes,
        }
