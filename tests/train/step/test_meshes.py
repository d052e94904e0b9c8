"""Every optimizer of the program on eight devices: the losses of one, one compilation, and a state that stays put."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support.runs import program
from tests.train.test_resume import OPTIMIZERS
from train.plan.collectives import collectives

MESH = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
STEPS = 4


def run(ready):
    """Losses of some steps, and the last state."""
    state, losses = ready.program.init(jax.random.key(0)), []
    for index in range(STEPS):
        state, noted = ready.program.update(state, ready.batch(index))
        losses.append(float(noted["loss"]))
    return losses, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_are_one(name, tmp_path, capfd):
    flags = ["--run.steps", str(STEPS), "--model.layers", "1", *OPTIMIZERS[name]]
    alone, spread = program(tmp_path, *flags), program(tmp_path, *flags, *MESH)
    assert alone.program.mesh.size == 1 and spread.program.mesh.size == 8
    for index in range(STEPS):
        np.testing.assert_array_equal(alone.batch(index), spread.batch(index))
    expected, _ = run(alone)
    losses, state = run(spread)
    # What XLA says of a layout that it can reach only by way of whole arrays.
    assert "rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert spread.program.update._cache_size() == 1
    assert all(
        jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, state, spread.program.shardings))
    )


def test_alphadecay_gathers_no_weight(tmp_path, as_for_users):
    """What measuring adds to a step's collectives: matrices cross once, to the device that decomposes them."""

    def kinds(name):
        ready = program(tmp_path, *OPTIMIZERS[name], *MESH)
        text = (
            ready.program.update.lower(ready.program.placed_shapes(), ready.batch(0))
            .compile()
            .as_text()
        )
        found = collectives(text)
        return [c for c in found if c.kind == "all-gather"], [
            c for c in found if c.kind == "all-to-all"
        ]

    (gathers, swaps), (more_gathers, more_swaps) = kinds("adam"), kinds("AlphaDecay")
    assert len(more_gathers) <= len(gathers)
    assert len(more_swaps) > len(swaps)


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "1"}, "None"),
        ({"JAX_NUM_CPU_DEVICES": "8"}, "64"),
        ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "9"}, "9"),
        ({"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=4 --b"}, "32"),
    ],
)
def test_devices_of_one_process_have_threads_to_wait_in(variables, threads):
    names = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC")
    others = {name: value for name, value in os.environ.items() if name not in names}
    line = [sys.executable, "-c", "import os, train; print(os.environ.get('NPROC'))"]
    said = subprocess.run(line, env=others | variables, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == threads
