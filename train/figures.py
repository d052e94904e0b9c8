"""Pictures of a run, drawn from its metrics.jsonl alone: the losses, and what the decay did.

Every line has its own grey and its own dashes, so that a print in grey can be read.
"""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

STYLES = {
    "hidden": {"color": "#10305a", "linestyle": "-"},
    "head": {"color": "#b4521e", "linestyle": "--"},
    "embedding": {"color": "#3c8c84", "linestyle": "-."},
    "vector": {"color": "#a0a0a0", "linestyle": ":"},
}
LOOK = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def draw(records: list[dict[str, Any]], unigram: float, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes loss.png and decay.png; returns what was written (nothing is without records).

    Args:
        records: of metrics.jsonl.
        unigram: loss of knowing only how frequent each token is [nats per token].
        folder: where to; it is made.
    """
    folder.mkdir(exist_ok=True)
    parts = {kind: [r for r in records if r["kind"] == kind] for kind in KINDS}
    written = []
    with plt.rc_context(LOOK):
        if parts["train"]:
            written.append(_save(_loss(parts, unigram), folder / "loss.png"))
        if parts["weights"]:
            written.append(_save(_decay(parts["weights"]), folder / "decay.png"))
    return written


KINDS = ("train", "held_out", "weights")


def _save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)
    return path


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values around each; the window shrinks at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    half = np.minimum(np.minimum(i, len(values) - 1 - i), window // 2)
    return (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)


def _loss(parts: dict[str, list[dict[str, Any]]], unigram: float) -> Any:
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    step, loss = _column(parts["train"], "step"), _column(parts["train"], "loss")
    top.plot(step, loss, color="#c8d2e0", linewidth=0.7, label="training, each step")
    window = max(1, len(loss) // 25)
    top.plot(step, smooth(loss, window), color="#5a7aa8", label=f"training, mean of {window} steps")
    if parts["held_out"]:
        held = parts["held_out"]
        line = {"color": "black", "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        top.plot(_column(held, "step"), _column(held, "loss"), label="held-out text", **line)
    top.axhline(unigram, color="#b4521e", linestyle="--", linewidth=1.2)
    top.annotate(
        f"token frequencies alone: {unigram:.2f}",
        (1, unigram),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="#b4521e",
    )
    top.set_ylabel("loss [nats per token]")
    top.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    rate = _column(parts["train"], "learning_rate")
    bottom.plot(step, rate, color="#10305a")
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


def _decay(records: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    step = _column(records, "step")
    roles = [role for role in STYLES if role in records[-1]]
    decaying = [role for role in roles if records[-1][role]["decaying"]]

    def series(role: str, name: str) -> np.ndarray:
        return np.array([record[role][name] for record in records], float)

    size, spread, beyond, share = axes.flat
    for role in roles:
        note = "" if role in decaying else " (does not decay)"
        size.plot(step, series(role, "rms"), label=role + note, **STYLES[role])
    size.set(title="Size of the weights", ylabel="RMS of w")
    for role in decaying:
        style = STYLES[role]
        spread.plot(step, series(role, "median"), label=f"{role}, half below", **style)
        spread.plot(step, series(role, "p99"), label=f"{role}, 99 % below", alpha=0.55, **style)
        spread.plot(step, series(role, "largest"), label=f"{role}, largest", alpha=0.25, **style)
        after = step > 0
        beyond.plot(step[after], 100 * series(role, "beyond")[after], label=role, **style)
        ratio = series(role, "decay_rms")[after] / np.maximum(
            series(role, "update_rms")[after], 1e-30
        )
        share.plot(step[after], 100 * ratio, label=role, **style)
    spread.set(title="Spread of the weights that decay", ylabel="|w|", yscale="log")
    beyond.set(
        title="Weights beyond the threshold", ylabel="share [%]", xlabel="step", ylim=(0, None)
    )
    share.set(
        title="Strength of the decay", ylabel="RMS of decay / RMS of update [%]", xlabel="step"
    )
    share.set_ylim(0, None)
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=7.5)
    return figure
