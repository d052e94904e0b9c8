"""Both radial brakes against the released arithmetic, what each keeps of a norm, and how they differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import decay, radial_brake
from tests.references import neighbours as reference
from tests.references import norms
from tests.support import neighbours, toy

REFERENCES = {"norm": norms.brake_norm, "first_order": norms.brake_first_order}


def matrix(seed, shape=(6, 9)):
    return {"w": jax.random.normal(jax.random.key(seed), shape)}


def norm(tree):
    return float(np.linalg.norm(np.asarray(tree["w"], np.float64)))


def braked(u, w, *args, **options):
    tx = radial_brake(*args, **options)
    return optax.apply_updates(w, tx.update(u, tx.init(w), w)[0])


@pytest.mark.parametrize("rule", ["norm", "first_order"])
@pytest.mark.parametrize(("outward", "inward"), [(0.5, 1.0), (0.3, 0.7), (0.0, 0.0)])
def test_matches_the_released_arithmetic(rule, outward, inward):
    def prox(t, path, theta, eta, w):
        step = lambda w, u: REFERENCES[rule](w, u, eta, outward, inward)
        return norms.on_slices(step, (0,) if path in toy.STACKED else (), w, (w - theta) / eta)

    neighbours.agree(
        lambda: neighbours.after(radial_brake(outward, inward, rule=rule, axes=toy.AXES)),
        lambda params, gradients: reference.last(
            params, gradients, neighbours.RATES, prox, toy.HIDDEN
        ),
        float32=4 * neighbours.FLOAT32,  # sums of up to 192 squares on the way to every norm
    )


@pytest.mark.parametrize(
    ("per", "kept"), [("matrix", (0,)), ("layer", (0,)), ("leaf", ()), ("output", (0, 2, 3))]
)
def test_slices(per, kept):
    params, gradients = toy.flat_params(), toy.flat_gradients(1)[0]
    path = "blocks/attention/kernel"
    want = norms.on_slices(
        lambda w, u: norms.brake_norm(w, u, 0.2, 0.5, 0.9), kept, params[path], gradients[path]
    )
    tx = optax.chain(
        optax.scale_by_learning_rate(0.2), radial_brake(0.5, 0.9, per=per, axes=toy.AXES)
    )
    weights = toy.params()
    updates, _ = tx.update(toy.gradients(1)[0], tx.init(weights), weights)
    got = toy.unnest(optax.apply_updates(weights, updates))
    np.testing.assert_allclose(got[path], want, rtol=1e-5, atol=1e-6)


def test_shares_of_a_change_of_norm():
    w, u = matrix(0), jax.tree.map(lambda x: 0.3 * x, matrix(1))
    out = jax.tree.map(lambda u, w: u + 0.2 * w, u, w)
    into = jax.tree.map(lambda u, w: u - 0.4 * w, u, w)
    for delta, s in ((out, 0.5), (into, 0.8)):
        plain = norm(optax.apply_updates(w, delta))
        assert abs(plain - norm(w)) > 0.5
        got = norm(braked(delta, w, 0.5, 0.8))
        np.testing.assert_allclose(got, norm(w) + s * (plain - norm(w)), rtol=1e-6)
    np.testing.assert_allclose(norm(braked(out, w, 0.0, 0.0)), norm(w), rtol=1e-6)


def test_first_order_drops_the_growth_of_an_orthogonal_step():
    w, u = matrix(0), matrix(1)
    inner = jnp.vdot(u["w"], w["w"]) / jnp.vdot(w["w"], w["w"])
    u = {"w": u["w"] - inner * w["w"]}
    assert norm(optax.apply_updates(w, u)) > 1.3 * norm(w)
    np.testing.assert_allclose(norm(braked(u, w, rule="first_order")), norm(w), rtol=1e-6)
    assert norm(braked(u, w, rule="norm")) > 1.1 * norm(w)


def test_all_of_it_is_no_brake():
    w, u = matrix(0), matrix(1)
    np.testing.assert_array_equal(braked(u, w, 1.0, 1.0)["w"], optax.apply_updates(w, u)["w"])


def test_decay_passes_where_inward_is_one():
    """A decay points inward: kept by default, weakened otherwise."""
    w, none = matrix(0), jax.tree.map(jnp.zeros_like, matrix(0))

    def shrink(inward):
        tx = optax.chain(decay(0.5), optax.scale_by_learning_rate(0.1), radial_brake(0.5, inward))
        updates, _ = tx.update(none, tx.init(w), w)
        return norm(optax.apply_updates(w, updates)) / norm(w)

    np.testing.assert_allclose(shrink(1.0), 0.95, rtol=1e-6)
    np.testing.assert_allclose(shrink(0.4), 1 - 0.4 * 0.05, rtol=1e-6)


def test_zero_matrices_get_away():
    w = {"w": jnp.zeros((4, 3))}
    u = matrix(1, (4, 3))
    np.testing.assert_allclose(braked(u, w, 0.25)["w"], 0.25 * u["w"], rtol=1e-6)
    first = braked(u, w, rule="first_order")
    np.testing.assert_allclose(norm(first), 1e-8, rtol=1e-6)


@pytest.mark.parametrize("rule", ["norm", "first_order"])
def test_no_step_changes_no_bit_and_nan_shows(rule):
    w = matrix(0)
    tx = radial_brake(0.3, 0.6, rule=rule)
    np.testing.assert_array_equal(tx.update({"w": 0 * w["w"]}, tx.init(w), w)[0]["w"], 0)
    u = {"w": w["w"].at[0, 0].set(jnp.nan)}
    assert jnp.isnan(tx.update(u, tx.init(w), w)[0]["w"]).all()


@pytest.mark.parametrize("rule", ["norm", "first_order"])
def test_inside_shard_map(rule):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes, spec = (("w", "E | D -> F"),), {"w": jax.P("a", None, "b")}
    w, u = matrix(0, (4, 3, 8)), matrix(1, (4, 3, 8))
    tx = radial_brake(0.3, 0.6, rule=rule, axes=axes, param_specs=spec)
    step = lambda u, w: tx.update(u, tx.init(w), w)[0]
    split = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(split)(u, w)["w"], step(u, w)["w"], rtol=1e-5, atol=1e-6)


def test_vmap_over_numbers():
    w, u = matrix(0), matrix(1)
    one = lambda a, b: braked(u, w, a, b)["w"]
    many = jax.vmap(one)(jnp.array([0.2, 0.6]), jnp.array([0.9, 0.1]))
    np.testing.assert_allclose(many[1], one(0.6, 0.1), rtol=1e-5, atol=1e-6)
    assert np.abs(many[0] - many[1]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: radial_brake(1.5), r"outward=1.5 .*nearest allowed value is 1"),
        (lambda: radial_brake(inward=-1.0), r"inward=-1.0 .*nearest allowed value is 0"),
        (lambda: radial_brake(rule="first"), r"did you mean 'first_order'"),
        (lambda: radial_brake(per="expert"), r"per='expert' is not known"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
