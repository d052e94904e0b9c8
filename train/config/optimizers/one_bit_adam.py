"""1-bit Adam (arXiv 2102.02888)."""

import dataclasses
from typing import Any, ClassVar, Literal

import optax_decay
from train.config.ranges import Count, Momentum, Positive
from train.config.setting import Setting
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class OneBitAdam:
    """1-bit Adam: replicas exchange the signs of their momenta once the variance is frozen."""

    name: ClassVar[str] = "one_bit_adam"
    growth: ClassVar[str] = "adam"
    workers: ClassVar[bool] = True
    adam: ClassVar[bool] = False
    curvature: ClassVar[bool] = False

    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment that is kept per step, until it is frozen."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    freeze: Literal["fifth", "settled"] | Count = "fifth"
    """Steps until the variance is frozen and signs cross mesh.replica. fifth: a fifth of the schedule, and no less
    than its warm-up; settled: once the variance changes little, after the warm-up."""
    layout: Literal["joined", "per_leaf", "flat"] = "joined"
    """Which matrices share an exchange. joined: all, with a scale each; per_leaf: none; flat: all, with one scale."""
    bias_correction: bool = True
    """Whether moments are corrected as Adam's are; the paper's are not."""
    largest_direction: Positive = 1.0
    """Bound of how far a weight moves per step once signs are sent, over the learning rate."""

    def derived(self, steps: int, warmup_steps: int) -> "OneBitAdam":
        if self.freeze != "fifth":
            return self
        return dataclasses.replace(self, freeze=max(1, steps // 5, warmup_steps))

    def build(self, setting: Setting) -> Any:
        if self.freeze == "fifth":
            raise TypeError("freeze stands for a number of steps: call train.config.derived first")
        freeze: Any = self.freeze
        if freeze == "settled":
            freeze = optax_decay.VarianceCriterion(min_steps=max(1, setting.warmup_steps))
        return optax_decay.scale_by_one_bit_adam(
            setting.worker_axis,
            freeze,
            self.b1,
            self.b2,
            self.eps,
            layout=self.layout,
            compress=("hidden", "head"),
            axes=setting.axes,
            param_specs=setting.specs,
            mesh=setting.mesh,
            bias_correction=self.bias_correction,
            largest_direction=self.largest_direction,
        )

    def check(self, config: Any) -> None:
        """XLA cannot compile some combinations, and ends the process without a message that helps."""
        mesh = config.mesh
        if mesh.replica == 1 and mesh.fsdp * mesh.tensor > 1:
            raise UserError(
                f"mesh.replica = 1 with mesh.fsdp = {mesh.fsdp} and mesh.tensor = {mesh.tensor}: optimizer.name ="
                " one_bit_adam exchanges nothing with one replica, which may then only be split over mesh.data;"
                " nearest: mesh.replica 2, or optimizer.name adam."
            )
        if mesh.replica > 1 and config.model.attention == "cudnn":
            raise UserError(
                f"model.attention = cudnn with mesh.replica = {mesh.replica}: JAX cannot split the kernel where each"
                " replica of optimizer.name = one_bit_adam works for itself; nearest: model.attention xla."
            )
        if mesh.fsdp > 1 and mesh.tensor > 1:
            raise UserError(
                f"mesh.fsdp = {mesh.fsdp} with mesh.tensor = {mesh.tensor}: a replica of optimizer.name ="
                " one_bit_adam can be split over one of the two; nearest:"
                f" mesh.fsdp {mesh.fsdp * mesh.tensor} mesh.tensor 1."
            )
