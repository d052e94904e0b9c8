"""The page of compressed weights: losses after pruning and rounding by arm, less those of L2 decay."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from train.run.folder import write
from train.study.compare.statistics import Interval, holm
from train.study.compare.verdicts import interval
from train.study.facts import how_it_was_made
from train.study.regimes import figures
from train.study.regimes.arms import ARMS
from train.study.regimes.compress import Compress, regime_of
from train.study.regimes.paired import CLOSE, Paired, luck, paired
from train.study.regimes.repeated import Repeated
from train.study.regimes.rows import mean_over, reference, search_names
from train.study.regimes.work import Record

HALF = 0.5
L2 = ("l2", "muon_l2")
Measure = Callable[[Record], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm on one text; every difference is from L2 decay on the same direction, the mean over its searches.

    Attributes:
        arm, text: which.
        records: of its weights, by seed.
        pruned: loss at the share next to one half.
        free: share that can be pruned for `CLOSE` nats more than without.
        int4: loss with 4 bits.
        bits: per weight, packed.
        p: of `pruned`, adjusted by Holm.
    """

    arm: str
    text: str
    records: Mapping[int, Record]
    pruned: Paired | None
    free: Paired | None
    int4: Paired | None
    bits: Paired | None
    p: float = math.nan

    @property
    def verdict(self) -> str:
        if self.pruned is None:
            return ""
        if self.p <= 0.05:
            return "better" if self.pruned.interval.value < 0 else "worse"
        return f"differs by less than {self.pruned.within:.3f}"

    def mean(self, of: Measure) -> float:
        return float(np.mean([of(r) for r in self.records.values()]))


def at_half(shares: Sequence[float]) -> int:
    """The share next to one half."""
    return min(range(len(shares)), key=lambda i: abs(shares[i] - HALF))


def free_share(record: Record, shares: Sequence[float]) -> float:
    """The share that can be pruned for `CLOSE` nats, on straight lines between the shares that were tried."""
    x, y = [0.0, *shares], [record["loss"], *record["pruned"]]
    for i in range(1, len(x)):
        if not y[i] <= record["loss"] + CLOSE:
            rise = y[i] - y[i - 1]
            part = (record["loss"] + CLOSE - y[i - 1]) / rise if math.isfinite(rise) else 0.0
            return x[i - 1] + part * (x[i] - x[i - 1])
    return x[-1]


def rows(regime: Compress, records: Sequence[Record]) -> list[Row]:
    """All arms text by text."""
    before, found = regime_of(regime.from_folder), []
    half = at_half(regime.shares)
    measured: tuple[Measure, ...] = (
        lambda r: r["pruned"][half],
        lambda r: free_share(r, regime.shares),
        lambda r: r["int4"],
        lambda r: r["bits"],
    )
    for text in before.texts:
        for arm in before.names:
            mine = _by_seed(records, arm, text)
            if len(mine) >= 2:
                pruned, free, int4, bits = (
                    _less_l2(before, records, arm, text, of) for of in measured
                )
                found.append(Row(arm, text, mine, pruned, free, int4, bits))
    adjusted = holm({str(i): row.pruned.p for i, row in enumerate(found) if row.pruned})
    return [
        dataclasses.replace(row, p=adjusted.get(str(i), math.nan)) for i, row in enumerate(found)
    ]


def _less_l2(
    before: Repeated, records: Sequence[Record], arm: str, text: str, of: Measure
) -> Paired | None:
    """What is measured of an arm less that of L2 decay; the luck of its searches is in the interval."""
    l2 = reference(arm)[0]
    groups = {(a, t): _searches(before, records, a, t, of) for a in L2 for t in before.texts}
    if arm == l2 or not groups[l2, text]:
        return None
    mine = {seed: of(r) for seed, r in _by_seed(records, arm, text).items()}
    chance = luck([group for group in groups.values() if len(group) > 1])
    return paired(mine, mean_over(groups[l2, text]), chance)


def _searches(
    before: Repeated, records: Sequence[Record], arm: str, text: str, of: Measure
) -> list[dict[int, float]]:
    """What is measured of L2 decay at the points of all its searches, those that are finished."""
    found = [_by_seed(records, name, text) for name in search_names(before, arm)]
    return [{s: of(r) for s, r in own.items()} for own in found if len(own) == before.seeds]


def _by_seed(records: Sequence[Record], arm: str, text: str) -> dict[int, Record]:
    return {r["seed"]: r for r in records if (r["arm"], r["text"]) == (arm, text)}


def failed(regime: Compress, records: Sequence[Record]) -> list[str]:
    """Whether L2 decay differs from itself: the first half of its seeds from the other half."""
    before, reasons = regime_of(regime.from_folder), []
    half = at_half(regime.shares)
    for text in before.texts:
        l2 = [r["pruned"][half] for _, r in sorted(_by_seed(records, "l2", text).items())]
        middle = len(l2) // 2
        aa = paired(dict(enumerate(l2[:middle])), dict(enumerate(l2[middle:])))
        if aa is None and len(l2) != before.seeds:
            reasons.append(f"{text}: the weights of L2 decay are not there.")
        elif aa is not None and not aa.interval.holds(0.0):
            reasons.append(f"{text}: two halves of the seeds of L2 decay differ.")
    return reasons


def write_report(regime: Compress, records: Sequence[Record], folder: pathlib.Path) -> list[str]:
    """Writes report.md and its picture; returns which controls failed."""
    found, reasons = rows(regime, records), failed(regime, records)
    lines = ["# Pruned, rounded and compressed weights", ""]
    if reasons:
        lines += ["**A control failed: nothing below may be claimed.**", ""]
        lines += [f"* {reason}" for reason in reasons] + [""]
    title = "Loss added by pruning"
    if draw(regime, found, folder / "compress.png"):
        lines += [f"![{title}](compress.png)", ""]
    lines += _summary(regime, found, records)
    for text in dict.fromkeys(row.text for row in found):
        lines += _table(regime, text, [row for row in found if row.text == text])
    lines += _claims(regime, found)
    write(folder / "report.md", "\n".join([*lines, how_it_was_made(regime, records, folder)]))
    return reasons


def _summary(regime: Compress, found: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """The shares that can be pruned, and what half of the weights are worth, on all texts."""
    before = regime_of(regime.from_folder)

    def share(row: Row) -> float:
        """Of an arm; of L2 decay, the mean over its searches."""
        of = lambda r: free_share(r, regime.shares)
        searches = _searches(before, records, row.arm, row.text, of)
        return float(np.mean([list(one.values()) for one in searches] or [row.mean(of)]))

    texts = list(dict.fromkeys(row.text for row in found))
    table = {(row.arm, row.text): row for row in found}
    heads = [f"pruned for {CLOSE:g} nats, {t}" for t in texts] + [f"less L2's, {t}" for t in texts]
    lines = [
        f"| arm | {' | '.join(heads)} | half pruned |",
        "| --- |" + " --- |" * (len(heads) + 1),
    ]
    for arm in dict.fromkeys(row.arm for row in found):
        mine = [table.get((arm, text)) for text in texts]
        cells = [f"{100 * share(row):.0f} %" if row else "" for row in mine]
        cells += [interval(row.free.interval, 2) if row and row.free else "" for row in mine]
        verdicts = {row.verdict if row else "" for row in mine}
        clear = len(verdicts) == 1 and verdicts <= {"better", "worse", ""}
        said = verdicts.pop() if clear else "not resolved on every text"
        lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} | {said} |")
    words = (
        f"The share of every matrix that can be pruned by size until the loss rises by {CLOSE:g} nats, and that less L2"
        " decay's share, with 95 % intervals, not corrected. Half pruned: the verdict on the loss with half of all"
        " weights pruned, less L2 decay's, corrected by Holm. Arms on Muon are compared with L2 decay on Muon."
    )
    return [*lines, "", words, ""]


def _table(regime: Compress, text: str, found: Sequence[Row]) -> list[str]:
    half = at_half(regime.shares)
    share = regime.shares[half]
    lines = [
        f"## {text}",
        "",
        f"| arm | loss | with {100 * share:g} % pruned | less L2's | p (Holm) | share pruned for {CLOSE:g} nats |"
        " less L2's | int8 | int4 | int4 less L2's | bits per weight | less L2's | verdict |",
        "| --- |" + " --- |" * 12,
    ]
    for row in found:
        cells = [
            f"{row.mean(lambda r: r['loss']):.4f}",
            f"{row.mean(lambda r: r['pruned'][half]):.4f}",
            interval(row.pruned.interval) if row.pruned else "",
            "" if math.isnan(row.p) else f"{row.p:.2g}",
            f"{row.mean(lambda r: free_share(r, regime.shares)):.3f}",
            interval(row.free.interval, 3) if row.free else "",
            f"{row.mean(lambda r: r['int8']):.4f}",
            f"{row.mean(lambda r: r['int4']):.4f}",
            interval(row.int4.interval) if row.int4 else "",
            f"{row.mean(lambda r: r['bits']):.2f}",
            interval(row.bits.interval, 2) if row.bits else "",
            row.verdict,
        ]
        lines.append(f"| {ARMS[row.arm].title} | {' | '.join(cells)} |")
    words = (
        "Losses on held-out text in nats per token. Differences seed by seed from L2 decay on the same direction, the"
        " mean over its searches; 95 %, Student's t, with the luck of a search in all intervals. p and verdict are of"
        " the pruned loss. L2 decay's own rows are of its first search. Bits: int8 levels of all matrices, packed by"
        " zlib."
    )
    return [*lines, "", words, ""]


def _claims(regime: Compress, found: Sequence[Row]) -> list[str]:
    huber = ("huber", "huber_tight")
    mine = [row for row in found if row.arm.removeprefix("muon_") in huber and row.free]
    if not mine:
        return []
    lines = [
        "## The claims of the papers",
        "",
        f"AdamHD (arXiv 2511.14721): 20 to 30 % less memory after magnitude pruning. Ours: the share that can be pruned"
        f" for {CLOSE:g} nats, less that of L2 decay, and how many fewer weights stay than with L2 decay.",
        "",
        "| arm | text | share less L2's | fewer weights stay | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in mine:
        assert row.free is not None
        span, share = row.free.interval, row.mean(lambda r: free_share(r, regime.shares))
        fewer = [
            100 - 100 * (1 - share) / (1 - share + x) for x in (span.value, span.low, span.high)
        ]
        verdict = "not resolved"
        if span.low > 0:
            verdict = "more can be pruned"
        elif span.high < 0:
            verdict = "less can be pruned: contradicted at this scale"
        lines.append(
            f"| {ARMS[row.arm].title} | {row.text} | {interval(span, 3)} | {interval(Interval(*fewer), 0)} % |"
            f" {verdict} |"
        )
    return [*lines, ""]


def draw(regime: Compress, found: Sequence[Row], path: pathlib.Path) -> bool:
    """A small panel per decay: losses over the pruned share, less the loss of L2 decay with nothing pruned."""
    texts = list(dict.fromkeys(row.text for row in found))
    names = [r.arm for r in found if ARMS[r.arm].kind in ("decay", "baseline")]
    lines = {(r.arm, r.text): _line(regime, r, found) for r in found}
    made = [
        figures.Panel(
            ARMS[name].title,
            {text: lines.get((name, text), []) for text in texts},
            {text: lines.get(("l2", text), []) for text in texts if name != "l2"},
        )
        for name in dict.fromkeys(["l2", *names])
        if any((name, text) in lines for text in texts)
    ]
    if not made:
        return False
    picture = figures.small_panels(
        made,
        "pruned share of every matrix",
        "held-out loss less that of L2 decay, not pruned [nats/token]",
        ylim=(-0.1, 1.0),
    )
    return figures.save(picture, path)


def _line(regime: Compress, row: Row, found: Sequence[Row]) -> list[tuple[float, float]]:
    l2 = next((r for r in found if (r.arm, r.text) == ("l2", row.text)), row)
    bare = l2.mean(lambda r: r["loss"])
    losses = [[r["loss"], *r["pruned"]] for r in row.records.values()]
    return list(zip([0.0, *regime.shares], np.mean(losses, axis=0) - bare))
