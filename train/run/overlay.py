"""`python -m train figures RUN RUN ...`: the losses of several runs in one picture.

    python -m train figures runs/small-001 runs/small-002 [--out FILE.png] [--over tokens] [--from_step 100]

The picture has held-out losses above and training losses, as moving averages, below. The legend tells the runs apart by
the fields in which they differ, and the table that is printed gives the last held-out loss of each.
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import numpy as np

from train.config.fields import Config
from train.config.rules import MAY_CHANGE
from train.config.saved import from_json
from train.config.tree import flatten
from train.display import say
from train.errors import UserError
from train.run import figures, log

# Lightness and dashes differ between neighbours; the order repeats with other markers.
COLORS = ("#10305a", "#b4521e", "#4f9c93", "#8a8a8a", "#7a3b8f", "#c9a227")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKS = "os^Dvx"
FEW = 4  # fields that a name in the legend may show
# Fields that a name does not show: they move no weight, or follow from others.
UNTOLD = {name for name in MAY_CHANGE if name != "data.text"}
UNTOLD |= {"optimizer.schedule.steps", "optimizer.schedule.warmup_steps"}


class Curves(NamedTuple):
    """The losses of a run."""

    name: str
    config: Config
    train: np.ndarray  # [records, (step, loss)]
    held_out: np.ndarray  # likewise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train figures", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run folders")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/losses.png"))
    parser.add_argument("--over", default="steps", help="steps, or tokens (images for a ViT)")
    parser.add_argument("--from_step", type=int, default=0, help="leave out the steps before it")
    options = parser.parse_args(arguments)
    if options.over not in ("steps", "tokens", "images"):
        raise UserError(
            f"--over {options.over} is not one of steps, tokens, images; nearest: steps."
        )
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out} must end in .png; nearest: {options.out}.png.")
    found = [read(folder) for folder in options.runs]
    same = len({_unit(curves.config) for curves in found}) == 1
    if not same:
        raise UserError("Runs on text and runs on images have different losses; draw them apart.")
    if options.over != "steps" and options.over != _unit(found[0].config):
        raise UserError(f"--over {options.over}: these runs count {_unit(found[0].config)}.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    path = draw(found, options.out, options.over, options.from_step)
    width = max(len(name) for name in names(found))
    for curves, name in zip(found, names(found), strict=True):
        last = curves.held_out[-1:] if len(curves.held_out) else curves.train[-1:]
        kind = "held out" if len(curves.held_out) else "training"
        say(f"{name:{width}}  loss {last[0, 1]:.4f} nats ({kind}) after step {last[0, 0]:.0f}")
    say(f"picture   {path}")
    return 0


def read(folder: pathlib.Path) -> Curves:
    """The curves of a run folder.

    Raises:
        UserError: it is no run folder, or it has no losses yet.
    """
    saved = folder / "config.json"
    if not saved.is_file():
        near = sorted(str(path.parent) for path in folder.parent.glob("*/config.json"))
        hint = f"; run folders beside it: {', '.join(near[:5])}" if near else ""
        raise UserError(f"{folder} is not a run folder: it holds no config.json{hint}.")
    records = log.read_records(folder / "metrics.jsonl")
    rows = {
        kind: np.array(
            [(r["step"], r["loss"]) for r in records if r["kind"] == kind and r["loss"] is not None]
        ).reshape(-1, 2)
        for kind in ("train", "held_out")
    }
    if not len(rows["train"]):
        raise UserError(f"{folder} has no losses yet: its metrics.jsonl holds no training step.")
    config = from_json(saved.read_text(), str(saved))
    return Curves(folder.name, config, rows["train"], rows["held_out"])


def names(found: list[Curves]) -> list[str]:
    """A name for each run: its folder, and the fields in which the runs differ if those are few."""
    values = [flatten(curves.config) for curves in found]
    every = list(dict.fromkeys(name for one in values for name in one))
    differing = [
        name
        for name in every
        if len({repr(one.get(name)) for one in values}) > 1 and name not in UNTOLD
    ]
    # A choice says more than the fields that only one of the classes has.
    chosen = [n for n in differing if all(n in one for one in values)] or differing
    short = chosen[:FEW]
    return [
        curves.name
        + "".join(f"  {name.split('.', 1)[-1]} {_text(one.get(name))}" for name in short)
        for curves, one in zip(found, values, strict=True)
    ]


def draw(
    found: list[Curves], path: pathlib.Path, over: str = "steps", from_step: int = 0
) -> pathlib.Path:
    """Writes the picture."""
    plt = figures.pyplot()
    several = any(len(curves.held_out) > 1 for curves in found)
    with plt.rc_context(figures.RC_PARAMS):
        figure, panels = plt.subplots(
            *(1 + several, 1), figsize=(8, 3.6 + 2.6 * several), sharex=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        lowest, highest = np.inf, -np.inf
        for index, (curves, name) in enumerate(zip(found, names(found), strict=True)):
            style: dict[str, Any] = {
                "color": COLORS[index % len(COLORS)],
                "linestyle": DASHES[(index + index // len(DASHES)) % len(DASHES)],
            }
            scale = _per_step(curves.config) if over != "steps" else 1
            train = curves.train[curves.train[:, 0] >= from_step]
            if not len(train):
                raise UserError(
                    f"--from_step {from_step}: {curves.name} ends with step {curves.train[-1, 0]:.0f}."
                )
            window = max(1, len(train) // 25)
            smooth = figures.smooth(train[:, 1], window)
            panels[-1, 0].plot(train[:, 0] * scale, smooth, label=name, **style)
            shown = [smooth[len(smooth) // 20 :]]
            if several:
                held = curves.held_out[curves.held_out[:, 0] >= from_step]
                mark = {"marker": MARKS[index % len(MARKS)], "markersize": 4}
                panels[0, 0].plot(held[:, 0] * scale, held[:, 1], label=name, **style, **mark)
                shown.append(held[len(held) // 10 :, 1])
            lowest = min(lowest, *(part.min() for part in shown if len(part)))
            highest = max(highest, *(part.max() for part in shown if len(part)))
        room = 0.05 * (highest - lowest) or 0.1
        for panel in panels[:, 0]:
            if np.isfinite([lowest, highest]).all():
                panel.set_ylim(lowest - room, highest + room)  # without the fall of the first steps
            panel.set_ylabel(f"loss [nats per {_unit(found[0].config)[:-1]}]")
        if several:
            panels[0, 0].set_title("held-out data")
        panels[-1, 0].set_title("training, moving average over a 25th of the run")
        panels[-1, 0].set_xlabel({"steps": "step"}.get(over, f"{over} trained on"))
        if over != "steps":
            from matplotlib.ticker import EngFormatter

            panels[-1, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", fontsize=8, handlelength=3.5)
        figures.heading(figure, f"Losses of {len(found)} runs" if len(found) > 1 else "Losses")
        return figures.save(figure, path)


def _per_step(config: Config) -> int:
    """Tokens or images of a step."""
    images = _unit(config) == "images"
    return config.data.batch_size * (1 if images else config.data.length)


def _unit(config: Config) -> str:
    from train.step import families  # here, because it imports all models

    return "images" if families.task(config.model.preset) == "images" else "tokens"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
