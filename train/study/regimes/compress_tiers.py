"""The weights of `compare repeated`, pruned by size, rounded to 8 and 4 bits, and compressed: nothing is trained.

Run `compare repeated` of the same tier first. Arms are compared with L2 decay seed by seed. The control is that of
repeated text; here, L2 decay against itself is L2's weights of two halves of the seeds.
"""

import time
from typing import Any

from train.study.regimes import texts
from train.study.regimes.compress import Compress, regime_of, weights_of
from train.study.regimes.compress_report import write_report as write_report


def smoke() -> Compress:
    """The weights of `compare repeated smoke`: a minute."""
    return Compress("runs/compare-repeated-smoke", folder="runs/compare-compress-smoke")


def cpu() -> Compress:
    """The weights of `compare repeated cpu`: a quarter of an hour on two cores."""
    return Compress("runs/compare-repeated-cpu", folder="runs/compare-compress-cpu")


def gpu() -> Compress:
    """The weights of `compare repeated gpu`: a few minutes on one GPU."""
    return Compress("runs/compare-repeated-gpu", minutes=9.0, folder="runs/compare-compress-gpu")


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def facts(regime: Compress) -> dict[str, Any]:
    """About the texts, with their digests."""
    before = regime_of(regime.from_folder)
    return {text: texts.read(before.task, text, before.unique).summary() for text in before.texts}


def seconds(regime: Compress) -> float:
    """Of the weights of one run on this machine."""
    job = {
        name: weights_of(regime.from_folder)[0][name] for name in ("arm", "text", "seed", "weights")
    }
    list(regime.train([job], regime.from_folder))
    began = time.perf_counter()
    list(regime.train([job], regime.from_folder))
    return time.perf_counter() - began
