"""Weights stored in bfloat16: which λ still acts, by the way an update is rounded?

A step of decay multiplies a weight by 1 - ηλ. bfloat16 keeps 8 significant bits, so a shrink below 2⁻⁹ is rounded away
unless the gradient moves the weight. Every form of rounding is run over the same λ with the same seeds, at a small and
a usual learning rate; forms are compared with float32 weights seed by seed. The set-up is that of repeated text.

Controls: float32 weights against themselves with other seeds must hold 0; and at the larger learning rate, L2 decay on
float32 weights must beat no decay by more than 0.1 nats, or the set-up does not test decay.
"""

from train.study.regimes import texts
from train.study.regimes.bfloat16 import Bfloat16, program
from train.study.regimes.bfloat16_report import write_report as write_report
from train.study.regimes.repeated_tiers import gpu as repeated_gpu
from train.study.regimes.shared import facts as facts
from train.study.regimes.shared import seconds_of_run


def smoke() -> Bfloat16:
    """One text and one learning rate, short runs, 3 seeds: a few minutes."""
    return Bfloat16(
        texts=("stdlib",),
        unique=9_600,
        steps=300,
        learning_rates=(0.008,),
        shrinks=(0.0, 0.0008, 0.024),
        seeds=3,
        folder="runs/compare-bfloat16-smoke",
    )


def cpu() -> Bfloat16:
    """Two texts, two learning rates, 85k weights, 12 seeds: an hour on two cores."""
    return Bfloat16(folder="runs/compare-bfloat16-cpu")


def gpu() -> Bfloat16:
    """As repeated gpu, 24 seeds: stretches of 9 minutes on one GPU."""
    before = repeated_gpu()
    return Bfloat16(
        before.task,
        texts=before.texts,
        unique=before.unique,
        steps=before.steps,
        learning_rates=(0.001, 0.006),
        seeds=24,
        minutes=9.0,
        folder="runs/compare-bfloat16-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def seconds(regime: Bfloat16) -> float:
    """Of a run with float32 weights on this machine."""
    data = texts.read(regime.task, regime.texts[0], regime.unique)
    small = program(regime.task, "float32", data.vocab_size, regime.steps)
    return seconds_of_run(regime.task, small, data, regime.steps, regime.seeds)
