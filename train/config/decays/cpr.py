"""CPR: constrained parameter regularisation (arXiv 2311.09058)."""

import dataclasses
from typing import Any, ClassVar, Literal

import optax_decay
from train.config.parts.strength import Role
from train.config.ranges import Count, Positive
from train.config.setting import Setting


@dataclasses.dataclass(frozen=True)
class Inflection:
    """The bound is the size at which its growth begins to slow down."""

    name: ClassVar[str] = "inflection"

    after: Count = 200
    """Steps before growth is looked at; the bound is set after three times as many at the earliest."""
    sample_every: Count = 200
    """Between two looks [steps]."""

    def as_bound(self) -> Any:
        return optax_decay.bounds.inflection(self.after, self.sample_every)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The bound is the size after some steps."""

    name: ClassVar[str] = "warm_start"

    steps: Literal["twice"] | Count = "twice"
    """How many. twice: twice the warm-up of the learning rate, as the authors advise."""

    def derived(self, steps: int, warmup_steps: int) -> "WarmStart":
        if self.steps != "twice":
            return self
        return dataclasses.replace(self, steps=max(1, 2 * warmup_steps))

    def as_bound(self) -> Any:
        if self.steps == "twice":
            raise TypeError("steps stands for a number of steps: call train.config.derived first")
        return optax_decay.bounds.warm_start(self.steps)


@dataclasses.dataclass(frozen=True)
class Dependent:
    """The bound is a multiple of the initial size."""

    name: ClassVar[str] = "dependent"

    factor: Positive = 1.0
    """Bound over initial size."""

    def as_bound(self) -> Any:
        return optax_decay.bounds.dependent(self.factor)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The bound is one number for all matrices."""

    name: ClassVar[str] = "uniform"

    size: Positive = 1.0
    """The bound [unit of the measure]."""

    def as_bound(self) -> Any:
        return optax_decay.bounds.uniform(self.size)


@dataclasses.dataclass(frozen=True)
class Cpr:
    """Decays only matrices that are larger than their bound, with a force that grows while they are (CPR)."""

    name: ClassVar[str] = "cpr"
    gradients: ClassVar[bool] = False
    multipliers: ClassVar[bool] = False
    last: ClassVar[bool] = True

    bound: Inflection | WarmStart | Dependent | Uniform = dataclasses.field(
        default_factory=Inflection
    )
    """Where the bound of each matrix comes from."""
    measure: Literal["l2", "l1", "std", "huber"] = "l2"
    """Size of a matrix: sum of squares, of absolute values, standard deviation, or sum of Huber's function."""
    rate: Positive = 1.0
    """How fast the force of the decay grows with the excess over the bound."""
    scaled: bool = False
    """Whether the force is multiplied by the learning rate."""
    mask: tuple[Role, ...] = ("hidden", "head")
    """Roles of parameters that are bounded."""

    def build(self, setting: Setting) -> Any:
        return optax_decay.cpr_decay(
            self.bound.as_bound(),
            measure=self.measure,
            rate=self.rate,
            learning_rate=setting.rate if self.scaled else None,
            mask=self.mask,
            axes=setting.axes,
        )
