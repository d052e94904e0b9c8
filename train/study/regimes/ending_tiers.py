"""The end of the schedule: does the ratio of gradients to weights rise there, and which λ over time prevents it?

With L2 decay the equilibrium norm of a weight falls with the learning rate, and the gradient of a normalised layer
grows as one over the norm. AdamC (arXiv 2506.02285) makes λ follow the learning rate. Each arm is run over three λ
with the same seeds; the set-up is that of repeated text, in a linear schedule down to zero.

Control: L2 decay against itself with other seeds must hold 0, for the loss and for the rise of the ratio.
"""

from train.study.regimes import texts
from train.study.regimes.ending import Ending, program
from train.study.regimes.ending_report import write_report as write_report
from train.study.regimes.repeated_tiers import gpu as repeated_gpu
from train.study.regimes.shared import facts as facts
from train.study.regimes.shared import seconds_of_run


def smoke() -> Ending:
    """Corrected decay (or --arms ARM) on one text, short runs, 3 seeds: a few minutes."""
    return Ending(
        texts=("stdlib",),
        arms=("corrected",),
        unique=9_600,
        steps=300,
        seeds=3,
        folder="runs/compare-ending-smoke",
    )


def cpu() -> Ending:
    """Eight arms on two texts, 85k weights, 12 seeds: half an hour on two cores."""
    return Ending(folder="runs/compare-ending-cpu")


def gpu() -> Ending:
    """As repeated gpu, 24 seeds: stretches of 9 minutes on one GPU."""
    before = repeated_gpu()
    return Ending(
        before.task,
        texts=before.texts,
        unique=before.unique,
        steps=before.steps,
        learning_rate=0.006,
        seeds=24,
        minutes=9.0,
        folder="runs/compare-ending-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def seconds(regime: Ending) -> float:
    """Of a run with L2 decay on this machine."""
    data = texts.read(regime.task, regime.texts[0], regime.unique)
    small = program(regime.task, "l2", data.vocab_size, regime.steps)
    return seconds_of_run(regime.task, small, data, regime.steps, regime.seeds)
