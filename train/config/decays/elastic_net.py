"""Elastic net: L1 and L2 decay together."""

import dataclasses
from typing import Annotated, Any, ClassVar

import optax_decay
from train.config.parts.strength import Form, Strength
from train.config.ranges import Share
from train.config.setting import Setting
from train.config.tree import INLINE


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """Pulls a weight w by a mixture of its sign and w itself."""

    name: ClassVar[str] = "elastic_net"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = True

    l1_ratio: Share = 0.5
    """Share of the sign in the pull."""
    form: Form = "explicit"
    """explicit: added to the update; cautious: only where it agrees with the update; proximal: implicit, after it."""
    strength: Annotated[Strength, INLINE] = dataclasses.field(default_factory=Strength)

    @property
    def last(self) -> bool:
        return self.strength.last(self.form)

    def build(self, setting: Setting) -> Any:
        return self.strength.build(optax_decay.elastic_net(self.l1_ratio), self.form, setting)
