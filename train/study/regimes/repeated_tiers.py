"""Repeated text: U unique tokens, seen E times. Every decay, tuned, with its curve over λ and how forgiving it is.

Each arm is tuned over learning rate and λ together, with runs of full length on seeds that no result uses: a coarse
grid of single trials, then a finer grid, and the bottom of a paraboloid fitted to both. Runs that count share their
seeds, so that arms are compared seed by seed: Student's t, corrected by Holm. L2 decay is tuned several times, which
shows the luck of a search; it is in all intervals.

Controls: L2 decay against itself must hold 0; in one pass over the whole text Muon must beat AdamW; and L2 decay must
beat no decay by more than 0.1 nats, or the set-up does not test decay.
"""

from typing import Any

from train.study.regimes import shared, texts
from train.study.regimes.repeated import Repeated, program
from train.study.regimes.repeated_report import write_report as write_report
from train.study.small_runs import SmallTask


def smoke() -> Repeated:
    """Huber decay (or --arms ARM) and the controls on one text, with short runs and few seeds: a few minutes."""
    return Repeated(
        texts=("stdlib",),
        arms=("huber",),
        unique=9_600,
        steps=300,
        trials=9,
        finer_points=9,
        finer_seeds=1,
        tunings=1,
        seeds=3,
        epochs=(),
        lengths=(),
        batches=(),
        folder="runs/compare-repeated-smoke",
    )


def cpu() -> Repeated:
    """All arms on two texts, 85k weights, 1200 steps of 256 tokens, 12 seeds: two to four hours on two cores."""
    return Repeated(folder="runs/compare-repeated-cpu")


def gpu() -> Repeated:
    """All arms on two texts, 1.2M weights, 4000 steps of 4096 tokens, 24 seeds: stretches of 9 minutes on one GPU."""
    task = SmallTask(
        width=160,
        mlp_width=432,
        layers=4,
        heads=5,
        init_std=0.06,
        length=128,
        batch_size=32,
        eval_batches=32,
        dtype="bfloat16",
    )
    return Repeated(
        task,
        texts=("stdlib", "zipf-large"),
        unique=1_000_000,
        steps=4000,
        seeds=24,
        epochs=(4, 64),
        minutes=9.0,
        folder="runs/compare-repeated-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def facts(regime: Repeated) -> dict[str, Any]:
    """About the texts, with their digests."""
    regime.check_texts()
    return shared.facts(regime)


def seconds(regime: Repeated) -> float:
    """Of a run with L2 decay on this machine."""
    data = texts.read(regime.task, regime.texts[0], regime.unique)
    small = program(regime.task, "l2", data.vocab_size, regime.steps)
    return shared.seconds_of_run(regime.task, small, data, regime.steps, regime.seeds)
