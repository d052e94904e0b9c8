"""The code in README.md runs, and does what the text beside it says."""

import pathlib
import re

import jax
import numpy as np
import optax
import pytest

import optax_decay
from tests.support import toy

README = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
NAMES = {
    "optax": optax,
    "optax_decay": optax_decay,
    "AXES": toy.AXES,
    "schedule": optax.linear_schedule(0.1, 0.01, 10),
    "params": toy.params(),
    "b1": 0.8,
    "b2": 0.9,
    "lr": 0.05,
    "mask": {**jax.tree.map(lambda _: True, toy.params()), "bias": False},
}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block):
    exec(block, dict(NAMES))


def test_the_migration_line_is_adamw_bit_for_bit():
    block = next(block for block in BLOCKS if "now replace this line" in block)
    ours = eval(block.strip(), dict(NAMES))
    adamw = optax.adamw(0.05, 0.8, 0.9, weight_decay=0.1, mask=NAMES["mask"])

    def run(tx):
        params = toy.params()
        state = tx.init(params)
        for gradient in toy.gradients(4):
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    undecayed = run(optax.adam(0.05, 0.8, 0.9))
    for x, y, z in zip(*map(jax.tree.leaves, (run(ours), run(adamw), undecayed))):
        np.testing.assert_array_equal(x, y)
        assert x.ndim == 1 or np.any(x != z)
