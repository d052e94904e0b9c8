"""Relative updates and their floor against the released arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import relative_update, relative_update_floor
from tests.references import neighbours as reference
from tests.references import norms
from tests.references.decays import adam_directions
from tests.support import neighbours, toy


def trajectory(rule):
    """w ← w - η rule(w, Adam) on hidden matrices, Adam elsewhere."""

    def run(params, gradients):
        direction = adam_directions(0.9, 0.999, 1e-8)

        def step(t, eta, w, g):
            new = {}
            for path in w:
                u = direction(path, g[path])
                if path in toy.HIDDEN:
                    kept = (0,) if path in toy.STACKED else ()
                    u = norms.on_slices(rule, kept, w[path], u)
                new[path] = w[path] - eta * u
            return new

        return reference.run(params, gradients, neighbours.RATES, step)

    return run


def test_relative_update_matches_the_released_arithmetic():
    neighbours.agree(
        lambda: neighbours.between(relative_update(axes=toy.AXES)),
        trajectory(norms.relative_update),
        float32=4 * neighbours.FLOAT32,  # sums of up to 192 squares on the way to every norm
    )


@pytest.mark.parametrize("floor", [0.35, 2.5])
def test_floor_matches_the_released_arithmetic(floor):
    """At 2.5 some matrices are lengthened and others are not."""
    active = []

    def rule(w, u):
        active.append(floor * np.linalg.norm(w) > np.linalg.norm(u))
        return norms.relative_update_floor(w, u, floor)

    neighbours.agree(
        lambda: neighbours.between(relative_update_floor(floor, axes=toy.AXES)),
        trajectory(rule),
        float32=4 * neighbours.FLOAT32,
    )
    if floor == 2.5:
        assert 0.1 < np.mean(active) < 0.9


def test_floor_per_output():
    w, u = (np.random.default_rng(i).standard_normal((5, 7)) for i in (0, 1))
    w = w * np.linspace(0.1, 3.0, 7)
    want = norms.on_slices(lambda w, u: norms.relative_update_floor(w, u, 1.0), (1,), w, u)
    tx = relative_update_floor(1.0, per="output")
    w, u = ({"w": jnp.asarray(x, jnp.float32)} for x in (w, u))
    got = tx.update(u, tx.init(w), w)[0]["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    changed = np.any(np.asarray(got) != np.asarray(u["w"]), axis=0)
    assert changed.any() and not changed.all()


def test_norms_grow_as_the_docstring_says():
    w = {"w": jnp.eye(4)}
    u = {"w": jnp.eye(4)[::-1] * jnp.array([1.0, 1.0, -1.0, -1.0])}
    assert jnp.vdot(w["w"], u["w"]) == 0
    tx = optax.chain(relative_update(), optax.scale_by_learning_rate(0.3))
    new = optax.apply_updates(w, tx.update(u, tx.init(w), w)[0])
    np.testing.assert_allclose(jnp.linalg.norm(new["w"]), 2 * np.sqrt(1.09), rtol=1e-6)


def test_zero_norms():
    zero, one = {"w": jnp.zeros((3, 2))}, {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"w holds only zeros, .* keep it there"):
        relative_update().init(zero)
    for u, w in ((one, zero), (zero, one)):
        np.testing.assert_array_equal(relative_update().update(u, (), w)[0]["w"], 0)
    tx = relative_update_floor()
    np.testing.assert_array_equal(tx.update(one, tx.init(zero), zero)[0]["w"], 1)
    np.testing.assert_array_equal(tx.update(zero, tx.init(one), one)[0]["w"], 0)


def test_nan_is_not_hidden():
    w, u = {"w": jnp.ones((3, 4))}, {"w": jnp.ones((3, 4)).at[1, 1].set(jnp.nan)}
    for tx in (relative_update(), relative_update_floor()):
        assert jnp.isnan(tx.update(u, tx.init(w), w)[0]["w"][1, 1])


@pytest.mark.parametrize("link", [relative_update, relative_update_floor])
def test_inside_shard_map(link):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"w": jax.P("a", None, "b")}
    w, u = ({"w": jax.random.normal(jax.random.key(i), (4, 3, 8))} for i in (0, 1))
    tx = link(axes=(("w", "E | D -> F"),), param_specs=spec)
    step = lambda u, w: tx.update(u, tx.init(w), w)[0]
    split = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(split)(u, w)["w"], step(u, w)["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_update_floor(-0.1), r"floor=-0.1 .*nearest allowed value is 0"),
        (lambda: relative_update(per="row"), r"per='row' is not known"),
        (lambda: relative_update(mask="hed"), r"did you mean 'head'"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
