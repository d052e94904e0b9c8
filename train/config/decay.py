"""What the rest of the program knows about weight decays."""

from typing import Any, ClassVar, Protocol

from train.config.setting import Setting


class Decay(Protocol):
    """What every class in train/config/decays/ has. Three methods are optional:

    `build_rate(setting)` returns the link that stands in place of the learning rate; `derived(steps, warmup_steps)` and
    `check(config)` are as for optimizers (train/config/optimizer.py).
    """

    name: ClassVar[str]
    gradients: ClassVar[bool]  # whether it needs the mean gradient of all replicas
    multipliers: ClassVar[bool]  # whether it can follow the width

    @property
    def last(self) -> bool:
        """Whether its link stands behind the learning rate."""
        ...

    def build(self, setting: Setting) -> Any:
        """The link of the chain that decays."""
        ...
