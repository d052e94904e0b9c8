"""Muon, as optax has it."""

import dataclasses
from typing import Any, ClassVar

import jax
import optax
import optax.contrib

import optax_decay
from train.config.ranges import Count, Momentum, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon: an orthogonalised momentum for hidden matrices, Adam for everything else."""

    name: ClassVar[str] = "muon"
    growth: ClassVar[str] = "muon"
    workers: ClassVar[bool] = False
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    momentum: Momentum = 0.95
    """Share of the momentum of matrices that is kept per step."""
    b1: Momentum = 0.9
    """Share of the first moment of Adam that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment of Adam that is kept per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment of Adam, and to the norm of a momentum."""
    newton_steps: Count = 5
    """Iterations that orthogonalise a momentum."""
    update_rms: Positive = 0.2
    """Root of the mean square of a matrix's step; Adam's is about 0.2."""

    def build(self, setting: Setting) -> Any:
        # With the learning rate -1 it is the direction alone.
        return optax.contrib.muon(
            -1.0,
            ns_steps=self.newton_steps,
            beta=self.momentum,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=lambda params: _numbers(setting.axes, params),
            consistent_rms=self.update_rms,
        )


def _numbers(axes: Any, params: Any) -> Any:
    """Input and output axes of hidden matrices; None for everything else."""
    described = optax_decay.signatures(axes, params)
    numbers = [
        optax.contrib.MuonDimensionNumbers(signature.inputs, signature.outputs)
        if signature.role == "hidden"
        else None
        for signature in described.values()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), numbers)
