"""What a sweep over learning rate, decay and width says: where the optimum is, and whether it moves.

Runs under μP are read under several rules at once: a rule only names the decay λ_i of a matrix by
the proxy's λ = λ_i / m^s, with m the width over the proxy's. So one grid of runs per width serves
them all, and under two rules the same runs lie m^(s-s') apart.

The optimum of a width is the lowest point of a paraboloid in (log η, log λ) through the mean losses
near the best point of the grid; its error is the deviation over resampled seeds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optax_decay.width import law

# Rule to parametrisation of the runs that it reads.
RULES = {"adamw": "standard", "constant": "mup", "fan2025": "mup", "mup_package": "mup"}
TITLES = {
    "adamw": "plain AdamW: one η, one λ",
    "constant": "μP, λ constant",
    "fan2025": "μP, λ ∝ √m (default)",
    "mup_package": "μP, λ ∝ m",
}
REACH = 2  # grid steps around the best point that the paraboloid goes through
RESAMPLED = 200  # draws of the seeds


@dataclasses.dataclass(frozen=True)
class Surface:
    """Losses of one width under one rule.

    Attributes:
        width: of the models.
        learning_rates: η of the proxy, increasing.
        weight_decays: λ of the proxy under the rule, increasing.
        losses: [learning rates, decays, seeds], nats per token; infinite where a run diverged.
    """

    width: int
    learning_rates: np.ndarray
    weight_decays: np.ndarray
    losses: np.ndarray

    def mean(self) -> np.ndarray:
        return self.losses.mean(axis=-1)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Where a surface is lowest.

    Attributes:
        learning_rate, weight_decay: of the fitted lowest point.
        rate_error, decay_error: standard deviations of their logarithms to base 2, over resampled seeds.
        loss: mean over seeds at the best point of the grid.
        deviation: of the loss at that point over seeds.
        inside: whether the best point has neighbours on the grid on all four sides.
    """

    learning_rate: float
    weight_decay: float
    rate_error: float
    decay_error: float
    loss: float
    deviation: float
    inside: bool


def surfaces(results: Sequence[Mapping[str, Any]], rule: str, base_width: int) -> list[Surface]:
    """One surface per width from the records of `runs`; widths with gaps in their grid are left out."""
    found = []
    chosen = [r for r in results if r["parametrisation"] == RULES[rule]]
    for width in sorted({r["width"] for r in chosen}):
        here = [r for r in chosen if r["width"] == width]
        etas = sorted({r["learning_rate"] for r in here})
        lambdas = sorted({r["weight_decay"] for r in here})
        seeds = sorted({r["seed"] for r in here})
        table = {(r["learning_rate"], r["weight_decay"], r["seed"]): r["loss"] for r in here}
        if len(table) < len(etas) * len(lambdas) * len(seeds):
            continue
        losses = np.array([[[table[e, l, s] for s in seeds] for l in lambdas] for e in etas])
        found.append(
            Surface(width, np.array(etas), proxy_decays(rule, lambdas, width / base_width), losses)
        )
    return found


def proxy_decays(rule: str, weight_decays: Sequence[float], m: float) -> np.ndarray:
    """What a rule calls the decays λ_i of matrices with the width factor m: λ_i / m^s."""
    s = 0.0 if rule == "adamw" else law(rule).hidden.decay
    return np.array(weight_decays) / m**s


def optimum(surface: Surface, seed: int = 0) -> Optimum:
    mean = surface.mean()
    i, j = np.unravel_index(np.argmin(mean), mean.shape)
    x, y = fit(surface, mean)
    draws = np.random.default_rng(seed).integers(
        surface.losses.shape[-1], size=(RESAMPLED, surface.losses.shape[-1])
    )
    again = np.array([fit(surface, surface.losses[..., d].mean(axis=-1)) for d in draws])
    several = surface.losses.shape[-1] > 1
    return Optimum(
        learning_rate=2.0**x,
        weight_decay=2.0**y,
        rate_error=float(again[:, 0].std()) if several else math.nan,
        decay_error=float(again[:, 1].std()) if several else math.nan,
        loss=float(mean[i, j]),
        deviation=float(surface.losses[i, j].std(ddof=1)) if several else math.nan,
        inside=bool(0 < i < mean.shape[0] - 1 and 0 < j < mean.shape[1] - 1),
    )


def fit(surface: Surface, mean: np.ndarray) -> tuple[float, float]:
    """(log2 η, log2 λ) of the lowest point of a paraboloid near the best point; that point if there is none."""
    x, y = np.log2(surface.learning_rates), np.log2(surface.weight_decays)
    i, j = np.unravel_index(np.argmin(mean), mean.shape)
    rows = slice(max(0, i - REACH), i + REACH + 1)
    columns = slice(max(0, j - REACH), j + REACH + 1)
    X, Y = (g.ravel() for g in np.meshgrid(x[rows] - x[i], y[columns] - y[j], indexing="ij"))
    z = mean[rows, columns].ravel()
    usable = np.isfinite(z)
    if usable.sum() < 6:
        return float(x[i]), float(y[j])
    X, Y, z = X[usable], Y[usable], z[usable]
    design = np.stack([np.ones_like(X), X, Y, X * X, X * Y, Y * Y], axis=1)
    _, bx, by, xx, xy, yy = np.linalg.lstsq(design, z, rcond=None)[0]
    curvature = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.min(np.linalg.eigvalsh(curvature)) <= 0:
        return float(x[i]), float(y[j])
    dx, dy = np.linalg.solve(curvature, [-bx, -by])
    # A flat valley would send the lowest point far away: it stays within the points that were fitted.
    return (
        float(np.clip(x[i] + dx, x[rows][0], x[rows][-1])),
        float(np.clip(y[j] + dy, y[columns][0], y[columns][-1])),
    )


@dataclasses.dataclass(frozen=True)
class Transfer:
    """From the narrowest width of a sweep to the widest, under one rule.

    Attributes:
        rule: a key of `RULES`.
        proxy, target: their optima.
        rate_shift, decay_shift: of the optimum, in factors of 2 (logarithm to base 2).
        rate_error, decay_error: standard deviations of the two shifts.
        transferred: mean loss of the target at the proxy's best point of the grid; between points of
            the target's grid by a line in log λ; nan if it lies outside.
        cost: that less the target's best mean loss.
    """

    rule: str
    proxy: Optimum
    target: Optimum
    rate_shift: float
    decay_shift: float
    rate_error: float
    decay_error: float
    transferred: float
    cost: float


def transfer(results: Sequence[Mapping[str, Any]], rule: str, base_width: int) -> Transfer | None:
    """None as long as there are fewer than two complete widths."""
    found = surfaces(results, rule, base_width)
    if len(found) < 2:
        return None
    first, last = found[0], found[-1]
    proxy, target = optimum(first), optimum(last)
    i, j = np.unravel_index(np.argmin(first.mean()), first.mean().shape)
    row = np.flatnonzero(np.isclose(last.learning_rates, first.learning_rates[i]))
    transferred = math.nan
    if len(row):
        transferred = float(
            np.interp(
                *(np.log(first.weight_decays[j]), np.log(last.weight_decays)),
                last.mean()[row[0]],
                left=math.nan,
                right=math.nan,
            )
        )
    return Transfer(
        rule,
        proxy,
        target,
        math.log2(target.learning_rate / proxy.learning_rate),
        math.log2(target.weight_decay / proxy.weight_decay),
        math.hypot(proxy.rate_error, target.rate_error),
        math.hypot(proxy.decay_error, target.decay_error),
        transferred,
        transferred - target.loss,
    )


def spectral_exponents(
    results: Sequence[Mapping[str, Any]], learning_rate: float, weight_decay: float
) -> dict[str, tuple[float, float]]:
    """a of σ_max ∝ sqrt(η_i/λ_i)·m^a per matrix, and its deviation over seeds, from runs under μP.

    Compares runs with the same η of the proxy and the same λ_i, so that sqrt(η_i/λ_i) ∝ m^-½.
    """
    chosen = [
        r
        for r in results
        if r["parametrisation"] == "mup"
        and math.isclose(r["learning_rate"], learning_rate)
        and math.isclose(r["weight_decay"], weight_decay)
        and math.isfinite(r["loss"])
    ]
    found = {}
    for path in chosen[0]["top"] if chosen else ():
        slopes = []
        for seed in sorted({r["seed"] for r in chosen}):
            mine = [r for r in chosen if r["seed"] == seed]
            if len(mine) > 1:
                x, y = np.log([r["width"] for r in mine]), np.log([r["top"][path] for r in mine])
                slopes.append(np.polyfit(x, y, 1)[0] + 0.5)
        if slopes:
            found[path] = (float(np.mean(slopes)), float(np.std(slopes)))
    return found
