"""Pictures of the regimes: loss over λ, and gains over L2 decay with the forgiveness of every arm."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from train.run.figures import RC_PARAMS, pyplot
from train.study.regimes.arms import ARMS
from train.study.regimes.rows import Row

DARK, LIGHT, ACCENT = "#10305a", "#8a8a8a", "#b4521e"
BARS = ("#a9c3df", "#d9d9d9")  # of two texts
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


def curves(found: Sequence[Row], path: pathlib.Path) -> bool:
    """Mean held-out loss of tuning over λ; a column per text, above decays on Adam, below on Muon. Dashed: no decay."""
    plt = pyplot()
    texts = list(dict.fromkeys(row.text for row in found))
    shown = [row for row in found if ARMS[row.arm].kind in ("decay", "muon") and len(row.curve) > 1]
    kinds = [k for k in ("decay", "muon") if any(ARMS[row.arm].kind == k for row in shown)]
    if not shown:
        return False
    with plt.rc_context(RC_PARAMS):
        picture, panels = plt.subplots(
            *(len(kinds), len(texts)),
            figsize=(4.6 * len(texts) + 2, 3.6 * len(kinds)),
            sharey="col",
            squeeze=False,
            layout="constrained",
        )
        for i, kind in enumerate(kinds):
            names = list(dict.fromkeys(row.arm for row in shown if ARMS[row.arm].kind == kind))
            style = dict(zip(names, STYLES * 3))
            for j, text in enumerate(texts):
                panel = panels[i, j]
                for row in (r for r in shown if r.text == text and r.arm in style):
                    points = [(x, y) for x, y in row.curve.items() if math.isfinite(y)]
                    line = style[row.arm] | {"markersize": 3.5, "linewidth": 1.2}
                    if row.arm in ("l2", "muon_l2"):
                        line |= {"linewidth": 2.6, "color": "black", "linestyle": "-", "zorder": 5}
                    panel.plot(*zip(*points), label=ARMS[row.arm].title, **line)
                bare = "none" if kind == "decay" else "muon_none"
                for row in (r for r in found if (r.arm, r.text) == (bare, text)):
                    panel.axhline(row.mean, color=LIGHT, linestyle="--", linewidth=1)
                    panel.annotate(
                        "no decay",
                        (0.01, row.mean),
                        xycoords=("axes fraction", "data"),
                        fontsize=7,
                        va="bottom",
                    )
                panel.set(xscale="log", title=text if i == 0 else "")
                panel.set_xlabel("decay coefficient λ, in the unit of each arm")
            panels[i, 0].set_ylabel("held-out loss [nats/token]")
            panels[i, -1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return save(picture, path)


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
        words = "filled: better or worse than L2 decay on the same direction; open: not resolved"
        picture.suptitle(words, fontsize=8, x=0.01, ha="left")
        return save(picture, path)
