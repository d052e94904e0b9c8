"""The look at the decay before a run: silent when all is well, and not when it is not."""

import jax
import optax
import pytest

from tests.train.config.test_derived import DECAYS
from train.cli import parse
from train.step import optimizer, program, tasks, try_decay


def described(*asked):
    """Config, shapes and axes of a toy model."""
    config = tasks.complete(parse(["toy", "--run.steps", "100", *asked]), 97)
    mesh = program.real_mesh(config, jax.devices()[:1])
    found = program.describe(config, mesh)
    return config, found.shapes["params"], found.axes


@pytest.mark.parametrize(
    "asked",
    [
        *(("--decay", name) for name in DECAYS),
        ("--decay.form", "cautious"),
        ("--decay.form", "proximal"),
        *(("--decay.coupling", name) for name in ("schedule", "corrected", "independent")),
        ("--decay.weight_decay", "0"),
        ("--decay", "l2", "--decay.spectrum.score", "hill"),
        ("--width.base", "16"),
    ],
    ids="-".join,
)
def test_nothing_is_said_of_decays_that_work(asked):
    assert try_decay.problems(*described(*asked)) == ()


def test_a_chain_in_the_wrong_order_is_named(monkeypatch):
    config, params, axes = described(
        *("--decay", "l2", "--decay.weight_decay", "0.37", "--optimizer.learning_rate", "0.01")
    )
    plain = optimizer.build

    def late(config, axes):
        return optax.chain(plain(config, axes), config.decay.build(optimizer.setting(config, axes)))

    monkeypatch.setattr(optimizer, "build", late)
    problems = try_decay.problems(config, params, axes)
    # By 0.37 behind the rate, less 0.01 · 0.37 at its own place.
    assert problems and all(
        "grows by 3.7e-01" in text and "behind the learning rate" in text for text in problems
    )


def test_the_size_of_the_model_costs_nothing():
    """Shapes of 100 GB are looked at in the time of small ones: nothing of them is allocated."""
    config, params, axes = described(
        "--model.width", "4096", "--model.layers", "64", "--model.heads", "32"
    )
    assert sum(x.size for x in jax.tree.leaves(params)) > 1e9
    assert try_decay.problems(config, params, axes) == ()
