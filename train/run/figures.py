"""Figures of a run, drawn from its metrics.jsonl: losses, sizes of the weights, and the effect of the decay.

The lines of a figure differ in lightness and in dashes, so that they can be told apart in greyscale.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

STYLES: dict[str, dict[str, Any]] = {
    "hidden": {"color": "#10305a", "linestyle": "-"},
    "head": {"color": "#b4521e", "linestyle": "--"},
    "embedding": {"color": "#4f9c93", "linestyle": "-."},
    "vector": {"color": "#a8a8a8", "linestyle": ":"},
}


class Labels(NamedTuple):
    """Names for the losses of a run."""

    loss: str = "nats per token"
    held_out: str = "held-out text"
    baseline: str = "token frequencies alone"


def pyplot() -> Any:
    """matplotlib.pyplot without a display. It is imported on demand, since it makes up a third of the start-up time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


RC_PARAMS = {
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


def draw(
    records: list[dict[str, Any]],
    baseline: float,
    title: str,
    folder: pathlib.Path,
    metric: str | None = None,
    words: Labels = Labels(),  # noqa: B008  (it is immutable)
) -> list[pathlib.Path]:
    """Writes loss.png, top1.png, decay.png and spectrum.png, each if there are records for it.

    Args:
        records: of metrics.jsonl.
        baseline: loss of a model that ignores its input, for example one that knows only the token frequencies.
        title: of all figures.
        folder: for the figures; created if necessary.
        metric: name of the spectral number that the multiplier of the decay depends on.
        words: names for the losses.

    Returns:
        The paths of the figures.
    """
    folder.mkdir(exist_ok=True)
    parts = {kind: [r for r in records if r["kind"] == kind] for kind in KINDS}
    written = []
    with pyplot().rc_context(RC_PARAMS):
        if parts["train"]:
            written.append(save(_loss(parts, baseline, title, words), folder / "loss.png"))
        if scored := [r for r in parts["held_out"] if "top1" in r]:
            written.append(save(_top1(scored, title), folder / "top1.png"))
        if parts["weights"]:
            written.append(save(_decay(parts["weights"], title), folder / "decay.png"))
        if measured := [r for r in parts["spectrum"] if r["step"] > 0]:
            picture = _spectrum(measured, metric or "score", title)
            written.append(save(picture, folder / "spectrum.png"))
    return written


KINDS = ("train", "held_out", "weights", "spectrum")


def heading(figure: Any, words: str, below: str = "") -> None:
    """Says above a figure what is seen in it, and below that in smaller letters of which run."""
    lines = "\n" if below else ""
    figure.suptitle(f"{words}{lines}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    if below:
        figure.draw_without_rendering()
        box = figure._suptitle.get_window_extent().transformed(figure.transFigure.inverted())
        figure.text(0.01, box.y0, below, ha="left", va="bottom", fontsize=8.5, color="#505050")


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    pyplot().close(figure)
    part.replace(path)
    return path


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average over `window` values, centred; over fewer values at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - window // 2, 0), np.minimum(i + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _loss(
    parts: dict[str, list[dict[str, Any]]], baseline: float, title: str, words: Labels
) -> Any:
    figure, (top, bottom) = pyplot().subplots(
        2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    heading(figure, "Loss in training and on held-out data", title)
    known = [record for record in parts["train"] if record["loss"] is not None]
    step, loss = _column(known, "step"), _column(known, "loss")
    top.plot(step, loss, color="#b4c2d6", linewidth=0.8, label="training")
    if (window := len(loss) // 25) > 1:
        mean = smooth(loss, window)
        top.plot(step, mean, color="#5a7aa8", label=f"training, mean of {window} records")
    if parts["held_out"]:
        held = parts["held_out"]
        line = {"color": "black", "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        top.plot(_column(held, "step"), _column(held, "loss"), label=words.held_out, **line)
        if "average_loss" in held[0]:
            line |= {"color": "#4f9c93", "linestyle": "--"}
            label = f"{words.held_out}, average of the weights"
            top.plot(_column(held, "step"), _column(held, "average_loss"), label=label, **line)
    top.axhline(baseline, color="#b4521e", linestyle="--", linewidth=1.2)
    top.annotate(
        f"{words.baseline}: {baseline:.2f}",
        (1, baseline),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="#b4521e",
    )
    top.set_ylabel(f"loss [{words.loss}]")
    frame = {"frameon": True, "framealpha": 0.9, "edgecolor": "none"}
    top.legend(loc="upper right", bbox_to_anchor=(1, 0.9), **frame)
    rate = _column(parts["train"], "learning_rate")
    bottom.plot(step, rate, color="#10305a")
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


def _top1(held: list[dict[str, Any]], title: str) -> Any:
    figure, axis = pyplot().subplots(figsize=(7, 3.6), layout="constrained")
    heading(figure, "Correct predictions on held-out images", title)
    lines: dict[str, dict[str, Any]] = {
        "top1": {"label": "the weights", "color": "black"},
        "average_top1": {"label": "their average", "color": "#4f9c93", "linestyle": "--"},
    }
    for name, style in lines.items():
        if name in held[0]:
            share = 100 * _column(held, name)
            axis.plot(_column(held, "step"), share, marker="o", markersize=3.5, **style)
    axis.set(xlabel="step", ylabel="top-1 on held-out images [%]", ylim=(0, None))
    axis.legend(loc="lower right")
    return figure


def _decay(records: list[dict[str, Any]], title: str) -> Any:
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    roles = [role for role in STYLES if role in records[-1]]
    decaying = [role for role in roles if records[-1][role]["decaying"]]
    (size, spread), (beyond, share) = axes
    step = _column(records, "step")
    for role in roles:
        label = role if role in decaying else f"{role} (no decay)"
        size.plot(step, _series(records, role, "rms"), label=label, **STYLES[role])
    size.set(title="Size of the weights", ylabel="RMS of the weights", yscale="log")
    _spread(spread, records, decaying)
    for role in decaying:
        beyond.plot(step, 100 * _series(records, role, "beyond"), **STYLES[role])
        update = np.maximum(_series(records, role, "update_rms"), 1e-30)
        ratio = _series(records, role, "decay_rms") / update
        share.plot(step, 100 * ratio, **STYLES[role])
    beyond.set(title="Weights beyond the threshold", ylabel="share of the weights [%]")
    share.set(title="Strength of the decay", ylabel="RMS of decay / RMS of update [%]")
    for axis in (size, spread):
        _plain(axis)
    for axis in (beyond, share):
        heights = [y for line in axis.lines for y in line.get_ydata()]
        axis.set(xlabel="step", ylim=(0, 1.15 * max(heights, default=0.0) or 1.0))
    below = {"loc": "outside lower center", "ncols": len(roles), "handlelength": 3.2}
    figure.legend(*size.get_legend_handles_labels(), **below)
    heading(figure, "How large the weights are, and how strongly they decay", title)
    return figure


def _spectrum(records: list[dict[str, Any]], metric: str, title: str) -> Any:
    """Two heat maps, matrices by steps: the score, and the multiplier of the decay."""
    matrices = sorted(records[-1]["score"], key=_by_layer)
    rows = max(3.2, 0.16 * len(matrices) + 1.2)
    figure, axes = pyplot().subplots(1, 2, figsize=(10, rows), sharey=True, layout="constrained")
    heading(figure, "Spectrum and decay of each matrix over the run", title)
    words = {"score": f"{metric} of the spectrum", "multiplier": "multiplier of the decay"}
    steps = _column(records, "step")
    for axis, (kind, name) in zip(axes, words.items(), strict=True):
        values = np.array([[record[kind][m] for record in records] for m in matrices], float)
        image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
        axis.set_xticks(shown, [f"{steps[i]:.0f}" for i in shown])
        axis.set(title=name, xlabel="step")
        axis.grid(False)
        figure.colorbar(image, ax=axis, shrink=0.9)
    axes[0].set_yticks(range(len(matrices)), matrices, fontsize=6)
    return figure


def _by_layer(name: str) -> tuple[int, str]:
    """Sort key that groups matrices by layer; a matrix in a stack is named NAME/LAYER."""
    head, _, last = name.rpartition("/")
    return (int(last), head) if last.isdigit() else (0, name)


def _series(records: list[dict[str, Any]], role: str, name: str) -> np.ndarray:
    return np.array([record[role][name] for record in records], float)


QUANTILES = {"largest": ("largest", 0.8), "p99": ("99 % quantile", 1.4), "median": ("median", 2.4)}


def _spread(axis: Any, records: list[dict[str, Any]], decaying: list[str]) -> None:
    """Draws quantiles of |w|; lines of higher quantiles are thinner."""
    for name, (words, width) in QUANTILES.items():
        for role in decaying:
            line = _series(records, role, name)
            axis.plot(_column(records, "step"), line, **(STYLES[role] | {"linewidth": width}))
        axis.plot([], [], color="#404040", linewidth=width, label=words)
    axis.set(title="Spread of the weights that decay", ylabel="size of a weight |w|", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.22)  # room for the legend
    axis.legend(loc="upper center", ncols=3, fontsize=8, handlelength=2.4)


def _plain(axis: Any) -> None:
    """Labels a logarithmic axis with numbers such as 0.02 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
