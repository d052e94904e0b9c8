"""CPR against the released CPU path, per slice; the bound holds; the phases of the inflection test."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import bounds
from tests.references import cpr as reference_cpr
from tests.references import neighbours as reference
from tests.support import neighbours, toy

SETTINGS = {
    "uniform l2": dict(bound="uniform", parameter=3.0, kind="l2"),
    "uniform l1": dict(bound="uniform", parameter=20.0, kind="l1"),
    "uniform std": dict(bound="uniform", parameter=0.3, kind="std", rate=0.5),
    "uniform huber": dict(bound="uniform", parameter=2.0, kind="huber", rate=2.0),
    "dependent": dict(bound="dependent", parameter=0.8, kind="l2"),
    "warm start": dict(bound="warm_start", parameter=4, kind="l2"),
    "inflection, every step": dict(bound="inflection", parameter=2, kind="l2"),
    "inflection, every second": dict(bound="inflection", parameter=2, kind="huber", every=2),
}  # fmt: skip
# An integrating force feeds errors back: 12 steps sum them up once more.
FLOAT32 = 12 * neighbours.FLOAT32


def pieces(path, w):
    return [w[i] for i in range(len(w))] if path in toy.STACKED else [w]


def expected(settings, by_rate, memory):
    def trajectory(params, gradients):
        memory.clear()
        for path in toy.MATRICES:
            memory[path] = [reference_cpr.Matrix(x, **settings) for x in pieces(path, params[path])]

        def prox(t, path, theta, eta, w):
            scale = eta if by_rate else 1.0
            parts = [m(x, scale) for m, x in zip(memory[path], pieces(path, theta), strict=True)]
            return np.stack(parts) if path in toy.STACKED else parts[0]

        return reference.last(params, gradients, neighbours.RATES, prox, toy.MATRICES)

    return trajectory


def bound_of(settings):
    every = {"sample_every": settings.get("every", 1)} if settings["bound"] == "inflection" else {}
    return getattr(bounds, settings["bound"])(settings["parameter"], **every)


@pytest.mark.parametrize("by_rate", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_matches_the_released_path(settings, by_rate):
    build = lambda: neighbours.after(
        optax_decay.cpr_decay(
            bound_of(settings),
            measure=settings["kind"],
            rate=settings.get("rate", 1.0),
            learning_rate=neighbours.rate if by_rate else None,
            axes=toy.AXES,
        )
    )
    memory = {}
    neighbours.agree(build, expected(settings, by_rate, memory), float32=FLOAT32)
    matrices = [m for parts in memory.values() for m in parts]
    assert any(m.force > 0 for m in matrices)
    if settings["bound"] == "inflection":
        assert sum(m.kappa != reference_cpr.PLACEHOLDER for m in matrices) >= 2


def test_weights_that_grow_are_held_at_the_bound_and_others_left_alone():
    params = {"growing": jnp.full((4, 3), 0.9), "small": jnp.full((4, 3), 0.1)}
    outward = {"growing": jnp.full((4, 3), 0.01), "small": jnp.zeros((4, 3))}
    tx = optax_decay.cpr_decay(bounds.uniform(12.0), rate=0.01, mask=None)
    got, state = toy.train(tx, params, [outward] * 2000)
    # Held where the step leads to R(θ) = 12, so to θ = 1, and 2 ℓ θ = 0.01 undoes it. The force swings there at first.
    np.testing.assert_allclose(got["growing"] + 0.01, 1.0, rtol=1e-3)
    np.testing.assert_allclose(state.multiplier["growing"], 0.005, rtol=1e-2)
    np.testing.assert_array_equal(got["small"], params["small"])
    assert state.multiplier["small"] == 0.0


def test_inflection_phase():
    """R = 1, 2, 4, 8, 9, …: with k = 1 the difference first shrinks at step 5 (1 < 4); nothing is known before."""
    sizes = [1.0, 2.0, 4.0, 8.0, 9.0, 30.0]
    tx = optax_decay.cpr_decay(bounds.inflection(1), mask=None)
    w = {"w": jnp.zeros((2, 2))}
    state, seen = tx.init(w), []
    for size in sizes:
        target = {"w": jnp.full((2, 2), np.sqrt(size / 4))}
        _, state = tx.update(target, state, w)
        seen.append(float(state.bound["w"]))
    np.testing.assert_allclose(seen, [np.inf] * 4 + [9.0, 9.0], rtol=1e-6)
    assert float(state.multiplier["w"]) > 0


def test_constant_weights_have_no_gradient_of_std():
    w = {"w": jnp.full((3, 2), 0.5)}
    tx = optax_decay.cpr_decay(bounds.uniform(1e-3), measure="std", mask=None)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)
    np.testing.assert_array_equal(updates["w"], 0.0)


def test_works_behind_adam_on_the_default_mask():
    tx = optax.chain(optax.adam(0.05), optax_decay.cpr_decay(bounds.dependent(0.5), axes=toy.AXES))
    _, state = toy.train(tx, toy.params(), toy.gradients(3))
    assert set(state[1].multiplier) == toy.MATRICES
    assert state[1].multiplier["blocks/up/kernel"].shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optax_decay.cpr_decay("warmstart"), r"did you mean optax_decay.bounds.warm_start\(\)"),
        (lambda: optax_decay.cpr_decay(bounds.warm_start), r"did you mean optax_decay.bounds.warm_start\(\)"),
        (lambda: bounds.uniform(0), "bound=0 .*above 0"),
        (lambda: bounds.dependent(0.0), "factor=0.0 .*above 0"),
        (lambda: bounds.warm_start(0), "steps=0 .*value is 1"),
        (lambda: bounds.inflection(0), "steps=0 .*value is 1"),
        (lambda: bounds.inflection(3, sample_every=0), "sample_every=0 .*value is 1"),
        (lambda: optax_decay.cpr_decay(measure="l3"), "measure='l3' is not known"),
        (lambda: optax_decay.cpr_decay(rate=0), "rate=0 .*above 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_split_matrices_in_shard_map_are_refused():
    w = {"w": jnp.ones((8, 2))}
    tx = optax_decay.cpr_decay(bounds.uniform(1.0), mask=None)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"w": jax.P("fsdp")}
    step = lambda w: tx.update(w, tx.init(w), w)[0]
    with pytest.raises(ValueError, match=r"whole matrices inside shard_map.*\['fsdp'\]"):
        jax.shard_map(step, mesh=mesh, in_specs=(spec,), out_specs=spec)(w)
    replicated = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(),), out_specs=jax.P())(w)
    np.testing.assert_array_equal(replicated["w"], step(w)["w"])


def test_a_partial_mask_is_refused():
    w = {"w": jnp.ones((3, 2))}
    tx = optax_decay.cpr_decay(bounds.uniform(1.0), mask=((r"w", 0.5),))
    with pytest.raises(ValueError, match="constrained or not"):
        tx.init(w)
