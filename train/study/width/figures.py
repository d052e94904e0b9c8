"""The picture of a sweep over learning rate, decay and width: loss against η and λ, rule by rule."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.run import figures
from train.study.width.analysis import RULES, TITLES, optimum, surfaces

SHADES = ("#a9c3df", "#5b87b5", "#10305a", "#000000")
DASHES = (":", "--", "-", "-.")


def draw(results: Sequence[Mapping[str, Any]], base_width: int, path: pathlib.Path) -> pathlib.Path:
    """Writes the picture: a row per rule; left against η at the best λ, right against λ at the best η.

    Both axes are in the proxy's terms, so that a rule that transfers puts the minima of all widths
    above one another. Bands are one deviation over seeds, crosses the fitted minima with their
    errors.
    """
    plt = figures.pyplot()
    with plt.rc_context(figures.RC_PARAMS):
        picture, panels = plt.subplots(
            len(RULES),
            2,
            sharex="col",
            sharey=True,
            squeeze=False,
            figsize=(8, 1 + 2.3 * len(RULES)),
            layout="constrained",
        )
        lowest, rest = np.inf, -np.inf
        for row, rule in enumerate(RULES):
            for k, surface in enumerate(surfaces(results, rule, base_width)):
                style = {"color": SHADES[k % 4], "linestyle": DASHES[k % 4]}
                mean, deviation = surface.mean(), surface.losses.std(axis=-1)
                best = optimum(surface)
                lowest, rest = min(lowest, best.loss), max(rest, best.loss)
                for column, (x, at, where, error) in enumerate(
                    (
                        (surface.learning_rates, 1, best.learning_rate, best.rate_error),
                        (surface.weight_decays, 0, best.weight_decay, best.decay_error),
                    )
                ):
                    chosen = np.expand_dims(mean.argmin(axis=at), at)
                    y, d = (
                        np.take_along_axis(t, chosen, at).squeeze(at) for t in (mean, deviation)
                    )
                    panel = panels[row, column]
                    panel.semilogx(
                        x, y, label=f"width {surface.width}", marker=".", base=2, **style
                    )
                    panel.fill_between(
                        x, y - d, y + d, color=style["color"], alpha=0.2, linewidth=0
                    )
                    error = 0.0 if np.isnan(error) else error
                    panel.errorbar(
                        *(where, best.loss),
                        xerr=[[where - where / 2**error], [where * 2**error - where]],
                        color="#b4521e",
                        marker="x",
                        capsize=2,
                    )
            panels[row, 0].set_title(TITLES[rule])
            panels[row, 0].set_ylabel("loss [nats/token]")
        if np.isfinite(lowest) and panels[-1, 0].lines:
            panels[0, 0].set_ylim(lowest - 0.03, rest + 0.35)
            handles = panels[-1, 0].get_legend_handles_labels()
            picture.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
        panels[-1, 0].set_xlabel("η of the proxy, at its best λ")
        panels[-1, 1].set_xlabel("λ of the proxy, at its best η")
        words = "bands: one deviation over seeds; crosses: fitted minima with their errors"
        figures.heading(picture, "Where the held-out loss is lowest, width by width", words)
        part = path.with_name(path.name + ".part")
        picture.savefig(part, format="png")
        plt.close(picture)
        part.replace(path)
    return path
