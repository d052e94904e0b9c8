"""The optimizer of a run: a direction, and how far and when it steps."""

import dataclasses
from typing import Annotated, Any, ClassVar, Protocol

from train.config.optimizers.adam import Adam
from train.config.parts.schedules import Cosine, Schedule
from train.config.parts.spikes import Spikes
from train.config.ranges import Positive
from train.config.setting import Setting
from train.config.tree import INLINE, Folder


class Direction(Protocol):
    """What every class in train/config/optimizers/ has. Three methods are optional:

    `derived(steps, warmup_steps)` returns it with numbers in place of names that stand for one, given the lengths of
    the schedule and its warm-up; `check(config)` raises UserError for a config that it cannot work in;
    `build_last(setting)` returns a link that stands behind all others, on the finished step.
    """

    name: ClassVar[str]
    growth: ClassVar[str]  # how its steps grow with the width: a row of optax_decay's width laws
    workers: ClassVar[bool]  # whether every replica is a worker with a gradient of its own
    curvature: ClassVar[bool]  # whether it asks for gradients of labels that the model samples
    adam: ClassVar[bool]  # whether its steps are Adam's, on which some decays rely

    @property
    def b1(self) -> float:
        """Share of the first moment that is kept per step."""
        ...

    def build(self, setting: Setting) -> Any:
        """The link of the chain that turns gradients into steps of unit size."""
        ...


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Turns gradients into updates."""

    direction: Annotated[Direction, Folder("train.config.optimizers"), INLINE] = dataclasses.field(
        default_factory=Adam
    )
    """The optimizer proper."""
    learning_rate: Positive = 3e-3
    """Peak learning rate [per step]."""
    clip: Positive | None = 1.0
    """Longest gradient, as a global norm; of each worker where replicas are workers. None: no clipping."""
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    """Shape of the learning rate."""
    spikes: Spikes | None = None
    """Leaves out steps that are far above those before; None: only those with NaN or infinite numbers."""
