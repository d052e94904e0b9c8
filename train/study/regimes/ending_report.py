"""The page of the end of the schedule: how far gradients over weights rise in the last tenth, and the losses."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.run.figures import RC_PARAMS, pyplot
from train.run.folder import write
from train.study.compare.statistics import holm
from train.study.compare.verdicts import interval
from train.study.facts import how_it_was_made
from train.study.regimes.arms import ARMS
from train.study.regimes.ending import Ending
from train.study.regimes.figures import STYLES, save
from train.study.regimes.paired import Paired, paired
from train.study.regimes.repeated import AGAIN
from train.study.regimes.tenths import PARTS
from train.study.regimes.work import Record

MIDDLE = PARTS // 2 - 1  # the tenth that the last one is compared with


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm on one text at one λ.

    Attributes:
        arm, text, weight_decay: which.
        losses: on held-out text, by seed.
        rises: log2 of gradients over weights in the last tenth, less that in the middle, by seed.
        curve: mean log2 of gradients over weights in every tenth.
    """

    arm: str
    text: str
    weight_decay: float
    losses: dict[int, float]
    rises: dict[int, float]
    curve: np.ndarray

    @property
    def loss(self) -> float:
        return float(np.mean(list(self.losses.values())))


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm on one text at its best λ.

    Attributes:
        point: which.
        rise: of the ratio.
        less: the rise less that of L2 decay at its own best λ; None for that.
        p: of `less`, adjusted by Holm; nan without it.
    """

    point: Point
    rise: Paired
    less: Paired | None
    p: float = math.nan

    @property
    def verdict(self) -> str:
        if self.less is None:
            return ""
        if self.p <= 0.05:
            return "rises less" if self.less.interval.value < 0 else "rises more"
        return f"rise differs by less than {self.less.within:.2f}"


def points(regime: Ending, records: Sequence[Record], again: bool = False) -> list[Point]:
    """Every point whose runs are all there; with `again` those of the A/A control."""
    found = []
    for text in regime.texts:
        for arm in regime.names:
            for rate, decay in regime.points(arm):
                names = ("arm", "text", "learning_rate", "weight_decay")
                mine = [
                    r
                    for r in records
                    if tuple(r[name] for name in names) == (arm, text, rate, decay)
                    and (r["seed"] % 1000 >= AGAIN) == again
                ]
                if len(mine) < regime.seeds:
                    continue
                ratios = {
                    r["seed"] - AGAIN * again: np.array(r["log_ratios"]) / math.log(2) for r in mine
                }
                rises = {seed: float(x[-1] - x[MIDDLE]) for seed, x in ratios.items()}
                losses = {r["seed"] - AGAIN * again: r["loss"] for r in mine}
                curve = np.mean(list(ratios.values()), axis=0)
                found.append(Point(arm, text, decay, losses, rises, curve))
    return found


def rows(regime: Ending, records: Sequence[Record]) -> list[Row]:
    """Arms text by text, each at the λ of its lowest loss; p adjusted by Holm."""
    found, made = points(regime, records), []
    for text in regime.texts:
        best = {
            arm: min(mine, key=lambda p: p.loss)
            for arm in regime.names
            if (mine := [p for p in found if (p.arm, p.text) == (arm, text)])
        }
        l2 = best.get("l2")
        for arm, point in best.items():
            rise = paired(point.rises, dict.fromkeys(point.rises, 0.0))
            assert rise is not None
            less = paired(point.rises, l2.rises) if l2 is not None and arm != "l2" else None
            made.append(Row(point, rise, less))
    adjusted = holm({str(i): row.less.p for i, row in enumerate(made) if row.less is not None})
    return [
        dataclasses.replace(row, p=adjusted.get(str(i), math.nan)) for i, row in enumerate(made)
    ]


def failed(regime: Ending, records: Sequence[Record]) -> list[str]:
    """Which controls do not hold, text by text."""
    found, other, reasons = points(regime, records), points(regime, records, True), []
    for text in regime.texts:
        same = [p for p in other if p.text == text]
        mine = [p for p in found if (p.arm, p.text) == ("l2", text)]
        if not same or len(mine) < len(regime.points("l2")):
            reasons.append(f"{text}: the control is not finished.")
            continue
        first = next(p for p in mine if p.weight_decay == same[0].weight_decay)
        for word, of in (("loss", "losses"), ("rise of the ratio", "rises")):
            aa = paired(getattr(same[0], of), getattr(first, of))
            if aa is None or not aa.interval.holds(0.0):
                reasons.append(f"{text}: the {word} of L2 decay against itself does not hold 0.")
    return reasons


def write_report(regime: Ending, records: Sequence[Record], folder: pathlib.Path) -> list[str]:
    """Writes report.md and its picture; returns which controls failed."""
    found, reasons = points(regime, records), failed(regime, records)
    lines = ["# The end of the schedule", ""]
    if reasons:
        lines += ["**A control failed: nothing below may be claimed.**", ""]
        lines += [f"* {reason}" for reason in reasons] + [""]
    else:
        lines += ["The control holds.", ""]
    title = "Gradients over weights in tenths of the run"
    if draw(regime, found, folder / "ending.png"):
        lines += [f"![{title}](ending.png)", ""]
    made = rows(regime, records)
    for text in regime.texts:
        lines += _table(text, [row for row in made if row.point.text == text])
    lines += _claims(regime, made)
    write(folder / "report.md", "\n".join([*lines, how_it_was_made(regime, records, folder)]))
    return reasons


def _table(text: str, found: Sequence[Row]) -> list[str]:
    if not found:
        return []
    lines = [
        f"## {text}",
        "",
        "| arm | best λ of three | held-out loss | rise of the ratio, log₂ | less L2's | p (Holm) | verdict |",
        "| --- |" + " --- |" * 6,
    ]
    for row in found:
        point = row.point
        less = interval(row.less.interval, 2) if row.less else ""
        p = "" if math.isnan(row.p) else f"{row.p:.2g}"
        lines.append(
            f"| {ARMS[point.arm].title} | {point.weight_decay:g} | {point.loss:.4f} |"
            f" {interval(row.rise.interval, 2)} | {less} | {p} | {row.verdict} |"
        )
    words = (
        "The rise: log₂ of the norm of gradients over that of weights, mean over hidden matrices, in the last tenth of"
        " the run less that in the fifth. Differences seed by seed, 95 %, Student's t; Holm's correction is over all"
        " arms and texts. Each arm at the λ of its lowest loss. Losses are compared on repeated text, where every arm"
        " is tuned."
    )
    return [*lines, "", words, ""]


def _claims(regime: Ending, found: Sequence[Row]) -> list[str]:
    mine = {row.point.text: row for row in found if row.point.arm == "corrected" and row.less}
    if len(mine) < len(regime.texts):
        return []
    ours = "; ".join(
        f"{text} {interval(row.less.interval, 2)}" for text, row in mine.items() if row.less
    )
    less = all(row.p <= 0.05 and row.less and row.less.interval.value < 0 for row in mine.values())
    more = all(row.p <= 0.05 and row.less and row.less.interval.value > 0 for row in mine.values())
    verdict = "reproduced" if less else "contradicted at this scale" if more else "not resolved"
    return [
        "## The claims of the papers",
        "",
        "| claim | ours: rise less that of L2, log₂ | verdict |",
        "| --- | --- | --- |",
        f"| AdamC (2506.02285): corrected decay prevents the rise of gradients at the end | {ours} | {verdict} |",
        "",
    ]


def draw(regime: Ending, found: Sequence[Point], path: pathlib.Path) -> bool:
    """A column per text, a line per arm at the λ of its lowest loss."""
    plt: Any = pyplot()
    texts = [text for text in regime.texts if any(p.text == text for p in found)]
    if not texts:
        return False
    with plt.rc_context(RC_PARAMS):
        picture, panels = plt.subplots(
            *(1, len(texts)),
            figsize=(3.6 * len(texts) + 2, 3.6),
            squeeze=False,
            layout="constrained",
        )
        for panel, text in zip(panels[0], texts):
            for arm, style in zip(regime.names, STYLES * 3):
                mine = [p for p in found if (p.arm, p.text) == (arm, text)]
                if mine:
                    best = min(mine, key=lambda p: p.loss)
                    line = style | {"markersize": 3.5, "linewidth": 1.2}
                    if arm == "l2":
                        line |= {"linewidth": 2.6, "color": "black", "linestyle": "-"}
                    x = (np.arange(PARTS) + 0.5) / PARTS
                    panel.plot(x, best.curve, label=ARMS[arm].title, **line)
            panel.set(title=text, xlabel="share of the run")
        panels[0, 0].set_ylabel("log₂ of ‖gradient‖/‖weights‖")
        panels[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return save(picture, path)
