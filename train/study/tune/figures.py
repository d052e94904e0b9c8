"""The picture of a search: the surface of losses over learning rate and decay, and its profiles."""

import math
import pathlib
from typing import Any

import numpy as np

from train.run import figures
from train.study.tune.surface import CLOSE, Point, Surface

DARK, LIGHT, ACCENT = "#10305a", "#8a8a8a", "#b4521e"
LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # nats above the best
SHADES = (
    "#08306b",
    "#134b87",
    "#2a6aa6",
    "#4f8cbf",
    "#7badd2",
    "#a6c8e0",
    "#cbdcec",
    "#e6eef6",
    "#f7f7f7",
)
WORDS = {"learning_rate": "learning rate η", "weight_decay": "decay coefficient λ"}


def draw(found: Surface, title: str, path: pathlib.Path) -> pathlib.Path:
    """Writes the picture: left the surface with the basin inside of the noise, right its profiles."""
    plt = figures.pyplot()
    decays = len({point.weight_decay for point in found.points}) > 1
    with plt.rc_context(figures.RC_PARAMS | {"axes.axisbelow": True}):
        if decays:
            shape = [["surface", "learning_rate"], ["surface", "weight_decay"]]
            picture, panels = plt.subplot_mosaic(
                shape, figsize=(9.5, 5), width_ratios=(1.5, 1), layout="constrained"
            )
            _surface(picture, panels["surface"], found)
        else:
            picture, panel = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
            panels = {"learning_rate": panel}
        for axis in WORDS:
            if axis in panels:
                _profile(panels[axis], found, axis)
        picture.suptitle(title, fontsize=9, x=0.01, ha="left")
        part = path.with_name(path.name + ".part")
        picture.savefig(part, format="png")
        plt.close(picture)
        part.replace(path)
    return path


def places(values: list[float]) -> dict[float, float]:
    """Positions on an axis: log2 of positive values, and 0 at two below the smallest of them."""
    positive = [math.log2(value) for value in values if value > 0]
    none = min(positive, default=0.0) - 2
    return {value: math.log2(value) if value > 0 else none for value in values}


def _surface(picture: Any, panel: Any, found: Surface) -> None:
    rates = places(sorted({p.learning_rate for p in found.points}))
    decays = places(sorted({p.weight_decay for p in found.points}))
    known = [p for p in found.points if math.isfinite(p.loss)]
    x, y = (
        np.array(v) for v in zip(*((rates[p.learning_rate], decays[p.weight_decay]) for p in known))
    )
    above = np.array([max(0.0, p.loss - found.best.loss) for p in known])
    if len(set(x)) > 1 and len(set(y)) > 1:
        bands = panel.tricontourf(x, y, above, levels=LEVELS, colors=SHADES, extend="max")
        bar = picture.colorbar(bands, ax=panel, pad=0.02)
        bar.set_label("loss above the best [nats per token]")
        if not math.isnan(found.deviation):
            excess = np.array(
                [
                    -1.0 if p is found.best else p.loss - found.best.loss - p.resolution
                    for p in known
                ]
            )
            excess[known.index(found.best)] = -min(
                p.resolution for p in known if p is not found.best
            )
            panel.tricontour(x, y, excess, levels=[0.0], colors=ACCENT, linewidths=2)
            panel.plot([], [], color=ACCENT, linewidth=2, label="basin inside of the noise")
    _marks(panel, found, rates, decays)
    for ticks, table in ((panel.set_xticks, rates), (panel.set_yticks, decays)):
        ticks(list(table.values()), [f"{value:.3g}" for value in table])
    panel.tick_params(axis="x", labelrotation=45 if len(rates) > 5 else 0)
    for limits, table in ((panel.set_xlim, rates), (panel.set_ylim, decays)):
        low, high = min(table.values()), max(table.values())
        limits(low - 0.08 * (high - low or 1), high + 0.11 * (high - low or 1))
    panel.set(
        xlabel=WORDS["learning_rate"],
        ylabel=WORDS["weight_decay"],
        title="Held-out loss, mean over seeds",
    )
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    panel.grid(False)


def _marks(
    panel: Any, found: Surface, rates: dict[float, float], decays: dict[float, float]
) -> None:
    """Every point with its loss, and a star for the recommended one."""
    star = {"color": ACCENT, "markeredgecolor": "black", "linestyle": "", "markersize": 12}
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for point in found.points:
        place = rates[point.learning_rate], decays[point.weight_decay]
        if point is found.best:
            panel.plot(*place, "*", zorder=3, label="recommended", **star)
        elif math.isfinite(point.loss):
            panel.plot(*place, "o", color="white", markeredgecolor="black", markersize=5, zorder=3)
        else:
            panel.plot(*place, "x", color="black", markersize=5, zorder=3)
        panel.annotate(
            f"{point.loss:.3f}" if math.isfinite(point.loss) else "diverged",
            place,
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            bbox=box,
        )


def _profile(panel: Any, found: Surface, axis: str) -> None:
    """Losses against one of the two, at the best value of the other one."""
    profile: list[Point] = [p for p in found.profile(axis) if math.isfinite(p.loss)]
    where = places(sorted({getattr(p, axis) for p in found.points}))
    x = [where[getattr(p, axis)] for p in profile]
    y = [p.loss for p in profile]
    errors = None
    if not math.isnan(found.deviation):
        errors = [found.deviation / math.sqrt(p.runs) for p in profile]
    panel.errorbar(x, y, yerr=errors, color=DARK, marker="o", markersize=4, capsize=2)
    panel.plot(
        where[getattr(found.best, axis)],
        found.best.loss,
        "*",
        color=ACCENT,
        markeredgecolor="black",
        markersize=12,
        zorder=3,
    )
    best = found.best.loss
    panel.axhspan(best, best + CLOSE, color="#d9d9d9", linewidth=0, label=f"within {CLOSE:g} nats")
    top = max(0.12, min(0.6, max(y) - best))
    panel.set_ylim(best - 0.15 * top, best + 1.1 * top)
    panel.set_xticks(list(where.values()), [f"{value:.3g}" for value in where])
    panel.tick_params(axis="x", labelrotation=45 if len(where) > 5 else 0)
    panel.set(xlabel=WORDS[axis], ylabel="nats per token")
    panel.legend(loc="best", fontsize=7)
