"""The page of weights in bfloat16: losses and sizes of the weights by λ and form of rounding, against float32."""

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
from train.study.regimes.bfloat16 import Bfloat16, decay_of
from train.study.regimes.figures import STYLES, save
from train.study.regimes.paired import Paired, paired
from train.study.regimes.repeated import AGAIN
from train.study.regimes.rounding import FORMS
from train.study.regimes.rows import GAIN
from train.study.regimes.work import Record


@dataclasses.dataclass(frozen=True)
class Point:
    """A form at one text, learning rate and λ.

    Attributes:
        form, text, learning_rate, shrink, weight_decay: which.
        losses, sizes: on held-out text, and root mean squares of the hidden matrices, by seed.
        to_float32: losses less those of float32 weights at the same point.
        p: of that, adjusted by Holm over the report.
    """

    form: str
    text: str
    learning_rate: float
    shrink: float
    weight_decay: float
    losses: dict[int, float]
    sizes: dict[int, float]
    to_float32: Paired | None = None
    p: float = math.nan

    @property
    def loss(self) -> float:
        return float(np.mean(list(self.losses.values())))

    @property
    def size(self) -> float:
        return float(np.mean(list(self.sizes.values())))

    @property
    def verdict(self) -> str:
        if self.to_float32 is None:
            return ""
        if self.p <= 0.05:
            return "better" if self.to_float32.interval.value < 0 else "worse"
        return f"differs by less than {self.to_float32.within:.3f}"


def points(regime: Bfloat16, records: Sequence[Record], again: bool = False) -> list[Point]:
    """Every point whose runs are all there; with `again` those of the A/A control."""
    found: list[Point] = []
    for text in regime.texts:
        for rate in regime.learning_rates:
            for shrink in regime.shrinks:
                wide: dict[int, float] = {}
                for form in FORMS:
                    decay = decay_of(shrink, rate)
                    where = (form, text, rate, decay)
                    names = ("arm", "text", "learning_rate", "weight_decay")
                    mine = [
                        r
                        for r in records
                        if tuple(r[name] for name in names) == where
                        and (r["seed"] % 1000 >= AGAIN) == again
                    ]
                    if len(mine) < regime.seeds:
                        continue
                    losses = {r["seed"] - AGAIN * again: r["loss"] for r in mine}
                    sizes = {r["seed"]: r["rms"] for r in mine}
                    wide = losses if form == "float32" else wide
                    less = paired(losses, wide) if form != "float32" and wide else None
                    found.append(Point(form, text, rate, shrink, decay, losses, sizes, less))
    family = {str(i): point.to_float32.p for i, point in enumerate(found) if point.to_float32}
    adjusted = holm(family)
    return [
        dataclasses.replace(point, p=adjusted.get(str(i), math.nan))
        for i, point in enumerate(found)
    ]


def failed(regime: Bfloat16, records: Sequence[Record]) -> list[str]:
    """Which controls do not hold, text by text."""
    found, other = points(regime, records), points(regime, records, again=True)
    rate, reasons = regime.learning_rates[-1], []
    for text in regime.texts:
        mine = [p for p in found if (p.form, p.text, p.learning_rate) == ("float32", text, rate)]
        same = [p for p in other if p.text == text]
        if len(mine) < len(regime.shrinks) or not same:
            reasons.append(f"{text}: the controls are not finished.")
            continue
        aa = paired(same[0].losses, mine[-1].losses)
        if aa is None or not aa.interval.holds(0.0):
            reasons.append(f"{text}: float32 weights against themselves do not hold 0.")
        bare = [p for p in mine if p.shrink == 0]
        best = min(mine, key=lambda p: p.loss)
        gain = paired(bare[0].losses, best.losses) if bare and bare[0] is not best else None
        if gain is None or not gain.interval.low > GAIN:
            reasons.append(
                f"{text}: this set-up does not test decay. L2 decay on float32 weights must beat no decay by more than"
                f" {GAIN} nats."
            )
    return reasons


def write_report(regime: Bfloat16, records: Sequence[Record], folder: pathlib.Path) -> list[str]:
    """Writes report.md and its picture; returns which controls failed."""
    found, reasons = points(regime, records), failed(regime, records)
    lines = ["# Weights stored in bfloat16", ""]
    if reasons:
        lines += ["**A control failed: nothing below may be claimed.**", ""]
        lines += [f"* {reason}" for reason in reasons] + [""]
    else:
        lines += ["All controls hold.", ""]
    title = "Loss and size of the weights by λ and form of rounding"
    if draw(regime, found, folder / "bfloat16.png"):
        lines += [f"![{title}](bfloat16.png)", ""]
    for text in regime.texts:
        lines += _table(text, [p for p in found if p.text == text])
    lines += _claims(found)
    write(folder / "report.md", "\n".join([*lines, how_it_was_made(regime, records, folder)]))
    return reasons


def _table(text: str, found: Sequence[Point]) -> list[str]:
    if not found:
        return []
    lines = [
        f"## {text}",
        "",
        "| η | λ | ηλ | form | held-out loss | less float32 | p (Holm) | RMS of hidden matrices | verdict |",
        "| --- |" + " --- |" * 8,
    ]
    for point in found:
        less = interval(point.to_float32.interval) if point.to_float32 else ""
        p = "" if math.isnan(point.p) else f"{point.p:.2g}"
        lines.append(
            f"| {point.learning_rate:g} | {point.weight_decay:g} | {point.shrink:g} | {point.form} | {point.loss:.4f} |"
            f" {less} | {p} | {point.size:.4f} | {point.verdict} |"
        )
    words = (
        "Losses in nats per token; differences seed by seed, 95 %, Student's t. Holm's correction is over all rows of"
        " the report. Where nothing is resolved the bound is of two one-sided tests of 5 %."
    )
    return [*lines, "", words, ""]


def _claims(found: Sequence[Point]) -> list[str]:
    """A shrink below half a unit in the last place is lost: sizes of the weights where ηλ < 2⁻⁹ and above."""
    lines = []
    for form in FORMS[1:]:
        for below in (True, False):
            ratios = []
            for point in found:
                if point.form == form and point.shrink > 0 and (point.shrink < 2**-9) == below:
                    where = (point.text, point.learning_rate, point.shrink)
                    wide = [
                        p
                        for p in found
                        if p.form == "float32" and (p.text, p.learning_rate, p.shrink) == where
                    ]
                    if wide:
                        ratios.append(point.size / wide[0].size)
            if ratios:
                side = "below" if below else "above"
                lines.append(
                    f"| {form} | {side} 2⁻⁹ | {min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} points |"
                )
    if not lines:
        return []
    heads = ["| form | ηλ | size of the weights over that of float32 |", "| --- | --- | --- |"]
    return ["## Does decay act?", "", *heads, *lines, ""]


def draw(regime: Bfloat16, found: Sequence[Point], path: pathlib.Path) -> bool:
    """Above losses and below sizes over ηλ; a column per text and learning rate, a line per form."""
    plt: Any = pyplot()
    columns = [(t, r) for t in regime.texts for r in regime.learning_rates]
    columns = [c for c in columns if any((p.text, p.learning_rate) == c for p in found)]
    if not columns:
        return False
    places = {s: i for i, s in enumerate(sorted(regime.shrinks))}
    with plt.rc_context(RC_PARAMS):
        picture, panels = plt.subplots(
            *(2, len(columns)),
            figsize=(2.9 * len(columns) + 1.5, 5),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        marks = dict(zip(FORMS, (STYLES[0], STYLES[7], STYLES[14], STYLES[21])))
        for j, (text, rate) in enumerate(columns):
            for form in FORMS:
                mine = [p for p in found if (p.text, p.learning_rate, p.form) == (text, rate, form)]
                x = [places[p.shrink] for p in mine]
                line = marks[form] | {"markersize": 4, "linewidth": 1.3}
                panels[0, j].plot(x, [p.loss for p in mine], label=form, **line)
                panels[1, j].plot(x, [p.size for p in mine], **line)
            panels[0, j].set_title(f"{text}, η = {rate:g}")
            panels[1, j].set_xticks(list(places.values()), [f"{s:g}" for s in places], rotation=45)
            panels[1, j].set_xlabel("shrink per step ηλ")
        panels[0, 0].set_ylabel("held-out loss [nats/token]")
        panels[1, 0].set_ylabel("RMS of hidden matrices")
        panels[0, -1].legend(fontsize=7)
        return save(picture, path)
