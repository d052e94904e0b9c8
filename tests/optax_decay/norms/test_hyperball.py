"""Hyperball against the released arithmetic; its spheres: whose, how exact, and where they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import adam_hyperball, hyperball, muon_hyperball
from tests.references import neighbours as reference
from tests.references import norms
from tests.support import neighbours, toy

# A stack of expert matrices: [layers, experts, inputs, outputs].
EXPERTS = (("experts", "L E | D -> F"), ("up", "L | D -> F"), ("tall", "F -> D"), ("gain", "L | D"))


def experts(seed=0, dtype=np.float64):
    """Tall, wide, stacked; experts of unlike norms."""
    rng = np.random.default_rng(seed)
    shapes = {"experts": (2, 3, 6, 9), "up": (2, 6, 9), "tall": (9, 6), "gain": (2, 6)}
    tree = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tree["experts"] *= np.array([[1.0, 10.0, 0.1], [0.5, 3.0, 30.0]])[:, :, None, None]
    return tree


KEPT = {
    "matrix": {"experts": (0, 1), "up": (0,), "tall": ()},
    "layer": {"experts": (0,), "up": (0,), "tall": ()},
    "leaf": {"experts": (), "up": (), "tall": ()},
    "output": {"experts": (0, 1, 3), "up": (0, 2), "tall": (1,)},
}


def lengths(w, kept):
    """Norm of every slice."""
    rest = tuple(i for i in range(w.ndim) if i not in kept)
    return np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, axis=rest))


@pytest.mark.parametrize("per", ["matrix", "layer", "leaf", "output"])
@pytest.mark.parametrize("radius", [None, 0.7])
def test_matches_the_released_arithmetic(per, radius):
    rate = lambda t: 0.1 * (1 - 0.05 * t)
    params = experts()
    start = {
        name: lengths(params[name], kept)
        if radius is None
        else np.full(
            [params[name].shape[i] for i in kept],
            radius * np.sqrt(params[name].size / lengths(params[name], kept).size),
        )
        for name, kept in KEPT[per].items()
    }
    want = {name: w.copy() for name, w in params.items()}
    grads = [experts(seed) for seed in range(1, 13)]
    for t, g in enumerate(grads):
        for name in want:
            if name == "gain":
                want[name] = want[name] - rate(t) * g[name]
                continue
            step = lambda w, u, r, t=t: norms.hyperball(w, u, rate(t), r)
            want[name] = norms.on_slices(step, KEPT[per][name], want[name], g[name], start[name])
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, neighbours.FLOAT32)):
        with jax.enable_x64(dtype == jnp.float64):
            cast = lambda tree, dtype=dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
            schedule = lambda count: 0.1 * (1 - 0.05 * jnp.asarray(count, float))
            tx = optax.chain(
                optax.scale_by_learning_rate(schedule),
                hyperball(learning_rate=schedule, radius=radius, per=per, axes=EXPERTS),
            )
            got, state = toy.train(tx, cast(params), [cast(g) for g in grads])
            for name, w in got.items():
                np.testing.assert_allclose(
                    w, want[name], rtol=tolerance, atol=30 * tolerance, err_msg=name
                )
            assert (
                state[1].radius["experts"].shape
                == lengths(params["experts"], KEPT[per]["experts"]).shape
            )


def test_adam_on_the_toy_tree():
    radius = {path: None for path in toy.HIDDEN}

    def prox(t, path, theta, eta, w):
        kept = (0,) if path in toy.STACKED else ()
        if t == 0:
            radius[path] = lengths(w, kept)
        step = lambda w, u, r: norms.hyperball(w, u, eta, r)
        return norms.on_slices(step, kept, w, (w - theta) / eta, radius[path])

    neighbours.agree(
        lambda: neighbours.after(hyperball(learning_rate=neighbours.rate, axes=toy.AXES)),
        lambda params, gradients: reference.last(
            params, gradients, neighbours.RATES, prox, toy.HIDDEN
        ),
        float32=4 * neighbours.FLOAT32,  # sums of up to 192 squares on the way to every norm
    )


def test_the_examples_descend():
    """A link in the other convention would climb, and no array tells."""
    target = jax.random.normal(jax.random.key(1), (5, 7))
    target = {"w": target / jnp.linalg.norm(target)}
    weights = {"w": jax.random.normal(jax.random.key(2), (5, 7))}
    cosine = lambda w: jnp.vdot(w["w"], target["w"]) / jnp.linalg.norm(w["w"])
    schedule = optax.linear_schedule(0.1, 0.0, 60)
    chain = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(schedule),
        hyperball(learning_rate=schedule),
    )
    for tx in (chain, adam_hyperball(schedule), muon_hyperball(schedule)):
        state, w = tx.init(weights), weights
        step = jax.jit(tx.update)
        for _ in range(60):
            updates, state = step(jax.grad(lambda x: -cosine(x))(w), state, w)
            w = optax.apply_updates(w, updates)
        assert cosine(w) > 0.95 > cosine(weights) + 0.5


def test_marin_8621_one_sphere_per_expert():
    """Marin's norm ran over all experts of a layer, so that experts traded their norms among themselves."""
    params = {"experts": jnp.asarray(experts()["experts"], jnp.float32)}
    grads = [{"experts": jnp.asarray(experts(s)["experts"], jnp.float32)} for s in range(1, 40)]

    def end(per):
        link = hyperball(learning_rate=0.05, per=per, axes=EXPERTS[:1])
        tx = optax.chain(optax.scale_by_learning_rate(0.05), link)
        return toy.train(tx, params, grads)[0]["experts"]

    before = lengths(params["experts"], (0, 1))
    np.testing.assert_allclose(lengths(end("matrix"), (0, 1)), before, rtol=1e-6)
    shared = end("layer")
    np.testing.assert_allclose(lengths(shared, (0,)), lengths(params["experts"], (0,)), rtol=1e-6)
    assert np.abs(lengths(shared, (0, 1)) / before - 1).max() > 0.1


LAYOUTS = [
    jax.P(None, None, "fsdp", "tensor"),
    jax.P(None, "fsdp", "tensor", None),
    jax.P("fsdp", None, None, "tensor"),
    jax.P(None, "tensor", None, "fsdp"),
    jax.P(None, None, None, ("fsdp", "tensor")),
    jax.P(None, None, None, None),
]


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Manual"])
@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
@pytest.mark.parametrize("per", ["matrix", "layer"])
def test_marin_8073_norm_of_a_sharded_intermediate(mode, spec, per):
    """A norm of a sharded array came out several times too large, counted once per copy or shard."""
    rng = np.random.default_rng(0)
    shape, steps = (4, 8, 8, 16), 100
    scale = rng.uniform(0.1, 10, shape[:2])[:, :, None, None]
    w = {"experts": jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)}
    g = jnp.asarray(rng.standard_normal((steps, *shape)), jnp.float32)
    kind = jax.sharding.AxisType.Explicit if mode == "Explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("copies", "fsdp", "tensor"), axis_types=(kind,) * 3)
    tx = optax.chain(
        optax.scale_by_learning_rate(0.05),
        hyperball(
            learning_rate=0.05,
            per=per,
            min_direction=0.01,
            axes=EXPERTS[:1],
            param_specs={"experts": spec},
        ),
    )

    def steps_of(w, g):
        def body(carry, g):
            w, state = carry
            updates, state = tx.update({"experts": g}, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(body, (w, tx.init(w)), g)[0][0]

    want = jax.jit(steps_of)(w, g)["experts"]
    place = jax.NamedSharding(mesh, spec)
    whole = jax.NamedSharding(mesh, jax.P(None, *spec))
    with jax.set_mesh(mesh):
        run = steps_of
        if mode == "Manual":
            run = jax.shard_map(
                steps_of,
                in_specs=({"experts": spec}, jax.P(None, *spec)),
                out_specs={"experts": spec},
            )
        got = jax.jit(run)(jax.device_put(w, place), jax.device_put(g, whole))["experts"]
    kept = KEPT[per]["experts"]
    np.testing.assert_allclose(lengths(got, kept), lengths(w["experts"], kept), rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_inside_shard_map_it_asks_for_the_partition():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = hyperball(learning_rate=0.1)
    spec = {"w": jax.P("fsdp")}
    with pytest.raises(ValueError, match=r"norms of 'w'.*\['fsdp'\].*param_specs"):
        jax.shard_map(tx.init, mesh=mesh, in_specs=(spec,), out_specs=jax.P())(
            {"w": jnp.ones((8, 2))}
        )


def test_bfloat16_weights_stay_on_their_sphere():
    """Stored radii do not drift with the rounding of the weights; radii read again do (spec: 2.9 % in 20 000 steps)."""
    w = {"w": jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)}
    keys = jax.random.split(jax.random.key(1), 6000)

    def run(again):
        tx = hyperball(learning_rate=0.01)

        def body(carry, key):
            w, state = carry
            if again:
                state = tx.init(w)._replace(count=state.count)
            u = {"w": -jax.random.normal(key, (64, 64))}
            updates, state = tx.update(u, state, w)
            return (optax.apply_updates(w, updates), state), None

        (out, _), _ = jax.lax.scan(body, (w, tx.init(w)), keys)
        return float(lengths(out["w"], ()) / lengths(w["w"], ()) - 1)

    assert abs(run(again=False)) < 1e-3
    assert abs(run(again=True)) > 5e-3


def test_a_rest_changes_no_bit():
    w = {"w": jnp.asarray(experts()["tall"], jnp.float32)}
    u = {"w": jnp.asarray(experts(1)["tall"], jnp.float32)}
    state = hyperball(learning_rate=0.1).init(w)
    still = jax.tree.map(jnp.zeros_like, u)
    np.testing.assert_array_equal(hyperball(learning_rate=0.1).update(still, state, w)[0]["w"], 0)
    np.testing.assert_array_equal(hyperball(learning_rate=0.0).update(u, state, w)[0]["w"], 0)
    assert jnp.all(hyperball(learning_rate=0.1).update(u, state, w)[0]["w"] != 0)


def test_experts_without_gradients_rest():
    """Without `min_direction` the smallest direction is walked at full speed."""
    w = {"experts": jnp.asarray(experts()["experts"], jnp.float32)}
    u = -0.1 * jax.random.normal(jax.random.key(0), w["experts"].shape)
    u = {"experts": u.at[1, 2].multiply(1e-4)}

    def moved(**options):
        tx = hyperball(learning_rate=0.1, axes=EXPERTS[:1], **options)
        updates, _ = tx.update(u, tx.init(w), w)
        return lengths(updates["experts"], (0, 1)) / lengths(w["experts"], (0, 1))

    np.testing.assert_allclose(moved(), 0.1, atol=0.02)
    idle = moved(min_direction=0.01)
    assert idle[1, 2] == 0 and np.count_nonzero(idle) == 5


def test_nan_is_not_hidden():
    w = {"w": jnp.ones((3, 4))}
    tx = hyperball(learning_rate=0.1, min_direction=0.1)
    u = {"w": jnp.ones((3, 4)).at[1, 1].set(jnp.nan)}
    assert jnp.isnan(tx.update(u, tx.init(w), w)[0]["w"]).all()


def test_zero_matrices_have_no_sphere():
    w = {"experts": jnp.asarray(experts()["experts"]).at[1, 2].set(0)}
    with pytest.raises(ValueError, match=r"experts\[1, 2\] holds only zeros"):
        hyperball(learning_rate=0.1, axes=EXPERTS[:1]).init(w)
    # Under jit nothing can raise: the radius is no number, and the weights of the next step are none either.
    tx = hyperball(learning_rate=0.1, axes=EXPERTS[:1])
    state = jax.jit(tx.init)(w)
    assert np.isnan(state.radius["experts"][1, 2]) and np.isnan(state.radius["experts"]).sum() == 1
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), state, w)
    assert jnp.isnan(updates["experts"][1, 2]).all() and not jnp.isnan(updates["experts"][0]).any()
    # With a radius of their own they can start.
    tx = hyperball(learning_rate=0.1, radius=0.2, axes=EXPERTS[:1])
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["experts"][1, 2] ** 2)), 0.2, rtol=1e-6)


def test_a_state_made_from_shapes_must_be_restored():
    """A step on radii that were never measured or loaded must not look like training."""
    w = {"w": jnp.asarray(experts()["tall"], jnp.float32)}
    tx = hyperball(learning_rate=0.1)
    shapes = jax.eval_shape(lambda: w)
    empty = tx.init(shapes)
    assert np.isnan(empty.radius["w"])
    assert jnp.isnan(tx.update(w, empty, w)[0]["w"]).all()
    known = hyperball(learning_rate=0.1, radius=0.3).init(shapes)
    np.testing.assert_allclose(known.radius["w"], 0.3 * np.sqrt(54), rtol=1e-6)


def test_radii_survive_another_layout():
    """A run that goes on with other shardings keeps the radii of its first step, not those of the weights it finds."""
    w = {"experts": jnp.asarray(experts()["experts"], jnp.bfloat16)}
    tx = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(0.1),
        hyperball(learning_rate=0.1, axes=EXPERTS[:1]),
    )
    grads = [{"experts": jnp.asarray(experts(s)["experts"], jnp.bfloat16)} for s in range(1, 9)]
    want, _ = toy.train(tx, w, grads)
    half, state = toy.train(tx, w, grads[:4])
    first = np.asarray(tx.init(w)[2].radius["experts"])
    host = jax.tree.map(np.asarray, (half, state))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (jax.P("a"), jax.P(None, None, "a")):
        place = lambda x, spec=spec: jax.device_put(
            x, jax.NamedSharding(mesh, spec if np.ndim(x) == 4 else jax.P())
        )
        with jax.set_mesh(mesh):
            weights, moved = jax.tree.map(place, host)
            step = jax.jit(tx.update)
            for g in grads[4:]:
                updates, moved = step(place_tree(g, place), moved, weights)
                weights = optax.apply_updates(weights, updates)
        np.testing.assert_array_equal(np.asarray(moved[2].radius["experts"]), first)
        np.testing.assert_allclose(
            np.asarray(weights["experts"], np.float32),
            np.asarray(want["experts"], np.float32),
            rtol=2**-6,  # two roundings to bfloat16
            atol=1e-3,
        )


def place_tree(tree, place):
    return jax.tree.map(place, tree)


def test_vmap_over_numbers():
    w = {"w": jnp.asarray(experts()["tall"], jnp.float32)}
    u = {"w": jnp.asarray(experts(1)["tall"], jnp.float32)}

    def one(eta, radius, least):
        tx = hyperball(learning_rate=eta, radius=radius, min_direction=least)
        return tx.update(u, tx.init(w), w)[0]["w"]

    numbers = (jnp.array([0.1, 0.2]), jnp.array([0.3, 0.5]), jnp.array([0.0, 0.2]))
    many = jax.vmap(one)(*numbers)
    for i in range(2):
        alone = one(*(float(x[i]) for x in numbers))
        np.testing.assert_allclose(many[i], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(many[0] - many[1]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hyperball(learning_rate=-1.0), r"learning_rate=-1.0 .*nearest allowed value is 0"),
        (lambda: hyperball(learning_rate=0.1, radius=0.0), r"radius=0.0 .*above 0"),
        (lambda: hyperball(learning_rate=0.1, per="layers"), r"did you mean 'layer'"),
        (lambda: hyperball(learning_rate=0.1, mask="hiden"), r"did you mean 'hidden'"),
        (
            lambda: hyperball(learning_rate=0.1, mask=None, axes=EXPERTS).init(experts()),
            r"'gain' of shape \(2, 6\) is not a matrix",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
