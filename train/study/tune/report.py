"""What a search came to, in words: the table, the recommendation, how forgiving it is, and the command that uses it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from train import cli
from train.config.fields import Config, UserError, model_config
from train.data.batches import TokenBatches
from train.study.tune.options import Tune, decays, first_deviation
from train.study.tune.repetition import advice
from train.study.tune.search import edges
from train.study.tune.surface import CLOSE, LEVEL, Point, Range, Surface

ROWS = 12  # of the table


def report(
    tune: Tune,
    real: Config,
    arguments: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    found: Surface,
    data: TokenBatches,
) -> str:
    """All of it, as text; `data` is the whole text."""
    parts = [table(found), recommendation(real, found)]
    if at_edge := edges(results):
        parts.append(
            f"Not finished: the best {' and '.join(at_edge)} lies at the edge of what was tried. Start the same command"
            " again, with more --minutes or --trials."
        )
    parts += advice(tune, real, data)
    parts.append(command(tune, real, arguments, found.best))
    return "\n\n".join(parts)


def table(found: Surface) -> str:
    """The best points, and the best one without decay."""
    bare = [p for p in found.points if p.weight_decay == 0][:1]
    shown = [p for p in found.points[:ROWS] if p not in bare] + bare
    lines = ["      η        λ  seeds    loss  above the best (95 % interval)"]
    for point in sorted(shown, key=lambda p: p.loss):
        beside = point.loss - found.best.loss
        half = f" ± {point.resolution:.3f}" if not math.isnan(point.resolution) else ""
        words = "  recommended" if point is found.best else f"  {beside:+.3f}{half}"
        if not math.isfinite(point.loss):
            words = "  diverged"
        lines.append(
            f"{point.learning_rate:7.3g}  {point.weight_decay:7.3g}  {point.runs:5d}  {point.loss:6.3f}{words}"
        )
    if len(shown) < len(found.points):
        left_out = len(found.points) - len(shown)
        lines.append(f"The table leaves out {left_out} worse point{'s' if left_out > 1 else ''}.")
    return "\n".join(lines)


def recommendation(real: Config, found: Surface) -> str:
    """The best point, with the intervals of what cannot be told apart from it and of what costs little."""
    best, lines = found.best, []
    tuned_numbers = [("learning rate", "learning_rate")]
    if decays(real):
        tuned_numbers.append(("weight decay", "weight_decay"))
    for word, axis in tuned_numbers:
        basin, close = found.basin(axis), found.forgiving(axis)
        noise = f"{basin} cannot be told apart from it" if basin else "one seed each: noise unknown"
        lines.append(f"{word:13s}  {getattr(best, axis):.3g}   ({noise})")
        lines.append(f"{'':13s}  {close} costs at most {CLOSE:g} nats: {_width(close)}")
    if basin_known := not math.isnan(found.deviation):
        lines.append(
            f"noise          one run deviates by {found.deviation:.4f} nats from another one with the same seed"
            f" ({found.freedom} degrees of freedom, intervals of {100 * LEVEL:.0f} %)"
        )
    bare = [p for p in found.points if p.weight_decay == 0]
    if decays(real) and bare and best.weight_decay > 0:
        gain = bare[0].loss - best.loss
        half = f" ± {bare[0].resolution:.3f}" if basin_known else ""
        lines.append(f"decay          gains {gain:.3f}{half} nats over no decay")
    return "\n".join(lines)


def _width(close: Range) -> str:
    if math.isinf(close.doublings):
        return "no decay is among them"
    least = "at least " if close.open_low or close.open_high else ""
    return f"{least}{close.doublings:.1f} factors of two"


def command(tune: Tune, real: Config, arguments: Sequence[str], best: Point) -> str:
    """The command that trains the real model with what was found, and what does not carry over by itself."""
    flags = {"--optimizer.learning_rate": f"{best.learning_rate:.4g}"}
    if decays(real):
        flags["--decay.weight_decay"] = f"{best.weight_decay:.4g}"
    wide, proxy = model_config(real), tune.proxy
    follow = {}
    if wide.width != proxy.width:
        follow = {
            "--width.base": str(proxy.width),
            "--width.base_head": str(proxy.head_width),
            "--model.init_std": f"{first_deviation(tune, real):g}",
        }
    notes = []
    try:
        cli.parse(_with(arguments, flags | follow))
    except UserError as error:
        notes.append(f"These numbers hold at width {proxy.width} only: {error}")
        follow = {}
    lines = ["This command trains the real model with them:", ""]
    lines.append(f"    python -m train {shlex.join(_with(arguments, flags | follow))}")
    if decays(real) and best.weight_decay > 0 and real.run.steps != proxy.steps:
        same = best.weight_decay * proxy.steps / real.run.steps
        notes.append(
            f"The real run has {real.run.steps} steps, the small ones had {proxy.steps}. A weight decay of {same:.2g}"
            " would keep the product of decay and steps."
        )
    if wide.layers != proxy.layers:
        notes.append(
            f"The real model has {wide.layers} layers, the small one {proxy.layers}: nothing corrects for that."
        )
    return "\n".join([*lines, "", *notes]).rstrip()


def _with(arguments: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The arguments with these flags in place of their own."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.replace("-", "_").partition("=")
        same = name in {flag.replace("-", "_") for flag in flags}
        if not skip and not same:
            kept.append(argument)
        skip = same and not equals
    return kept + [word for flag in flags.items() for word in flag]
