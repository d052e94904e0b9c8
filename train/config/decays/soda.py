"""SODA (arXiv 2605.11172)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Role
from train.config.ranges import Range
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Soda:
    """Pulls a weight in step t towards its initial value, by 1/(t + start) of the way (SODA). Keeps a copy of them."""

    name: ClassVar[str] = "soda"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False
    last: ClassVar[bool] = True

    start: Annotated[float, Range(1)] = 2.0
    """Divisor of the first step."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that are pulled."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.soda_decay(self.start, mask=self.mask, axes=setting.axes)
