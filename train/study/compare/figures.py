"""Pictures of a comparison: speed-ups with their intervals, losses with bands, AdamW's ladder, costs."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.run import figures
from train.study.compare import statistics
from train.study.compare.arms import ARMS, CONTROLS
from train.study.compare.verdicts import MUON, Cost, Row, ladder_losses

plt = figures.pyplot()
DARK, LIGHT, ACCENT = "#10305a", "#8a8a8a", "#b4521e"
MARKS = {"control": "s", "baseline": "^", "decay": "o", "optimizer": "D"}
TEXTS = {"stdlib": "sources of Python's library", "zipf": "synthetic text (Zipf)"}
COLUMNS = 4  # of small panels
BINS = 25  # means along a curve


def speedups(found: Sequence[Row], texts: Sequence[str], path: pathlib.Path) -> bool:
    """A forest: an interval per arm, a column per text. Filled where the verdict is faster or slower."""
    chosen = [row for row in found if row.speedup is not None and math.isfinite(row.speedup.value)]
    arms = [arm for arm in ARMS if any(row.arm == arm for row in chosen)]
    if not arms:
        return False
    with plt.rc_context(figures.RC_PARAMS):
        picture, panels = plt.subplots(
            *(1, len(texts)),
            figsize=(2.2 + 3.2 * len(texts), 1.3 + 0.27 * len(arms)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, text in zip(panels[0], texts):
            panel.axvline(1, color="black", linewidth=1)
            panel.axvline(MUON, color=LIGHT, linewidth=1, linestyle=":")
            for row in (row for row in chosen if row.text == text):
                height, ratio = -arms.index(row.arm), row.speedup
                assert ratio is not None
                clear = row.verdict in ("faster", "slower")
                color = ACCENT if row.arm in CONTROLS else DARK
                panel.errorbar(
                    *(max(ratio.value, 1e-2), height),
                    xerr=[
                        [max(0.0, ratio.value - max(ratio.low, 1e-2))],
                        [max(0.0, ratio.high - ratio.value)],
                    ],
                    fmt=MARKS[ARMS[row.arm].kind],
                    color=color,
                    markerfacecolor=color if clear else "white",
                    markersize=5,
                    capsize=3,
                    linewidth=1.4,
                )
                ends = zip((ratio.low, ratio.high), row.reach, (0.965, 1.035), "<>")
                for end, at, beside, mark in ends:
                    if math.isclose(end, at):
                        panel.plot(end * beside, height, mark, color=color, markersize=5)
            panel.set(title=_text(text), xlabel="speed-up: AdamW's steps / its own", xscale="log")
            panel.set_yticks([-i for i in range(len(arms))], [ARMS[arm].title for arm in arms])
            panel.grid(axis="y", visible=False)
        low = min(0.9, *(max(row.speedup.low, 0.25) for row in chosen if row.speedup))
        high = max(1.3, *(min(row.speedup.high, 4.0) for row in chosen if row.speedup))
        panels[0, 0].set_xlim(low / 1.08, high * 1.08)
        ticks = [
            t
            for t in (0.25, 0.33, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 4)
            if low / 1.08 <= t <= high * 1.08
        ]
        for panel in panels[0]:
            panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
            panel.minorticks_off()
        figures.heading(
            picture,
            "Steps that AdamW needs for the same loss",
            "as a multiple of the steps of each decay or optimizer; bars: 95 % intervals",
        )
        _explain(picture, {ARMS[arm].kind for arm in arms})
        _save(picture, path)
    return True


def _explain(picture: Any, kinds: set[str]) -> None:
    """The legend of the forest: kinds of arms by their marks, and the verdicts by their filling."""
    mark = {"linestyle": "", "markersize": 5}
    handles = []
    for kind in MARKS:
        if kind in kinds:
            color = ACCENT if kind == "control" else DARK
            handles.append(plt.Line2D([], [], marker=MARKS[kind], color=color, label=kind, **mark))
    for label, inside in (("faster or slower", DARK), ("not resolved", "white")):
        style = {"color": DARK, "markerfacecolor": inside, **mark}
        handles.append(plt.Line2D([], [], marker="o", label=label, **style))
    handles.append(plt.Line2D([], [], marker=">", color=DARK, label="that or beyond", **mark))
    threshold = {"color": LIGHT, "linestyle": ":", "linewidth": 1}
    handles.append(plt.Line2D([], [], label=f"{MUON:g}, which Muon must exceed", **threshold))
    picture.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)


def _text(name: str) -> str:
    """A text as a person calls it."""
    return TEXTS.get(name, name)


def curves(found: Sequence[Row], comparison: Any, path: pathlib.Path) -> bool:
    """Training loss of every arm over AdamW's, with the range over seeds; a panel per arm and a block per text."""
    texts = [text for text in comparison.texts if any(row.text == text for row in found)]
    arms = [arm for arm in ARMS if arm != "adamw" and any(row.arm == arm for row in found)]
    if not arms:
        return False
    each = math.ceil(len(arms) / COLUMNS)
    with plt.rc_context(
        figures.RC_PARAMS | {"font.size": 7, "axes.titlesize": 7, "axes.axisbelow": True}
    ):
        picture, panels = plt.subplots(
            *(each * len(texts), COLUMNS),
            figsize=(9, 1.6 * each * len(texts) + 0.4),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for block, text in enumerate(texts):
            table = {row.arm: row for row in found if row.text == text}
            for i in range(each * COLUMNS):
                panel = panels[block * each + i // COLUMNS, i % COLUMNS]
                arm = arms[i] if i < len(arms) else None
                if arm not in table or "adamw" not in table:
                    panel.set_axis_off()
                    continue
                _curve(panel, table["adamw"], comparison, LIGHT, "--", "AdamW")
                _curve(panel, table[arm], comparison, DARK, "-", ARMS[arm].title)
                panel.set_title(f"{ARMS[arm].title}\n{_text(text)}")
                low, high = _range(table["adamw"])
                panel.set_ylim(low, high)
        for panel in panels[-1]:
            panel.set_xlabel("step")
        for panel in panels[:, 0]:
            panel.set_ylabel("loss [nats/token]")
        words = (
            "solid: the decay or optimizer named above it; dashed: AdamW; bands: range over seeds"
        )
        figures.heading(picture, "Training loss over AdamW's", words)
        _save(picture, path)
    return True


def _curve(panel: Any, row: Row, comparison: Any, color: str, dashes: str, label: str) -> None:
    parts = np.array_split(row.curves, min(BINS, row.curves.shape[1]), axis=1)
    means = np.stack([part.mean(axis=1) for part in parts], axis=1)
    steps = comparison.steps * (np.arange(len(parts)) + 0.5) / len(parts)
    finite = np.where(np.isfinite(means), means, np.nan)
    panel.plot(steps, np.mean(finite, axis=0), color=color, linestyle=dashes, linewidth=1.2)
    panel.fill_between(
        steps, finite.min(axis=0), finite.max(axis=0), color=color, alpha=0.25, linewidth=0
    )


def _range(row: Row) -> tuple[float, float]:
    """From below the end of a curve to where it is after a tenth of the run."""
    mean = row.curves.mean(axis=0)
    low, high = mean.min(), mean[len(mean) // 10]
    return low - 0.15 * (high - low), high + 0.1 * (high - low)


def ladders(
    results: Sequence[Mapping[str, Any]], found: Sequence[Row], comparison: Any, path: pathlib.Path
) -> bool:
    """AdamW's losses by budget with the fitted parabola, and how Muon's loss is read off it."""
    tables = {text: ladder_losses(results, text) for text in comparison.texts}
    tables = {text: table for text, table in tables.items() if len(table) > 2}
    if not tables:
        return False
    with plt.rc_context(figures.RC_PARAMS):
        picture, panels = plt.subplots(
            *(1, len(tables)),
            figsize=(1 + 3.6 * len(tables), 3.3),
            squeeze=False,
            layout="constrained",
        )
        for panel, (text, table) in zip(panels[0], tables.items()):
            budgets = list(table)
            for budget, losses in table.items():
                panel.plot([budget] * len(losses), losses, "_", color=LIGHT, markersize=9)
            means = np.array([np.mean(losses) for losses in table.values()])
            panel.plot(
                budgets, means, "o", color="black", markersize=4, label="AdamW, mean of seeds"
            )
            fitted = statistics.ladder(budgets, means)
            steps = np.geomspace(budgets[0], budgets[-1], 50)
            panel.plot(steps, fitted.loss(steps), color=DARK, label="parabola in log steps")
            muon = [r for r in found if (r.arm, r.text) == ("muon", text) and r.speedup]
            if muon and muon[0].speedup and math.isfinite(muon[0].speedup.value):
                loss = float(np.mean(muon[0].losses))
                equal = muon[0].speedup.value * comparison.steps
                where = {"color": ACCENT, "linestyle": "--", "linewidth": 1}
                panel.plot([comparison.steps, equal, equal], [loss, loss, means.min()], **where)
                panel.plot(comparison.steps, loss, "s", color=ACCENT, label="Muon")
            panel.set(title=_text(text), xlabel="length of the run [steps]", xscale="log")
            panel.set_xticks(budgets, [str(b) for b in budgets])
            panel.minorticks_off()
            panel.legend(fontsize=7)
        panels[0, 0].set_ylabel("held-out loss at the end [nats/token]")
        words = (
            "how a loss is turned into a speed-up: dashed, Muon's loss read off AdamW's parabola"
        )
        figures.heading(picture, "AdamW's loss by the length of the run", words)
        _save(picture, path)
    return True


def costs(found: Mapping[str, Cost], path: pathlib.Path) -> bool:
    """Bars: time of a step over AdamW's, with the range of single rounds."""
    arms = [arm for arm in ARMS if arm in found and ARMS[arm].workers == 1]
    if not arms:
        return False
    with plt.rc_context(figures.RC_PARAMS | {"axes.axisbelow": True}):
        picture, panel = plt.subplots(figsize=(6, 0.9 + 0.25 * len(arms)), layout="constrained")
        values = [found[arm].ratio for arm in arms]
        panel.barh([-i for i in range(len(arms))], values, color="#a9c3df", height=0.7)
        for i, cost in enumerate(found[arm] for arm in arms):
            panel.plot([cost.low, cost.high], [-i, -i], color=DARK, linewidth=1.4)
            panel.annotate(f"  {cost.ratio:.2f}", (max(cost.high, 1), -i), va="center", fontsize=8)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlim(right=1.12 * max(found[arm].high for arm in arms))
        panel.set_yticks([-i for i in range(len(arms))], [ARMS[arm].title for arm in arms])
        panel.set_xlabel(f"{found[arms[0]].clock} time of a training step / AdamW's")
        panel.grid(axis="y", visible=False)
        figures.heading(picture, "What a step costs", "lines: range of single rounds")
        _save(picture, path)
    return True


def _save(picture: Any, path: pathlib.Path) -> None:
    part = path.with_name(path.name + ".part")
    picture.savefig(part, format="png")
    plt.close(picture)
    part.replace(path)
