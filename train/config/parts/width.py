"""How a run follows from one of a narrower model."""

import dataclasses
from typing import Literal

from train.config.ranges import Count


@dataclasses.dataclass(frozen=True)
class Width:
    """Scales model, learning rate and decay from a narrower model, at which they were found."""

    base: Count
    """Width of that model [features]."""
    base_head: Count | None = None
    """Width of an attention head there [features]; None: as here."""
    rule: Literal["fan2025", "mup_package", "constant", "qiu2025", "timescale"] = "fan2025"
    """How the decay of matrices follows the width."""
