"""Whether two runs of the same training steps have the same bits, in one process and in two.

    python -m train.bench.repeatability [small] [deterministic]

prints the losses of the steps, twice, and the time of a step. `rows` starts this program and compares.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The losses of the same steps, twice in a process and in a second process; as usual, and deterministic."""
    for deterministic in (False, True):
        runs = []
        for _ in range(2):
            words = [sys.executable, "-m", "train.bench.repeatability"]
            words += ["small"] if small else []
            words += ["deterministic"] if deterministic else []
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-300:])
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        (a, b, seconds), (c, *_) = runs
        yield {
            "run.deterministic": str(deterministic),
            "same bits in one process": str(a == b),
            "same bits in two processes": str(a == c),
            "first step that differs": next(
                (i + 1 for i, pair in enumerate(zip(a, c)) if pair[0] != pair[1]), None
            ),
            "ms a step": 1e3 * seconds,
        }


def losses(small: bool) -> None:
    """Prints the losses of 20 steps of a small model, twice, and the time of a step."""
    import jax

    from train.bench import training

    preset, length = ("toy", 16) if small else ("60M", 1024)
    model, tokens = training.model_and_tokens(preset, 16 * length, length)
    model = dataclasses.replace(model, layers=min(4, model.layers))
    found = []
    seconds = 0.0
    for _ in range(2):
        run = training.ours(model, tokens)
        run()
        start = time.perf_counter()
        values = [run() for _ in range(20)]
        jax.block_until_ready(values)
        seconds = (time.perf_counter() - start) / 20
        found.append([np.asarray(value).tobytes().hex() for value in values])
    print(json.dumps([*found, seconds]))


if __name__ == "__main__":
    if "deterministic" in sys.argv:
        from train import determinism

        determinism.prepare()
    losses("small" in sys.argv)
