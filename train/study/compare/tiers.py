"""The fields of a comparison, and the tiers that have names."""

import dataclasses
from typing import Literal

from train.study.compare.arms import ARMS, CONTROLS
from train.study.small_runs import SmallTask


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms, texts, budgets and seeds."""

    task: SmallTask = dataclasses.field(default_factory=SmallTask)
    texts: tuple[str, ...] = ("stdlib", "zipf")
    """Texts as in --data.text of a run; a claim needs both."""
    arms: tuple[str, ...] = tuple(name for name in ARMS if name not in CONTROLS)
    """Names in train/study/compare/arms.py; adamw, again and muon are always there."""
    trials: int = 15
    """Runs that each arm is tuned with; 0: take the points of train/study/compare/points.py."""
    grid: Literal["full", "carried"] = "full"
    """The arm's own, or three learning rates around a point carried over from the CPU tier."""
    trial_steps: int = 200
    """Updates of a trial."""
    steps: int = 400
    """Updates of the runs that count."""
    seeds: int = 6
    """Runs that count, of each arm."""
    ladder: tuple[int, ...] = (200, 300, 400, 600, 800)
    """Budgets of AdamW [steps]; they hold `steps`."""
    ladder_seeds: int = 6
    """Runs of AdamW per budget."""
    first_seed: int = 0
    """Of the runs that count; another one repeats the report with other seeds."""
    folder: str = "runs/compare-one_pass"
    """Where the results go, and where a comparison that was stopped goes on."""


def smoke() -> Comparison:
    """Huber decay (or --arms ARM) at a stored point, at 200 steps: two minutes on 2 CPU cores."""
    return Comparison(
        texts=("stdlib",),
        arms=("huber",),
        trials=0,
        steps=200,
        seeds=5,
        ladder=(100, 150, 200, 300),
        ladder_seeds=5,
        folder="runs/compare-one_pass-smoke",
    )


def cpu() -> Comparison:
    """Everything, on a model of 134k weights at 512 tokens per step: two hours on 2 CPU cores."""
    return Comparison(folder="runs/compare-one_pass-cpu")


def gpu() -> Comparison:
    """Conda (or --arms ARM) and the controls on 14M weights, 100M tokens per run: 30 minutes of one H200.

    Not run. Starts from the points of the CPU tier and checks three learning rates around each.
    """
    return Comparison(
        SmallTask(
            width=384,
            mlp_width=1024,
            layers=8,
            heads=6,
            init_std=0.04,
            length=512,
            batch_size=128,
            eval_batches=16,
            chunk=50,
            dtype="bfloat16",
        ),
        texts=("zipf-large",),
        arms=("conda",),
        trials=3,
        grid="carried",
        trial_steps=400,
        steps=1500,
        seeds=3,
        ladder=(750, 1100, 1500, 2300),
        ladder_seeds=3,
        folder="runs/compare-one_pass-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}
