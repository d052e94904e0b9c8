"""The coupling of a decay to the learning rate: the factor by which a step multiplies the coefficient λ.

With η_t the learning rate at step t and η_max its peak, a weight shrinks per step by

=============== ====================== ========================================= ==========================
coupling        shrink per step        place in the chain                        used by
=============== ====================== ========================================= ==========================
learning_rate   η_t λ                  before ``scale_by_learning_rate``         torch AdamW, optax.adamw
schedule        (η_t/η_max) λ          before ``scale_by_learning_rate``         AdamW's paper, big_vision
corrected       (η_t²/η_max) λ         before ``scale_by_learning_rate``         AdamC (arXiv 2506.02285)
independent     λ                      after ``scale_by_learning_rate``          "independent" decay
=============== ====================== ========================================= ==========================

Each coupling is a value that carries the numbers it needs. `convert_weight_decay` turns a coefficient for one coupling
into the coefficient for another.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters.arguments import check, nearest, one_of
from optax_decay.product.per_matrix import Value
from optax_decay.product.per_matrix import now as now

NAMES = ("learning_rate", "schedule", "corrected", "independent")


class FollowsRate(NamedTuple):
    """A schedule of λ that is proportional to the learning rate.

    Attributes:
        coefficient: what it is multiplied with, in units of 1/η.
        learning_rate: η, a number or schedule.
    """

    coefficient: float | jax.Array
    learning_rate: optax.ScalarOrSchedule

    def __call__(self, count: jax.typing.ArrayLike) -> Value:
        return self.coefficient * now(self.learning_rate, jnp.asarray(count))


class Coupling(NamedTuple):
    """How a decay coefficient follows the learning rate. Build one with the functions of this module.

    Attributes:
        name: one of `NAMES`.
        scaled: ``(λ_t, count) -> c λ_t``, the number in front of ψ(w) at the decay's place in the chain. None: λ_t.
        after_rate: the decay stands after ``scale_by_learning_rate``, where updates already point downhill.
    """

    name: str
    scaled: Callable[[Value, jax.Array], Value] | None = None
    after_rate: bool = False

    def rate(self, weight_decay: optax.ScalarOrSchedule, count: jax.Array) -> Value:
        """The number in front of ψ(w) at the decay's place in the chain, for λ a number or a schedule.

        Raises:
            ValueError: both λ and the coupling follow the learning rate, which would enter the shrink cubed.
        """
        if self.name in ("schedule", "corrected") and isinstance(weight_decay, FollowsRate):
            raise ValueError(
                f"schedules.palm with couplings.{self.name} would count the learning rate twice: use palm with "
                "couplings.learning_rate(), or a constant λ with couplings.corrected."
            )
        rate = now(weight_decay, count)
        return rate if self.scaled is None else self.scaled(rate, count)


def learning_rate() -> Coupling:
    """Shrinks a weight by η_t λ per step, as ``optax.adamw`` does. The default of every decay."""
    return Coupling("learning_rate")


def schedule(peak_learning_rate: float) -> Coupling:
    """Shrinks a weight by λ η_t/η_max per step: λ follows the shape of the schedule but not its height.

    Args:
        peak_learning_rate: η_max > 0.

    Raises:
        ValueError: a peak that is not positive.
    """
    check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)
    return Coupling("schedule", lambda rate, count: rate / peak_learning_rate)


def corrected(
    learning_rate: optax.ScalarOrSchedule, peak_learning_rate: float | None = None
) -> Coupling:
    """Shrinks a weight by λ η_t²/η_max per step, which keeps ``|gradient|/|weight|`` of normalised layers constant.

    Args:
        learning_rate: η, the chain's number or schedule.
        peak_learning_rate: η_max > 0; may be left out for a number, which is its own peak.

    Raises:
        ValueError: a number out of its range; a schedule without its peak.
    """
    check("learning_rate", learning_rate, 0.0)
    peak = peak_of(learning_rate, peak_learning_rate)
    return Coupling("corrected", lambda rate, count: rate * (now(learning_rate, count) / peak))


def independent() -> Coupling:
    """Shrinks a weight by λ per step, whatever the learning rate; stands after ``scale_by_learning_rate``."""
    return Coupling("independent", after_rate=True)


def check_coupling(coupling: object) -> None:
    """Raises ValueError unless `coupling` is a `Coupling`; names the nearest one."""
    if not isinstance(coupling, Coupling):
        name = getattr(coupling, "__name__", coupling)
        raise ValueError(
            f"coupling={coupling!r} is not a Coupling; allowed: {', '.join(f'couplings.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.couplings.{nearest(name, NAMES)}()?)."
        )


def peak_of(learning_rate: optax.ScalarOrSchedule, peak_learning_rate: float | None) -> Value:
    """The peak of a learning rate: as given, or the number itself.

    Raises:
        ValueError: a schedule without its peak; a peak that is not positive.
    """
    if peak_learning_rate is not None:
        check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)
        return peak_learning_rate
    if callable(learning_rate):
        raise ValueError(
            "the learning rate is a schedule, and this coupling divides by its peak: pass peak_learning_rate=..."
        )
    check("learning_rate", learning_rate, 0.0, open_low=True)
    return learning_rate


def convert_weight_decay(
    weight_decay: float, source: str, target: str, *, peak_learning_rate: float
) -> float:
    """The coefficient under another coupling that shrinks weights equally at the peak of the learning rate.

    Args:
        weight_decay: λ under `source`.
        source, target: one of `NAMES`.
        peak_learning_rate: η_max.

    >>> convert_weight_decay(0.1, "learning_rate", "schedule", peak_learning_rate=3e-4)
    3e-05
    """
    check("weight_decay", weight_decay, 0.0)
    check("peak_learning_rate", peak_learning_rate, 0.0, open_low=True)
    one_of("source", source, NAMES)
    one_of("target", target, NAMES)
    scale = dict(zip(NAMES, (peak_learning_rate, 1.0, peak_learning_rate, 1.0)))
    return float(f"{weight_decay * scale[source] / scale[target]:.15g}")
