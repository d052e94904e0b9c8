"""Schedules of λ by name, and the dial between λ and the tokens that a weight remembers.

A schedule is a function of the completed updates t = 0, 1, …, as in optax, and goes where a decay takes `weight_decay`.
With T the steps of the run, η_t the learning rate and η_max its peak:

================ ==================================================== ======================= ========================
schedule         λ(t)                                                 with the coupling       source
================ ==================================================== ======================= ========================
to_zero          λ (1 + cos πt/T)/2, or λ (1 - t/T)                   learning_rate           nanochat (Muon's group)
log_time         ω/(T₀ + t + 1),  T₀ = ⌊T/10⌋                         schedule(η_max)         ADANA (arXiv 2602.05298)
hold_drop_ramp   λ times a line through (0, 0.8), (2T/15, 0.8),       learning_rate           slowrun, tiny track
                 (8T/15, 0.1), (T, 0.93)
palm             λ η_t: shrink λ η_t² per step                        learning_rate           Emerging-Optimizers
                                                                                              "palm"; arXiv 2512.08217
soda             1/(t + 2)                                            independent             SODA (arXiv 2605.11172)
================ ==================================================== ======================= ========================

The dial: a weight remembers ``1/(ηλ)`` steps. In a run of D tokens with B tokens per step that is the fraction
``τ = B/(ηλD)`` of the run (arXiv 2405.13698: keep τ; arXiv 2505.13738: λ ∝ B, with τ falling in tokens per parameter,
whose constants are disputed and not built in).

**Differs from the sources.** ADANA's readme says ω/t; its code has the offset T₀ and t from 1, as here. It applies the
shrink to the stepped weight, decays here act on the weight before the step: a difference of shrink times step. slowrun
rounds the corners of its line to whole steps, as here. Emerging-Optimizers' λ of palm has the unit 1/η: 0.1 at a peak
of 3e-4 is 333; ``couplings.corrected`` with ``λ η_max`` is the same rule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters.arguments import check, one_of
from optax_decay.product.couplings import FollowsRate

SHAPES = ("cosine", "linear")
LINE = ((0.0, 0.8), (2 / 15, 0.8), (8 / 15, 0.1), (1.0, 0.93))


def to_zero(weight_decay: float | jax.Array, steps: int, shape: str = "cosine") -> optax.Schedule:
    """λ falls to zero over the run.

    Args:
        weight_decay: λ at the start, >= 0.
        steps: T >= 1, of the run; λ stays zero afterwards.
        shape: ``"cosine"`` or ``"linear"``.

    Raises:
        ValueError: a number out of its range, an unknown shape.

    >>> [round(float(to_zero(0.2, 4)(t)), 4) for t in (0, 1, 2, 4, 5)]
    [0.2, 0.1707, 0.1, 0.0, 0.0]
    """
    check("weight_decay", weight_decay, 0.0)
    check("steps", steps, 1)
    one_of("shape", shape, SHAPES)

    def schedule(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        x = jnp.minimum(jnp.asarray(count, float) / steps, 1.0)
        return weight_decay * ((1 + jnp.cos(jnp.pi * x)) / 2 if shape == "cosine" else 1 - x)

    return schedule


def log_time(
    steps: int, omega: float | jax.Array = 4.0, offset: int | None = None
) -> optax.Schedule:
    """λ falls as one over the time: with ``couplings.schedule(peak)`` each doubling of it decays by the same factor.

    Args:
        steps: T >= 1, of the run.
        omega: ω >= 0, dimensionless; the decays of a run sum up to about ``ω log(1 + T/T₀)`` at constant η.
        offset: T₀ >= 0 steps; None for ⌊T/10⌋.

    Raises:
        ValueError: a number out of its range.

    >>> [round(float(log_time(100)(t)), 4) for t in (0, 9, 99)]
    [0.3636, 0.2, 0.0364]
    """
    check("steps", steps, 1)
    check("omega", omega, 0.0)
    start = steps // 10 if offset is None else offset
    check("offset", start, 0)
    return lambda count: omega / (start + 1 + jnp.asarray(count, float))


def hold_drop_ramp(
    weight_decay: float | jax.Array, steps: int, line: tuple[tuple[float, float], ...] = LINE
) -> optax.Schedule:
    """λ is held, dropped and raised again: made for runs of more than ten epochs.

    Args:
        weight_decay: λ >= 0 that the line multiplies.
        steps: T >= 1, of the run.
        line: corners (fraction of the run, factor), from 0 to 1; fractions are rounded to whole steps.

    Raises:
        ValueError: a number out of its range; corners that do not rise from 0 to 1.

    >>> [round(float(hold_drop_ramp(1.0, 30)(t)), 3) for t in (0, 4, 10, 16, 30, 40)]
    [0.8, 0.8, 0.45, 0.1, 0.93, 0.93]
    """
    check("weight_decay", weight_decay, 0.0)
    check("steps", steps, 1)
    places = [x for x, _ in line]
    if places != sorted(set(places)) or places[0] != 0 or places[-1] != 1:
        raise ValueError(f"the line has its corners at {places}; they must rise from 0 to 1.")
    for _, factor in line:
        check("a factor of the line", factor, 0.0)
    corners = np.asarray([round(x * steps) for x in places], float)
    factors = np.asarray([y for _, y in line], float)
    return lambda count: weight_decay * jnp.interp(jnp.asarray(count, float), corners, factors)


def palm(coefficient: float | jax.Array, learning_rate: optax.ScalarOrSchedule) -> optax.Schedule:
    """λ follows the learning rate, so that a weight shrinks by ``coefficient · η_t²`` per step.

    With ``couplings.corrected`` or ``couplings.schedule``, which follow the learning rate too, it raises: the shrink
    would be cubic in η. A constant λ with ``couplings.corrected`` is the same rule as this one.

    Args:
        coefficient: in units of 1/η, >= 0; λ of ``couplings.corrected`` divided by the peak.
        learning_rate: η, the chain's number or schedule.

    Raises:
        ValueError: a number out of its range.

    >>> round(float(palm(333.0, 3e-4)(0)), 4)
    0.0999
    """
    check("coefficient", coefficient, 0.0)
    check("learning_rate", learning_rate, 0.0)
    return FollowsRate(coefficient, learning_rate)


def soda(start: float | jax.Array = 2.0) -> optax.Schedule:
    """``1/(t + start)``, for the pull towards the initial weights, `toward_initial_decay`.

    Args:
        start: >= 1; SODA has 2.

    Raises:
        ValueError: a number out of its range.
    """
    check("start", start, 1.0)
    return lambda count: 1 / (jnp.asarray(count, float) + start)


class Timescale(NamedTuple):
    """How long a weight remembers under decoupled decay.

    Attributes:
        steps: 1/(ηλ).
        tokens: the same in tokens.
        fraction: τ, the same as a fraction of the run.
    """

    steps: float
    tokens: float
    fraction: float


def timescale(
    weight_decay: float, *, learning_rate: float, tokens: float, tokens_per_step: float
) -> Timescale:
    """How long a weight remembers, for λ with AdamW's coupling.

    Args:
        weight_decay: λ > 0.
        learning_rate: η > 0, the peak.
        tokens: D > 0, of the run.
        tokens_per_step: B > 0.

    Raises:
        ValueError: a number that is not positive.

    >>> timescale(0.1, learning_rate=1e-3, tokens=2e10, tokens_per_step=5e5)
    Timescale(steps=10000.0, tokens=5000000000.0, fraction=0.25)
    """
    for name, value in (
        ("weight_decay", weight_decay),
        ("learning_rate", learning_rate),
        ("tokens", tokens),
        ("tokens_per_step", tokens_per_step),
    ):
        check(name, value, 0.0, open_low=True)
    steps = 1 / (learning_rate * weight_decay)
    return Timescale(steps, steps * tokens_per_step, steps * tokens_per_step / tokens)


def weight_decay_of(
    fraction: float, *, learning_rate: float, tokens: float, tokens_per_step: float
) -> float:
    """λ with AdamW's coupling for which a weight remembers a fraction of the run: ``B/(ητD)``.

    Args:
        fraction: τ > 0.
        learning_rate, tokens, tokens_per_step: as in `timescale`.

    Raises:
        ValueError: a number that is not positive.

    >>> weight_decay_of(0.25, learning_rate=1e-3, tokens=2e10, tokens_per_step=5e5)
    0.1
    """
    known = {"tokens": tokens, "tokens_per_step": tokens_per_step}
    return timescale(fraction, learning_rate=learning_rate, **known).fraction


def transferred(
    weight_decay: float,
    *,
    tokens: float,
    tokens_per_step: float,
    from_tokens: float,
    from_tokens_per_step: float,
) -> float:
    """λ for a run of other length and batch: ``λ sqrt(B/B₀) D₀/D``, the rule of nanochat.

    It keeps the fraction of the run that a weight remembers if η is scaled by ``sqrt(B/B₀)`` too, and only then.

    Args:
        weight_decay: λ >= 0 of the run that is known.
        tokens, tokens_per_step: D and B of the new run.
        from_tokens, from_tokens_per_step: D₀ and B₀ of the known one.

    Raises:
        ValueError: a number out of its range.

    >>> transferred(0.2, tokens=4e9, tokens_per_step=4e5, from_tokens=1e9, from_tokens_per_step=1e5)
    0.1
    """
    check("weight_decay", weight_decay, 0.0)
    for name, value in (
        ("tokens", tokens),
        ("tokens_per_step", tokens_per_step),
        ("from_tokens", from_tokens),
        ("from_tokens_per_step", from_tokens_per_step),
    ):
        check(name, value, 0.0, open_low=True)
    return weight_decay * (tokens_per_step / from_tokens_per_step) ** 0.5 * from_tokens / tokens
