"""Runs side by side are runs alone, whatever the arm, and their conditions stay conditions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.runs import write_text
from train.data import batches
from train.study.compare.runs import program
from train.study.population import side_by_side
from train.study.small_runs import SmallTask, compiled, numbers, train

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=4
)
RATES, DECAYS, SEEDS, STEPS = (0.004, 0.03), (0.0, 2.0), (3, 8), 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text"))
    return batches.load_text(str(text), "bytes", length=12, batch_size=4, seed=0)


def together(small, data, shared_counters=True):
    """Losses of every step [steps, seeds, points], and on held-out text [seeds, points]."""
    runs = side_by_side(small, shared_counters=shared_counters)
    sources = [dataclasses.replace(data, seed=seed) for seed in SEEDS]
    own = numbers(RATES, DECAYS, STEPS, SEEDS)
    batch = lambda step: np.stack([source.batch(step) for source in sources])
    state, losses = train(runs, own, batch, STEPS, TINY.chunk)  # the last chunk is shorter
    return losses, np.asarray(runs.held_out_loss(state, np.stack(data.held_out(2))))


@pytest.mark.parametrize("arm", ["adamw", "awd", "conda", "sophia"])
def test_runs_side_by_side_are_runs_alone(data, arm):
    small = program(TINY, arm, data.vocab_size)
    losses, final = together(small, data)
    assert losses.shape == (STEPS, 2, 2) and final.shape == (2, 2)
    runs = compiled(small)
    for i, seed in enumerate(SEEDS):
        source = dataclasses.replace(data, seed=seed)
        for j, point in enumerate(zip(RATES, DECAYS)):
            state, alone = train(runs, numbers(*point, STEPS, seed), source.batch, STEPS, 4)
            # The same float32 arithmetic up to fusion and batching; ten steps amplify roundings little.
            np.testing.assert_allclose(losses[:, i, j], alone, rtol=1e-4)
            found = runs.held_out_loss(state, np.stack(data.held_out(2)))
            assert float(final[i, j]) == pytest.approx(float(found), rel=1e-4)
    assert len(np.unique(final)) == 4


@pytest.mark.parametrize(("shared", "conditions"), [(True, True), (False, False)])
def test_shared_counters_keep_a_condition_one(data, shared, conditions):
    """Conda computes new bases every so many steps."""
    runs = side_by_side(program(TINY, "conda", data.vocab_size), shared_counters=shared)
    own = numbers(RATES, DECAYS, STEPS, SEEDS)
    state = jax.eval_shape(runs.init, own)
    tokens = jax.ShapeDtypeStruct((4, 2, 4, 13), jnp.int32)
    jaxpr = str(runs.advance.trace(state, own, tokens).jaxpr)
    assert ("cond[" in jaxpr) == conditions
    assert state["step"].shape == (() if shared else (2, 2))


def test_mapped_counters_change_no_loss(data):
    small = program(TINY, "adamw", data.vocab_size)
    (shared, _), (mapped, _) = (together(small, data, c) for c in (True, False))
    np.testing.assert_allclose(mapped, shared, rtol=1e-5)


def test_simulated_workers_run_one_at_a_time(data):
    with pytest.raises(ValueError, match="one at a time"):
        side_by_side(program(TINY, "one_bit_adam", data.vocab_size))
