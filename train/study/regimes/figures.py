"""Pictures of the regimes: loss over λ, and gains over L2 decay with the forgiveness of every arm."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from train.run.figures import RC_PARAMS, pyplot
from train.study.regimes.arms import ARMS
from train.study.regimes.rows import Row, reference

DARK, LIGHT, ACCENT = "#10305a", "#8a8a8a", "#b4521e"
BARS = ("#a9c3df", "#d9d9d9")  # of two texts
LINES = [  # of texts in one panel
    {"color": DARK, "linestyle": "-", "marker": "o"},
    {"color": ACCENT, "linestyle": "--", "marker": "s"},
    {"color": "#3c8c84", "linestyle": ":", "marker": "^"},
]
# Every line differs in shade and in dashes or marks, so that it is readable in grey.
STYLES = [
    {"color": color, "linestyle": dashes, "marker": mark}
    for dashes, mark in (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
    for color in ("#10305a", "#b4521e", "#3c8c84", "#7a3b8f", "#8a8a8a", "#c9a227")
]


def save(picture: Any, path: pathlib.Path) -> bool:
    """Writes a picture atomically, and closes it."""
    part = path.with_name(path.name + ".part")
    picture.savefig(part, format="png")
    pyplot().close(picture)
    part.replace(path)
    return True


COLUMNS = 6  # of small panels in a row
ABOVE = 1.25  # of what no decay loses, where panels of losses end
FAR = 10.0  # factor from the best λ to the sides of a panel
Points = Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """One arm in a picture of small panels.

    Attributes:
        title: above it.
        lines: points by text.
        behind: those of L2 decay by text, pale; none in its own panel.
        levels: heights of dotted lines.
    """

    title: str
    lines: Mapping[str, Points]
    behind: Mapping[str, Points]
    levels: Sequence[float] = ()


def small_panels(made: Sequence[Panel], x: str, y: str, **axes: Any) -> Any:
    """A picture of a panel per arm, all with the same axes; `axes` go to the `set` of Matplotlib's."""
    plt = pyplot()
    lines, columns = math.ceil(len(made) / COLUMNS), min(COLUMNS, len(made))
    with plt.rc_context(RC_PARAMS):
        picture, panels = plt.subplots(
            *(lines, columns),
            figsize=(max(4.4, 1.75 * columns + 0.6), max(3.0, 1.45 * lines + 0.8)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, one in zip(panels.flat, made):
            for level in one.levels:
                panel.axhline(level, color=LIGHT, linestyle=":", linewidth=0.9)
            for (text, points), style in zip(one.lines.items(), LINES * len(one.lines)):
                if behind := one.behind.get(text):
                    pale = {"color": BARS[0], "linestyle": style["linestyle"], "linewidth": 2.4}
                    panel.plot(*zip(*behind), **pale)
                if points:
                    panel.plot(*zip(*points), label=text, markersize=3.2, linewidth=1.2, **style)
            panel.set_title(one.title, fontsize=7.5)
            panel.tick_params(labelsize=7, which="both")
        for i, panel in enumerate(panels.flat):
            panel.set_visible(i < len(made))
            panel.tick_params(labelbottom=i >= len(made) - columns)
        panels[0, 0].set(**axes)
        if len(made[0].lines) > 1:
            picture.legend(
                *panels[0, 0].get_legend_handles_labels(),
                loc="outside upper right",
                fontsize=8,
                ncols=len(LINES),
            )
        picture.supxlabel(x, fontsize=9)
        picture.supylabel(y, fontsize=9)
    return picture


def over_best(picture: Any, far: float = FAR) -> None:
    """Labels an axis of λ over the best λ, with this factor to its ends."""
    panel = picture.axes[0]
    panel.set(xscale="log", xlim=(1 / far, far))
    panel.set_xticks([0.25, 1, 4], ["¼", "1", "4"])
    panel.xaxis.set_minor_locator(pyplot().NullLocator())


def curves(found: Sequence[Row], path: pathlib.Path) -> bool:
    """A small panel per decay: mean losses of tuning less the lowest of L2 decay, over λ in units of the decay's best.

    A line per text. Behind it, pale, L2 decay on the same direction; dotted, no decay.
    """
    texts = list(dict.fromkeys(row.text for row in found))
    rows = {(row.arm, row.text): row for row in found}
    order = [row.arm for row in found if ARMS[row.arm].kind in ("decay", "muon")]
    order.sort(key=lambda arm: ARMS[arm].kind == "muon")
    shown = [a for a in dict.fromkeys(order) if any(_curve(rows, a, t) for t in texts)]
    if not shown:
        return False
    made = []
    for arm in shown:
        l2 = reference(arm)[0]
        best = ", ".join(f"{r.weight_decay:.2g}" for t in texts if (r := rows.get((arm, t))))
        levels = [x for t in texts if (x := _bare(rows, l2, t)) is not None]
        behind = {t: _curve(rows, l2, t) for t in texts if arm != l2}
        lines = {t: _curve(rows, arm, t) for t in texts}
        made.append(Panel(f"{ARMS[arm].title}\nbest λ: {best}", lines, behind, levels))
    top = ABOVE * max((level for panel in made for level in panel.levels), default=0.1)
    picture = small_panels(
        made,
        "decay coefficient λ over the best λ of each decay",
        "held-out loss less the best of L2 decay [nats/token]",
        ylim=(-0.15 * top, top),
    )
    over_best(picture)
    return save(picture, path)


def _curve(rows: Mapping[tuple[str, str], Row], arm: str, text: str) -> list[tuple[float, float]]:
    """λ over the best and loss less the lowest of L2 decay; empty without two points."""
    mine, l2 = rows.get((arm, text)), rows.get((reference(arm)[0], text))
    if mine is None or l2 is None or len(mine.curve) < 2 or len(l2.curve) < 2:
        return []
    lowest = min(l2.curve.values())
    points = [(x, y) for x, y in mine.curve.items() if math.isfinite(y) and x > 0]
    return [(x / mine.weight_decay, y - lowest) for x, y in points]


def _bare(rows: Mapping[tuple[str, str], Row], l2: str, text: str) -> float | None:
    """What no decay loses against L2 decay, in the runs that count."""
    bare, best = rows.get((reference(l2)[1] or "", text)), rows.get((l2, text))
    return None if bare is None or best is None else bare.mean - best.mean


def gains(found: Sequence[Row], texts: Sequence[str], path: pathlib.Path) -> bool:
    """Left, a forest of gains over L2 decay, a column per text; right, the factors of two of λ within 0.02 nats."""
    plt = pyplot()
    arms = [a for a in ARMS if any(row.arm == a for row in found)]
    far = [a for a in arms if a in ("none", "muon_none")]
    arms = [a for a in arms if a not in far]
    if not any(row.to_l2 for row in found if row.arm in arms):
        return False
    with plt.rc_context(RC_PARAMS | {"axes.axisbelow": True}):
        picture, panels = plt.subplots(
            *(1, len(texts) + 1),
            figsize=(3 + 2.8 * len(texts) + 2.2, 1.4 + 0.24 * len(arms)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, text in zip(panels[0], texts):
            panel.axvline(0, color="black", linewidth=1)
            for row in (r for r in found if r.text == text and r.arm in arms and r.to_l2):
                assert row.to_l2 is not None
                span = row.to_l2.interval
                if not math.isfinite(span.value) or not math.isfinite(span.low):
                    continue
                clear = row.verdict in ("better", "worse")
                color = ACCENT if ARMS[row.arm].kind == "muon" else DARK
                height = -arms.index(row.arm)
                panel.errorbar(
                    *(-span.value, height),
                    xerr=[[span.high - span.value], [span.value - span.low]],
                    fmt="o",
                    color=color,
                    markerfacecolor=color if clear else "white",
                    markersize=5,
                    capsize=3,
                    linewidth=1.4,
                )
            panel.set(title=text, xlabel="gain over L2 [nats/token]")
            panel.xaxis.set_major_locator(plt.MaxNLocator(5))
            panel.grid(axis="y", visible=False)
        side = panels[0, -1]
        width, named = 0.8 / len(texts), set()
        for i, text in enumerate(texts):
            for row in (r for r in found if r.text == text and r.arm in arms and r.forgiving):
                assert row.forgiving is not None
                doublings = row.forgiving.doublings
                if math.isfinite(doublings):
                    place = -arms.index(row.arm) + 0.2 - i * width
                    bar = {
                        "height": width,
                        "color": BARS[i % 2],
                        "edgecolor": DARK,
                        "linewidth": 0.5,
                    }
                    side.barh(place, doublings, label=text if text not in named else None, **bar)
                    named.add(text)
        side.set(title="Forgiveness", xlabel="factors of two of λ within 0.02 nats")
        side.grid(axis="y", visible=False)
        if named:
            side.legend(fontsize=7, loc="lower right")
        panels[0, 0].set_yticks([-i for i in range(len(arms))], [ARMS[a].title for a in arms])
        panels[0, 0].set_ylim(-len(arms) + 0.3, 0.7)
        words = "filled: better or worse than L2 decay on the same direction; open: not resolved"
        picture.suptitle(words, fontsize=8, x=0.01, ha="left")
        return save(picture, path)
