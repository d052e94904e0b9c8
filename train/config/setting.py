"""What the links of an optimizer chain depend on beside their own fields."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """The surroundings of one link."""

    axes: Any
    """What the parameters' axes mean."""
    rate: Callable[[Any], Any]
    """Learning rate by step."""
    peak: float = 1.0
    """The largest learning rate."""
    warmup_steps: int = 0
    """Steps until the learning rate is at its peak."""
    b1: float = 0.9
    """Share of the first moment that the direction keeps per step."""
    multipliers: tuple[Any, ...] = ()
    """Factors of any decay, beside those of its own."""
    metrics: bool = False
    """Whether the decay's state says what it did, for train/step/observe.py."""
    partition: Any = None
    """Shardings of the parameters, if matrices are measured on several devices together."""
    worker_axis: str = "replica"
    """Mesh axis of the workers."""
    specs: Any = None
    """PartitionSpecs of the parameters inside a worker; None where nothing is split or replicas are no workers."""
    mesh: Any = None
    """The mesh of `specs`."""
