"""From the lines of results.jsonl to what may be said: one row per arm and text, and whether the controls hold.

A verdict needs the interval of the speed-up and Holm's correction over all arms and texts of the report to agree;
otherwise the arm is "not resolved". Nothing is said of an arm whose search ended at an edge.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.study.compare import statistics
from train.study.compare.arms import ARMS, CONTROLS
from train.study.compare.tuning import Tuned, tuned

MUON = 1.2  # what the speed-up of the positive control must exceed
MARGIN = 0.03  # nats per token that a method which only saves something else may lose
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm on one text.

    Attributes:
        arm, text: which.
        learning_rate, weight_decay: it was run with.
        tuned: how that point was found; None if it was stored.
        losses: of the runs that count.
        difference: of those to AdamW's with the same budget; None while there are fewer than two of either.
        speedup: likewise.
        reach: of the ladder: the smallest and the largest speed-up that can be read off it.
        to_muon: of the losses to Muon's, for optimizers.
        p: of the difference, adjusted by Holm over the report; nan for controls.
        curves: training losses, [seeds, points].
    """

    arm: str
    text: str
    learning_rate: float
    weight_decay: float
    tuned: Tuned | None
    losses: tuple[float, ...]
    difference: statistics.Difference | None
    speedup: statistics.Interval | None
    reach: tuple[float, float]
    to_muon: statistics.Difference | None
    p: float
    curves: np.ndarray

    @property
    def diverged(self) -> int:
        return sum(not math.isfinite(loss) for loss in self.losses)

    @property
    def ratio(self) -> str:
        """The speed-up in words."""
        if self.speedup is None:
            return ""
        low, high = self.reach

        def said(x: float) -> str:
            sign = "≤ " if 0 < x <= low * (1 + 1e-9) else "≥ " if x >= high * (1 - 1e-9) else ""
            return f"{sign}{x:.2f}"

        ends = f"{said(self.speedup.low)} to {said(self.speedup.high)}"
        return f"{said(self.speedup.value)} ({ends})"

    @property
    def verdict(self) -> str:
        if self.speedup is None:
            return "not finished"
        if self.diverged:
            return f"diverged ({self.diverged} of {len(self.losses)})"
        if self.tuned is not None and self.tuned.edges:
            return f"not tuned: {self.tuned.edges} at the edge"
        if math.isnan(self.speedup.value):
            return "no ladder"
        significant = self.p <= 0.05 or self.arm in CONTROLS
        if self.speedup.holds(1.0) or not significant:
            return "not resolved"
        return "faster" if self.speedup.value > 1 else "slower"

    @property
    def not_inferior(self) -> bool:
        """Whether the loss is less than `MARGIN` above AdamW's, one-sided with 95 %."""
        return self.difference is not None and self.difference.upper < MARGIN


def ladder_losses(results: Sequence[Record], text: str) -> dict[int, list[float]]:
    """AdamW's losses by budget."""
    found: dict[int, list[float]] = {}
    for record in results:
        if (record["arm"], record["text"], record["stage"]) == ("adamw", text, "result"):
            found.setdefault(record["steps"], []).append(record["loss"])
    return dict(sorted(found.items()))


def rows(results: Sequence[Record], steps: int) -> list[Row]:
    """All arms that have results, in the order of `ARMS`, text by text; the budget of the arms is `steps`."""
    found = []
    for text in dict.fromkeys(record["text"] for record in results):
        ladder = ladder_losses(results, text)
        muon: tuple[float, ...] = ()
        for arm in ARMS:
            mine = [r for r in results if (r["arm"], r["text"]) == (arm, text)]
            counted = [r for r in mine if r["stage"] == "result" and r["steps"] == steps]
            if counted:
                found.append(_row(arm, text, mine, counted, ladder, steps, muon))
                muon = found[-1].losses if arm == "muon" else muon
    family = {
        (row.arm, row.text): row.difference.p
        for row in found
        if row.difference is not None and row.arm not in CONTROLS
    }
    adjusted = statistics.holm({f"{a}\n{t}": p for (a, t), p in family.items()})
    return [
        dataclasses.replace(row, p=adjusted.get(f"{row.arm}\n{row.text}", math.nan))
        for row in found
    ]


def _row(
    arm: str,
    text: str,
    mine: Sequence[Record],
    counted: Sequence[Record],
    ladder: Mapping[int, Sequence[float]],
    steps: int,
    muon: Sequence[float],
) -> Row:
    losses = tuple(r["loss"] for r in counted)
    besides = ARMS[arm].kind == "optimizer" and min(len(losses), len(muon)) > 1
    reference = ladder.get(steps, ())
    enough = arm != "adamw" and min(len(losses), len(reference)) > 1
    whole = enough and len(ladder) > 2
    trials = [r for r in mine if r["stage"] == "trial"]
    return Row(
        *(arm, text, counted[0]["learning_rate"], counted[0]["weight_decay"]),
        tuned(trials) if trials else None,
        losses,
        statistics.welch(losses, reference) if enough else None,
        statistics.speedup(ladder, losses, steps) if whole else None,
        (min(ladder, default=steps) / steps, max(ladder, default=steps) / steps),
        statistics.welch(losses, muon) if besides else None,
        math.nan,
        np.array([r["curve"] for r in counted], float),
    )


def void(found: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """Why nothing in the report may be believed; empty if both controls hold on every text."""
    table = {(row.arm, row.text): row for row in found}
    reasons = []
    for text in texts:
        adamw, again, muon = (table.get((name, text)) for name in CONTROLS)
        for name, row in zip(CONTROLS, (adamw, again, muon)):
            if row is None or (row.speedup is None and name != "adamw"):
                reasons.append(f"{text}: the control {ARMS[name].title} is not finished.")
            elif row.tuned is not None and row.tuned.edges:
                reasons.append(
                    f"{text}: the search of {ARMS[name].title} ended at an edge"
                    f" ({row.tuned.edges}); its grid has to be moved."
                )
        if again and again.speedup and not again.speedup.holds(1.0):
            reasons.append(
                f"{text}: AdamW against itself has the speed-up {again.ratio},"
                " which does not hold 1."
            )
        if muon and muon.speedup and not (muon.speedup.value > MUON and muon.speedup.low > 1):
            reasons.append(
                f"{text}: Muon has the speed-up {muon.ratio}; it must exceed {MUON},"
                " with an interval above 1."
            )
    return reasons


def overall(found: Sequence[Row], arm: str, texts: Sequence[str]) -> str:
    """The verdict of an arm over all texts: a claim needs every one."""
    verdicts = {row.text: row.verdict for row in found if row.arm == arm}
    if len(verdicts) < len(texts):
        return "not finished"
    said = set(verdicts.values())
    if len(said) == 1:
        return said.pop()
    return "not resolved (" + ", ".join(f"{v} on {t}" for t, v in verdicts.items()) + ")"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time of a step over AdamW's: of the best rounds, and the smallest and largest of any; `clock` is CPU or wall."""

    ratio: float
    low: float
    high: float
    clock: str

    def __str__(self) -> str:
        spread = f" ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else ""
        return f"{self.ratio:.2f}{spread}"


def costs(results: Sequence[Record]) -> dict[str, Cost]:
    """By arm."""
    found = {}
    for r in (r for r in results if r["stage"] == "cost"):
        ratio = r["seconds_per_step"] / r["adamw_seconds_per_step"]
        all_of_them = [ratio, *r.get("ratios", ())]
        found[r["arm"]] = Cost(ratio, min(all_of_them), max(all_of_them), r["clock"])
    return found


def interval(x: statistics.Interval, digits: int = 4) -> str:
    return f"{x.value:.{digits}f} ({x.low:.{digits}f} to {x.high:.{digits}f})"
