"""Numbers that a field may have: annotations that train/config/checks.py holds values against."""

import dataclasses
import math
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed numbers: from `low` to `high`, with `above` without `low` itself, with `below` without `high`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"numbers above {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.high == LARGEST:
            return f"{self.low} or more, at most {LARGEST}"
        return f"{self.low:g} {'<' if self.above else '<='} value {'<' if self.below else '<='} {self.high:g}"

    def holds(self, value: float) -> bool:
        high_enough = self.low < value if self.above else self.low <= value
        low_enough = value < self.high if self.below else value <= self.high
        return high_enough and low_enough and math.isfinite(value)


LARGEST = 2**31 - 1  # what a counter on a device can hold

Count = Annotated[int, Range(1, LARGEST)]
Whole = Annotated[int, Range(0, LARGEST)]
Window = Annotated[int, Range(4, 100_000)]  # steps whose numbers are kept and sorted in every step
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Momentum = Annotated[float, Range(0, 1, below=True)]
Share = Annotated[float, Range(0, 1)]
