"""Was the transfer justified? Compares the largest singular values of a run with those of its proxy.

    python -m train gains RUN PROXY [--tolerance 0.15]

Both are run folders; their newest checkpoints are compared, which should be of the same step. RUN
was trained with the learning rate and decay of PROXY and its width as `width.base`. The
report (also written to gains.txt in the folder of RUN) says for every matrix and layer whether its
largest singular value is within the tolerance of the proxy's, and which exponent the two show. The
exit code is 0 if all are, else 1.
"""

import argparse
import pathlib

import optax_decay
from train.config.fields import UserError
from train.config.tree import flatten
from train.display import say
from train.run.folder import write
from train.step import families, observe, optimizer
from train.weights.trained import load_trained


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m train gains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("proxy", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=0.15)
    options = parser.parse_args(arguments)
    report, notes = compare(options.run, options.proxy, options.tolerance)
    text = "\n".join([*notes, str(report)])
    write(options.run / "gains.txt", text + "\n")
    say(text)
    return 0 if report.passed else 1


def compare(
    run: pathlib.Path, proxy: pathlib.Path, tolerance: float
) -> tuple[optax_decay.width.GainReport, list[str]]:
    """The report of two run folders, and what to bear in mind when reading it.

    Raises:
        UserError: not a run folder, no checkpoint, other models, or no base width.
    """
    (config, model, params, done, _), (base, reference, weights, base_done, _) = (
        load_trained(run),
        load_trained(proxy),
    )
    if config.width is None or config.width.base != reference.width:
        raise UserError(
            f"width.base of {run} is {config.width and config.width.base}, but {proxy} has the width"
            f" {reference.width}; compare runs that share a proxy, or train with"
            f" --width.base {reference.width}."
        )
    notes = []
    if done != base_done:
        notes.append(f"{run} is at step {done}, {proxy} at step {base_done}: compare equal steps")
    for name in ("optimizer.learning_rate", "decay.weight_decay"):
        here, there = (flatten(c).get(name) for c in (config, base))
        if here != there:
            notes.append(f"{name} is {here} in {run} but {there} in {proxy}: not a transfer")
    report = optax_decay.width.spectral_gain_report(
        params,
        weights,
        law=optimizer.law(config),
        axes=families.of(model).axes(model),
        sublayers=observe.SUBLAYERS,
        tolerance=tolerance,
    )
    return report, notes
