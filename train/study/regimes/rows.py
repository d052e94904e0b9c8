"""From the lines of repeated text to one row per arm and text: losses, differences seed by seed, forgiveness."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from train.study.compare.statistics import holm
from train.study.compare.tuning import FIRST_SEED
from train.study.regimes.arms import ARMS
from train.study.regimes.paired import Forgiveness, Luck, Paired, forgiveness, luck, paired
from train.study.regimes.repeated import AGAIN, Repeated
from train.study.regimes.work import Record

LEVEL = 0.05  # of Holm's adjusted p
GAIN = 0.1  # nats by which L2 decay has to beat none, or the set-up does not test decay
SEEDS = 3  # fewest pairs for a verdict


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm on one text.

    Attributes:
        arm, text: which.
        learning_rate, weight_decay: of the runs that count.
        edges: "η" and "λ" where the search has not found a neighbour on both sides.
        losses: on held-out text, by seed [nats per token].
        training: means over the last twentieth of the training.
        curve: mean losses of tuning by λ, at the learning rate of the finer grid next to this one.
        to_l2: losses less those of L2 decay on the same direction, the mean over its searches; of optimizers, less
            those of AdamW with L2.
        to_none: losses less those of no decay on the same direction; None for optimizers.
        forgiving: the range of λ that costs little.
        p: of `to_l2`, adjusted by Holm over the report; nan for controls.
    """

    arm: str
    text: str
    learning_rate: float
    weight_decay: float
    edges: str
    losses: dict[int, float]
    training: float
    curve: dict[float, float]
    to_l2: Paired | None
    to_none: Paired | None
    forgiving: Forgiveness | None
    p: float = math.nan

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def verdict(self) -> str:
        """better or worse than L2 decay, or a bound on the difference."""
        if self.to_l2 is None or self.to_l2.seeds < SEEDS:
            return "not finished"
        if not math.isfinite(self.mean):
            bad = sum(not math.isfinite(loss) for loss in self.losses.values())
            return f"diverged ({bad} of {len(self.losses)})"
        if "η" in self.edges:
            return "not tuned: η at the edge"
        if self.p <= LEVEL:
            return "better" if self.to_l2.interval.value < 0 else "worse"
        return f"differs by less than {self.to_l2.within:.3f}"


def reference(arm: str) -> tuple[str, str | None]:
    """The arms with L2 decay and without decay that an arm is compared with."""
    kind = ARMS[arm].kind
    if kind == "muon":
        return "muon_l2", "muon_none"
    return "l2", None if kind == "optimizer" else "none"


def counted(
    records: Sequence[Record], arm: str, text: str, one_pass: bool = False
) -> dict[int, float]:
    """Losses of the runs that count, by seed; on repeated text, or in one pass over all of it."""
    return {
        r["seed"]: r["loss"]
        for r in records
        if (r["arm"], r["text"], r["unique"] == 0) == (arm, text, one_pass)
        and r["seed"] < FIRST_SEED
    }


def searches(
    regime: Repeated, records: Sequence[Record], arm: str, text: str
) -> list[dict[int, float]]:
    """Losses of L2 decay at the points of all its searches on a text, those that are finished."""
    found = [counted(records, name, text) for name in search_names(regime, arm)]
    return [losses for losses in found if len(losses) == regime.seeds]


def search_names(regime: Repeated, arm: str) -> list[str]:
    """An arm, and the names of L2 decay at the points of its further searches."""
    return [arm, *(name for name in regime.repeats if name.startswith(f"{arm}_tuned"))]


def mean_over(searches: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Of several searches, seed by seed."""
    return {seed: sum(one[seed] for one in searches) / len(searches) for seed in searches[0]}


def reference_losses(
    regime: Repeated, records: Sequence[Record], arm: str, text: str
) -> dict[int, float]:
    """Of L2 decay: the mean over its searches, seed by seed."""
    found = searches(regime, records, arm, text)
    return mean_over(found) if found else counted(records, arm, text)


def between_directions(
    regime: Repeated, records: Sequence[Record], text: str, arm: str, other: str
) -> Paired | None:
    """L2 decay on one direction less that on another, each the mean over its searches."""
    chance, tunings = luck_of(regime, records), len(regime.repeats) // 2 + 1
    one = chance.variance / (1 + 1 / tunings)  # of one search
    first, second = (reference_losses(regime, records, a, text) for a in (arm, other))
    return paired(first, second, dataclasses.replace(chance, variance=2 * one / tunings))


def luck_of(regime: Repeated, records: Sequence[Record]) -> Luck:
    """Of a search in this regime, from all texts and directions."""
    groups = [searches(regime, records, a, t) for a in ("l2", "muon_l2") for t in regime.texts]
    return luck([group for group in groups if len(group) > 1])


def rows(regime: Repeated, records: Sequence[Record]) -> list[Row]:
    """All arms whose runs that count are there, text by text."""
    found: list[Row] = []
    chance = luck_of(regime, records)
    for text in regime.texts:
        for arm in regime.names:
            losses = counted(records, arm, text)
            if len(losses) == regime.seeds:
                found.append(_row(regime, records, arm, text, losses, chance))
    family = {
        f"{row.arm}\n{row.text}": row.to_l2.p
        for row in found
        if row.to_l2 is not None and row.arm not in ("l2", "muon_l2")
    }
    adjusted = holm(family)
    return [
        dataclasses.replace(row, p=adjusted.get(f"{row.arm}\n{row.text}", math.nan))
        for row in found
    ]


def _row(
    regime: Repeated,
    records: Sequence[Record],
    arm: str,
    text: str,
    losses: dict[int, float],
    chance: Luck,
) -> Row:
    mine = [r for r in records if (r["arm"], r["text"]) == (arm, text)]
    results = [r for r in mine if r["seed"] < FIRST_SEED and r["unique"] > 0]
    rate, decay = results[0]["learning_rate"], results[0]["weight_decay"]
    tuning = regime.tuning(arm, text)
    curve = {} if regime.points else tuning.curve(records)
    l2, none = reference(arm)
    return Row(
        *(arm, text, rate, decay),
        "" if regime.points else tuning.edges(records),
        losses,
        sum(r["training_loss"] for r in results) / len(results),
        curve,
        paired(losses, reference_losses(regime, records, l2, text), chance) if arm != l2 else None,
        paired(losses, counted(records, none, text), chance) if none and arm != none else None,
        forgiveness(curve),
    )


def again(records: Sequence[Record], text: str) -> Paired | None:
    """L2 decay against itself: other seeds at the same point, paired in order."""
    other = {seed - AGAIN: loss for seed, loss in counted(records, "again", text).items()}
    return paired(other, counted(records, "l2", text))


def failed(regime: Repeated, found: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """Which controls do not hold, text by text; empty if all do."""
    table: Mapping[tuple[str, str], Row] = {(row.arm, row.text): row for row in found}
    reasons = []
    for text in regime.texts:
        none, l2, muon = (table.get((arm, text)) for arm in ("none", "l2", "muon_l2"))
        same = again(records, text)
        first, second = (counted(records, arm, text, True) for arm in ("muon_l2", "l2"))
        better = paired(first, second)
        if none is None or l2 is None or muon is None or same is None or better is None:
            reasons.append(f"{text}: the controls are not finished.")
            continue
        if "η" in l2.edges or "η" in muon.edges or "η" in none.edges:
            reasons.append(
                f"{text}: the search of a control ended at an edge of its learning rates."
            )
        if not same.interval.holds(0.0):
            reasons.append(
                f"{text}: L2 decay against itself differs by {same.interval.value:.4f}"
                f" ({same.interval.low:.4f} to {same.interval.high:.4f}), which does not hold 0."
            )
        gain = paired(counted(records, "none", text), l2.losses)
        if gain is None or not gain.interval.low > GAIN:
            low = "nan" if gain is None else f"{gain.interval.low:.3f}"
            reasons.append(
                f"{text}: this set-up does not test decay. L2 decay at its best must beat no decay by more than"
                f" {GAIN} nats; the interval begins at {low}."
            )
        if not better.interval.high < 0:
            reasons.append(
                f"{text}: in one pass over the text, Muon must beat AdamW; the interval of the difference ends at"
                f" {better.interval.high:.3f}."
            )
    return reasons


def overall(found: Sequence[Row], arm: str, texts: Sequence[str]) -> str:
    """The verdict of an arm over all texts: a claim needs every one."""
    mine = {row.text: row for row in found if row.arm == arm}
    if len(mine) < len(texts):
        return "not finished"
    verdicts = {row.verdict for row in mine.values()}
    if len(verdicts) == 1:
        return verdicts.pop()
    bounds = [row.to_l2.within for row in mine.values() if row.to_l2 is not None]
    if all(v.startswith("differs") for v in verdicts):
        return f"differs by less than {max(bounds):.3f}"
    clear = ", ".join(f"{row.verdict} on {t}" for t, row in mine.items())
    return f"not resolved on both ({clear})"
