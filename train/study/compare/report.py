"""The page of a comparison: report.md with its pictures, from the results alone."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.data import zipf
from train.run.folder import write
from train.study.compare import figures, verdicts
from train.study.compare.arms import ARMS, CONTROLS
from train.study.compare.verdicts import Row, interval
from train.study.facts import how_it_was_made


def write_report(
    comparison: Any, results: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> list[str]:
    """Writes report.md and its pictures; returns why the report is void, nothing if it is not.

    Args:
        comparison: the `tiers.Comparison`.
        results: the lines of results.jsonl.
        folder: where to; it holds environment.json.
    """
    found = verdicts.rows(results, comparison.steps)
    void = verdicts.void(found, comparison.texts)
    costs = verdicts.costs(results)
    parts = [_head(void), _summary(found, costs, comparison)]
    for text in comparison.texts:
        chosen = [row for row in found if row.text == text]
        if chosen:
            parts.append(_table(text, chosen))
    pictures = {
        "speedup.png": lambda path: figures.speedups(found, comparison.texts, path),
        "curves.png": lambda path: figures.curves(found, comparison, path),
        "ladder.png": lambda path: figures.ladders(results, found, comparison, path),
        "cost.png": lambda path: figures.costs(costs, path),
    }
    titles = {
        "speedup.png": "Steps AdamW needs for the loss of each arm, over the arm's steps",
        "curves.png": "Training losses",
        "ladder.png": "AdamW's losses by budget, from which speed-ups are read",
        "cost.png": "Time of a step over AdamW's",
    }
    for name, draw in pictures.items():
        if draw(folder / name):
            parts.append(f"## {titles[name]}\n\n![{titles[name]}]({name})\n")
    runs = [r for r in results if r["stage"] != "cost"]
    parts.append(how_it_was_made(comparison, runs, folder))
    write(folder / "report.md", "\n".join(parts))
    return void


def _head(void: Sequence[str]) -> str:
    lines = ["# Comparison with AdamW", ""]
    if void:
        lines += ["**VOID: a control failed, nothing below may be claimed.**", ""]
        lines += [f"* {reason}" for reason in void] + [""]
    else:
        lines += [
            "Both controls hold: AdamW against itself is not resolved, Muon is faster than AdamW.",
            "",
        ]
    return "\n".join(lines)


def _summary(found: Sequence[Row], costs: Mapping[str, Any], comparison: Any) -> str:
    texts = comparison.texts
    lines = [
        "| arm | "
        + " | ".join(f"speed-up on {t}" for t in texts)
        + " | time of a step | verdict |",
        "| --- |" + " --- |" * (len(texts) + 2),
    ]
    for arm in ARMS:
        mine = {row.text: row for row in found if row.arm == arm}
        if not mine or arm == "adamw":
            continue
        cells = [mine[t].ratio if t in mine else "" for t in texts]
        cost = str(costs.get(arm, ""))
        verdict = verdicts.overall(found, arm, texts)
        role = " (control)" if arm in CONTROLS else ""
        lines.append(f"| {ARMS[arm].title}{role} | {' | '.join(cells)} | {cost} | {verdict} |")
    clock = next(iter(costs.values())).clock if costs else "CPU"
    return "\n".join(
        [
            *lines,
            "",
            f"Speed-up: steps AdamW needs for the arm's loss at {comparison.steps} steps, over those steps, with 95 %"
            " intervals over seeds: a parametric bootstrap of 10,000 draws, each mean from Student's t. In simulated"
            " comparisons these hold the truth in 94 to 99 % with six seeds, with fewer more often. The luck of the"
            " search for η and λ is not in them. AdamW against itself fails by chance on 1 text in 20 at most."
            " Verdicts are corrected by Holm over all arms and texts;"
            f" they speak of steps, not time. Time of a step: {clock} time over AdamW's in the same process,"
            " best of several rounds, with the range of single rounds"
            + (
                "; 1-bit Adam's workers are simulated, its time says nothing.\n"
                if "one_bit_adam" in costs
                else ".\n"
            ),
        ]
    )


def _table(text: str, found: Sequence[Row]) -> str:
    source = zipf.source(text)
    lines = [
        f"## {text}",
        "",
        "| arm | η | λ | trials | loss | sd | less AdamW | p (Holm) | within 0.03 | less Muon | verdict |",
        "| --- |" + " --- |" * 10,
    ]
    for row in found:
        losses = np.array(row.losses)
        finite = losses[np.isfinite(losses)]
        mean = f"{losses.mean():.4f}" if len(finite) == len(losses) else "∞"
        spread = f"{finite.std(ddof=1):.4f}" if len(finite) > 1 else ""
        difference = interval(row.difference.interval) if row.difference else ""
        muon = interval(row.to_muon.interval) if row.to_muon else ""
        p = "" if math.isnan(row.p) else f"{row.p:.2g}"
        inferior = "" if row.difference is None else "yes" if row.not_inferior else "no"
        trials = "stored" if row.tuned is None else str(row.tuned.trials)
        if row.arm == "again":
            trials = "as AdamW"
        verdict = "" if row.arm == "adamw" else row.verdict
        lines.append(
            f"| {ARMS[row.arm].title} | {row.learning_rate:g} | {row.weight_decay:g} | {trials} |"
            f" {mean} | {spread} | {difference} | {p} | {inferior} | {muon} | {verdict} |"
        )
    lines += [
        "",
        "Losses in nats per token at the end of a run; less AdamW, less Muon: Welch, 95 %. Within 0.03: the one-sided"
        " 95 % bound of the difference to AdamW is below 0.03 nats (non-inferiority).",
    ]
    if source:
        lines.append(
            f"The entropy rate of the source is {source.entropy_rate:.4f} nats per token: no loss can be lower, and"
            " windows that begin anywhere cannot reach it."
        )
    return "\n".join([*lines, ""])
