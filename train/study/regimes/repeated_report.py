"""The page of repeated text: tables, curves over λ, the axes of epochs, length and batch; from the results alone."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from train.run.folder import write
from train.study.compare.verdicts import interval
from train.study.facts import how_it_was_made
from train.study.regimes import figures, points
from train.study.regimes.arms import ARMS
from train.study.regimes.optimum import valley
from train.study.regimes.paired import CLOSE, Paired, forgiveness
from train.study.regimes.repeated import AXIS, ONE_PASS, Repeated
from train.study.regimes.rows import Row, between_directions, failed, luck_of, overall, rows
from train.study.regimes.sweep import lowest
from train.study.regimes.work import Record


def write_report(regime: Repeated, records: Sequence[Record], folder: pathlib.Path) -> list[str]:
    """Writes report.md, its pictures, and points.json if all controls hold; returns which of them failed."""
    found = rows(regime, records)
    reasons = failed(regime, found, records)
    parts = [_head(reasons, found, regime, records), _summary(found, regime, records)]
    for name, title, made in (
        ("curves.png", "Held-out loss over λ", figures.curves(found, folder / "curves.png")),
        (
            "gains.png",
            "Gain over L2 decay, and forgiveness",
            figures.gains(found, regime.texts, folder / "gains.png"),
        ),
    ):
        if made:
            parts.append(f"## {title}\n\n![{title}]({name})\n")
    parts += [_table(text, found) for text in regime.texts if any(r.text == text for r in found)]
    if axes := _axes(regime, records):
        parts.append(axes)
    parts.append(claims(regime, found, records))
    parts.append(how_it_was_made(regime, records, folder))
    write(folder / "report.md", "\n".join(parts))
    if not reasons:
        entries = [
            json.dumps({name: getattr(row, name) for name in points.FIELDS}) for row in found
        ]
        write(folder / points.FILE, "[\n" + ",\n".join(entries) + "\n]\n")
    return reasons


def _head(
    reasons: Sequence[str], found: Sequence[Row], regime: Repeated, records: Sequence[Record]
) -> str:
    epochs = regime.steps * regime.task.batch_size * regime.task.length / regime.unique
    lines = [f"# Repeated text: {regime.unique:,} tokens, {epochs:.1f} epochs", ""]
    if reasons:
        lines += ["**A control failed: nothing below may be claimed.**", ""]
        return "\n".join([*lines, *(f"* {reason}" for reason in reasons), ""])
    table = {(row.arm, row.text): row for row in found}
    lines.append("All controls hold.")
    for text in regime.texts:
        none = table["none", text].to_l2
        better = between_directions(regime, records, text, "l2", "muon_l2")
        assert none is not None and better is not None
        lines.append(
            f"On {text}, L2 decay gains {interval(none.interval, 3)} nats over no decay, and Muon with L2 decay"
            f" {interval(better.interval, 3)} over AdamW."
        )
    return "\n".join([*lines, ""])


def _turned(x: Paired) -> Paired:
    low, high = -x.interval.high, -x.interval.low
    return Paired(type(x.interval)(-x.interval.value, low, high), x.within, x.p, x.seeds)


def _luck(regime: Repeated, records: Sequence[Record]) -> str:
    """What the luck of a search comes to."""
    chance = luck_of(regime, records)
    if not math.isfinite(chance.freedom):
        return "The luck of the search for η and λ is not in the intervals."
    share = math.sqrt(chance.variance / (1 + 1 / regime.tunings))
    return (
        f"L2 decay was tuned {regime.tunings} times with other seeds, on Adam and on Muon, and arms are compared with"
        f" the mean of these. The deviation of one search's loss, {share:.4f} nats from {chance.freedom:.0f} degrees of"
        " freedom, is in all intervals."
    )


def _summary(found: Sequence[Row], regime: Repeated, records: Sequence[Record]) -> str:
    texts = regime.texts
    heads = [f"gain over L2, {t}" for t in texts] + [f"forgiveness, {t}" for t in texts]
    lines = [f"| arm | {' | '.join(heads)} | verdict |", "| --- |" + " --- |" * (len(heads) + 1)]
    for arm in regime.names:
        mine = {row.text: row for row in found if row.arm == arm}
        if not mine:
            continue
        cells = [
            interval(_turned(row.to_l2).interval, 3) if row and row.to_l2 else ""
            for row in (mine.get(t) for t in texts)
        ]
        cells += [
            str(row.forgiving) if row and row.forgiving else ""
            for row in (mine.get(t) for t in texts)
        ]
        verdict = "" if arm in ("l2", "muon_l2") else overall(found, arm, texts)
        lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(
        [
            *lines,
            "",
            "Gain: loss of L2 decay less that of the arm, in nats per token, seed by seed, with 95 % intervals"
            " (Student's t). Arms on Muon are compared with L2 on Muon, optimizers with AdamW. Verdicts are corrected"
            " by Holm over all arms and texts, and a claim needs every text; where nothing is resolved, the arms"
            " differ by less than the bound (two one-sided tests of 5 %, not corrected). Forgiveness: how many factors"
            f" of two of λ lie within {CLOSE} nats of the best. {_luck(regime, records)}\n",
        ]
    )


def _table(text: str, found: Sequence[Row]) -> str:
    lines = [
        f"## {text}",
        "",
        "| arm | η | λ | held-out loss | training loss | less L2 | p (Holm) | less none | λ within 0.02 | verdict |",
        "| --- |" + " --- |" * 9,
    ]
    for row in (row for row in found if row.text == text):
        spread = ""
        if math.isfinite(row.mean) and len(row.losses) > 1:
            n = len(row.losses)
            sd = math.sqrt(sum((x - row.mean) ** 2 for x in row.losses.values()) / (n - 1))
            spread = f" ± {sd:.3f}"
        to_l2 = interval(row.to_l2.interval) if row.to_l2 else ""
        to_none = interval(row.to_none.interval) if row.to_none else ""
        p = "" if math.isnan(row.p) or row.to_l2 is None else f"{row.p:.2g}"
        close = row.forgiving
        close_range = "" if close is None else f"{close.low:.2g} to {close.high:.2g}"
        verdict = "" if row.to_l2 is None else row.verdict
        lines.append(
            f"| {ARMS[row.arm].title} | {row.learning_rate:g} | {row.weight_decay:.3g} |"
            f" {row.mean:.4f}{spread} | {row.training:.3f} | {to_l2} | {p} | {to_none} | {close_range} | {verdict} |"
        )
    words = (
        "± is one deviation over seeds. The range of λ within 0.02 nats is that at the learning rate of the finer grid"
        " next to η, so it need not hold the λ of the runs that count."
    )
    return "\n".join([*lines, "", words, ""])


def _axes(regime: Repeated, records: Sequence[Record]) -> str:
    """Best λ against the number of epochs, the length and the batch."""
    text = regime.texts[0]
    lines = [
        f"## Epochs, length and batch, on {text}",
        "",
        "| setting | epochs | unique tokens | steps | batch | arm | best λ | loss there | loss without decay |"
        " forgiveness |",
        "| --- |" + " --- |" * 9,
    ]
    start = len(lines)
    further = [unit for unit in regime.units() if unit not in (*ARMS, ONE_PASS)]
    for unit in ["", *further]:  # first the setting of all arms
        unique, steps, batch = regime.settings(unit)
        epochs = steps * batch * regime.task.length / unique
        bare = regime.profile("none", unit or "none", records)
        for arm in AXIS[1:]:
            curve = regime.profile(arm, unit or arm, records)
            if len(curve) < 2:
                continue
            best, close = lowest(curve), forgiveness(curve)
            without = f"{bare[0.0]:.3f}" if bare else ""
            lines.append(
                f"| {unit or 'as all arms'} | {epochs:.0f} | {unique:,} | {steps} | {batch} | {ARMS[arm].title} |"
                f" {best:g} | {curve[best]:.3f} | {without} | {close or ''} |"
            )
    if len(lines) == start:
        return ""
    words = (
        f"Means of {regime.sweep_seeds} seeds at the learning rate {ARMS['l2'].learning_rates[1]:g}; the optimum of"
        " λ is known to a factor of two."
    )
    return "\n".join([*lines, "", words, ""])


def claims(regime: Repeated, found: Sequence[Row], records: Sequence[Record]) -> str:
    """One row per claim of a paper that this regime tests."""
    lines = [
        "## The claims of the papers",
        "",
        "| claim of the paper | ours: loss less that of L2, nats | verdict |",
        "| --- | --- | --- |",
    ]
    start = len(lines)
    for arm, words in CLAIMS.items():
        mine = [row for row in found if row.arm == arm and row.to_l2 is not None]
        if mine:
            ours = "; ".join(
                f"{row.text} {interval(row.to_l2.interval, 3)}" for row in mine if row.to_l2
            )
            lines.append(f"| {words} | {ours} | {_verdict(found, arm, regime.texts)} |")
    for words, ours, verdict in _timescale(regime, records):
        lines.append(f"| {words} | {ours} | {verdict} |")
    if len(lines) == start:
        return ""
    return "\n".join([*lines, "", "Claims are tested at this scale and in this regime only.", ""])


CLAIMS: Mapping[str, str] = {
    "huber": "AdamHD (arXiv 2511.14721): lower loss than AdamW",
    "alphadecay_matched": "AlphaDecay (2506.14562): lower loss at the same mean decay",
    "cautious": "cautious weight decay (2510.12402): lower loss than AdamW",
    "corrected": "AdamC (2506.02285): lower loss than AdamW",
    "awd": "AWD (2210.00094): generalises better than uniform decay",
    "adadecay": "AdaDecay (1907.08931): generalises better than uniform decay",
    "target_norm": "AdamWN (2311.11446): lower loss than AdamW",
    "cpr": "CPR (2311.09058): lower loss than AdamW",
    "p_norm": "pAdam (2404.10824): no worse than AdamW, with sparse weights",
    "rotational": "rotational AdamW (2305.17212): as good as AdamW",
    "stable": "AdamS (2011.11152): generalises better than AdamW",
    "hyperball": "hyperball (2606.16899): fixed norms replace decay",
    "soda": "SODA (2605.11172): better than its base optimizer, with no decay to tune",
}

AS_GOOD = ("p_norm", "rotational", "hyperball")  # which claim no gain


def _verdict(found: Sequence[Row], arm: str, texts: Sequence[str]) -> str:
    verdict = overall(found, arm, texts)
    if verdict == "better":
        return "reproduced in direction"
    if verdict == "worse":
        return "contradicted at this scale"
    if verdict.startswith("differs"):
        return f"{'not contradicted' if arm in AS_GOOD else 'not seen'}: {verdict}"
    return verdict


def _timescale(regime: Repeated, records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Best λ ∝ 1/steps and ∝ batch, from L2 decay at one learning rate."""
    found = {}
    for unit in (u for u in regime.units() if u.startswith(("steps", "batch"))):
        curve = regime.profile("l2", unit, records)
        if curve:
            found[unit] = valley(curve)
    base = regime.profile("l2", "l2", records)
    if len(base) < 3 or not found:
        return []
    here = valley(base)
    lines = []
    for unit, there in found.items():
        _, steps, batch = regime.settings(unit)
        claimed = regime.steps / steps
        ours = there / here
        close = abs(math.log2(ours / claimed)) <= 0.5
        lines.append(
            (
                f"decay is a timescale (2405.13698): with {steps} steps of {batch} sequences instead of"
                f" {regime.steps} of {regime.task.batch_size}, the best λ is {claimed:g} times as large",
                f"{ours:.2f} times as large ({here:.2g} → {there:.2g})",
                "within a factor of √2" if close else "not within a factor of √2",
            )
        )
    return lines
