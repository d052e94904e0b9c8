"""Which steps are left out."""

import dataclasses

from train.config.ranges import Positive, Window


@dataclasses.dataclass(frozen=True)
class Spikes:
    """Leaves out steps of outlying loss or gradient."""

    sigma: Positive = 6.0
    """How far, in standard deviations of the steps that are compared with."""
    window: Window = 128
    """Steps that are compared with."""
