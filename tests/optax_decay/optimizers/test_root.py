"""ROOT: against the released rules, its options, one iteration per shape, and where it runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import newton
from optax_decay.matrices import orthogonal
from optax_decay.optimizers import newton_fit
from optax_decay.optimizers.root import momentum_spectra, root, scale_by_root
from tests.references import root as reference_root

# Flax layout: [inputs, outputs]; torch holds the transpose.
AXES = (
    (r"wide", "A -> B"),
    (r"tall", "C -> D"),
    (r"square", "F -> G"),
    (r"stack", "L | I -> J"),
    (r"heads", "O -> H E"),
    (r"embedding", "V -> Q"),
    (r"bias", "R"),
)
SHAPES = {
    "wide": (11, 23),
    "tall": (24, 10),
    "square": (16, 16),
    "stack": (3, 14, 9),
    "heads": (12, 4, 5),
    "embedding": (13, 7),
    "bias": (6,),
}
STEPS = 12
SCHEDULE = 0.01 * np.minimum((1 + np.arange(STEPS)) / 4, 1.0)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(seed=1, steps=STEPS):
    """With a few large entries, and sizes that differ between parameters and drift from step to step."""
    sizes = dict(zip(SHAPES, (1.0, 0.03, 3.0, 0.3, 0.1, 1e-3, 2.0)))
    rng = np.random.default_rng(seed + 1000)
    return [
        {
            name: g * sizes[name] * 1.05**t * (1 + 30 * (rng.random(g.shape) < 0.02))
            for name, g in tree(seed + t).items()
        }
        for t in range(steps)
    ]


def cast(values, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)


def run(tx, weights, grads, dtype=jnp.float32):
    """Weights after each step, and the last state."""
    weights = cast(weights, dtype)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, g):
        updates, state = tx.update(g, state, weights)
        return optax.apply_updates(weights, updates), state

    history = []
    for g in grads:
        weights, state = step(weights, state, cast(g, dtype))
        history.append(jax.tree.map(np.asarray, weights))
    return history, state


def expected(weights, grads, lr, coefficients, weight_decay=0.1, **options):
    """The reference's weights after each step, in our layout."""
    history = [{} for _ in grads]
    for name, w in weights.items():
        gs = [g[name] for g in grads]
        if name in ("embedding", "bias"):
            values = reference_root.adam_run(w, gs, lr, weight_decay=weight_decay)
        else:
            inputs = w.shape[0] if name == "heads" else w.shape[-2]

            def one(p, gs, inputs=inputs):
                shape = tuple(sorted((inputs, p.size // inputs)))
                got = reference_root.matrix_run(
                    p.reshape(inputs, -1).T,
                    [g.reshape(inputs, -1).T for g in gs],
                    lr,
                    weight_decay=weight_decay,
                    coefficients=coefficients(shape),
                    **options,
                )
                return [x.T.reshape(p.shape) for x in got]

            if name == "stack":
                slices = [one(w[i], [g[i] for g in gs]) for i in range(len(w))]
                values = [np.stack([s[t] for s in slices]) for t in range(len(gs))]
            else:
                values = one(w, gs)
        for entry, value in zip(history, values):
            entry[name] = value
    return history


def muon(shape):
    return (reference_root.MUON,) * 5


def polar(shape):
    return newton.polar_express(8).for_shape(shape)


def custom(shape):
    return ((2.9, -3.4, 1.5), (1.5, -0.5, 0.0)) if shape == (11, 23) else ((1.9, -1.3, 0.4),) * 2


MAPPING = {s: custom(s) for s in ((11, 23), (10, 24), (16, 16), (9, 14), (12, 20))}

SETTINGS = {
    # name: (our options, reference's coefficients, reference's options)
    "released": (dict(coefficients=newton.released()), muon, {}),
    "paper's box": (
        dict(
            coefficients=newton.released(),
            nesterov=False,
            threshold=0.4,
            update_rms=None,
            weight_decay=0.0,
        ),
        muon,
        dict(nesterov=False, threshold=0.4, scale=None, weight_decay=0.0),
    ),
    "strong clipping": (
        dict(
            coefficients=newton.triple(reference_root.MUON),
            momentum=0.8,
            threshold=newton.quantile(0.35),
            weight_decay=0.5,
        ),
        muon,
        dict(momentum=0.8, percentile=0.35, weight_decay=0.5),
    ),
    "polar express": (dict(coefficients=newton.polar_express(8)), polar, {}),
    "by shape": (
        dict(coefficients=newton.by_shape(MAPPING), threshold=newton.quantile(1.0)),
        custom,
        dict(percentile=1.0),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_trajectory_float32(name):
    options, coefficients, reference = SETTINGS[name]
    weights, grads = tree(0, 0.1), gradients()
    got, _ = run(root(0.01, mask=None, axes=AXES, **options), weights, grads)
    want = expected(weights, grads, 0.01, coefficients, **reference)
    for a, b in zip(got, want):
        for leaf in SHAPES:
            # The bound of the issue: 12 steps of 0.01 times an iteration accurate to 1e-5 of its entries.
            np.testing.assert_allclose(a[leaf], b[leaf], atol=2e-6, rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("name", ["released", "strong clipping", "by shape"])
def test_trajectory_float64(name):
    options, coefficients, reference = SETTINGS[name]
    with jax.enable_x64(True):
        weights, grads = tree(0, 0.1), gradients()
        schedule = jnp.asarray(SCHEDULE)
        tx = root(lambda t: schedule[t], mask=None, axes=AXES, **options)
        got, state = run(tx, weights, grads, jnp.float64)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state[0]) if x.ndim)
        want = expected(weights, grads, SCHEDULE, coefficients, **reference)
        for a, b in zip(got, want):
            for leaf in SHAPES:
                np.testing.assert_allclose(a[leaf], b[leaf], atol=1e-10, err_msg=leaf)


def test_default_is_the_published_triple_or_a_derived_one():
    """Neither of which is Muon's."""
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 60)), jnp.float32)}
    default, muons = scale_by_root(), scale_by_root(coefficients=newton.released())
    a, _ = default.update(g, default.init(g))
    b, _ = muons.update(g, muons.init(g))
    assert np.abs(a["w"] - b["w"]).max() > 1e-2
    table = newton.fitted().for_shape((40, 60))
    c, _ = scale_by_root(coefficients=newton.per_step(table)).update(g, default.init(g))
    np.testing.assert_array_equal(a["w"], c["w"])


def test_bfloat16_iteration_is_close():
    weights, grads = tree(0), gradients(steps=1)
    exact, _ = run(scale_by_root(axes=AXES), weights, grads)
    rounded, state = run(scale_by_root(axes=AXES, iteration_dtype=jnp.bfloat16), weights, grads)
    assert state.mu["wide"].dtype == jnp.float32
    for leaf in ("wide", "tall", "square", "stack", "heads"):
        a, b = (x[0][leaf] - np.float32(weights[leaf]) for x in (exact, rounded))
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert 1e-4 < error < 0.06, leaf


def test_update_size_is_that_of_adam():
    """All singular values near 1 and RMS near 0.2, whatever the shape."""
    g = gradients(steps=1)[0]
    tx = scale_by_root(coefficients=newton.polar_express(8), axes=AXES)
    updates, _ = tx.update(cast(g, jnp.float32), tx.init(cast(g, jnp.float32)))
    for leaf in ("wide", "tall", "square"):
        u = np.asarray(updates[leaf], np.float64)
        values = np.linalg.svd(u, compute_uv=False) / (0.2 * np.sqrt(max(u.shape)))
        np.testing.assert_allclose(values, 1, atol=2e-2)
        np.testing.assert_allclose(np.sqrt(np.mean(u * u)), 0.2, rtol=2e-2)


def test_clipping_bounds_what_outliers_do():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(20, 30))
    g[3, 4] = 1e6
    clean = g.copy()
    clean[3, 4] = 0.3

    def direction(x, **options):
        x = {"w": jnp.asarray(x, jnp.float32)}
        tx = scale_by_root(coefficients=newton.muon(), **options)
        return np.asarray(tx.update(x, tx.init(x))[0]["w"])

    def cosine(**options):
        a, b = direction(g, **options), direction(clean, **options)
        return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(threshold=newton.quantile(0.9)) > 0.9
    assert cosine(threshold=newton.quantile(1.0)) < 0.5
    assert cosine(threshold=None) == cosine(threshold=newton.quantile(1.0))


def test_zero_gradients_stay_zero():
    x = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(3)}
    tx = scale_by_root()
    updates, _ = tx.update(x, tx.init(x))
    np.testing.assert_array_equal(updates["w"], 0)
    np.testing.assert_array_equal(updates["b"], 0)


def test_nan_is_not_hidden():
    x = {"w": jnp.ones((4, 6)).at[1, 2].set(jnp.nan)}
    tx = scale_by_root()
    assert np.isnan(tx.update(x, tx.init(x))[0]["w"]).all()


def test_any_decay_of_the_library():
    weights, grads = tree(0), gradients(steps=2)
    huber = optax_decay.huber_decay(0.3, threshold=0.5, mask="hidden", axes=AXES)
    got, _ = run(root(0.1, weight_decay=huber, axes=AXES), weights, grads)
    chain = optax.chain(
        scale_by_root(axes=AXES),
        optax_decay.huber_decay(0.3, threshold=0.5, mask="hidden", axes=AXES),
        optax.scale_by_learning_rate(0.1),
    )
    want, _ = run(chain, weights, grads)
    plain, _ = run(root(0.1, weight_decay=0.0, axes=AXES), weights, grads)
    for leaf in SHAPES:
        np.testing.assert_array_equal(got[1][leaf], want[1][leaf])
        same = np.array_equal(got[1][leaf], plain[1][leaf])
        assert same == (leaf in ("embedding", "bias"))


def test_state_holds_one_buffer_per_matrix():
    params = jax.eval_shape(lambda: cast(tree(0), jnp.bfloat16))
    state = scale_by_root(axes=AXES).init(params)
    assert set(state.nu) == {"embedding", "bias"}
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype(jnp.float32)}
    grads = cast(tree(1), jnp.bfloat16)
    updates, new = scale_by_root(axes=AXES).update(grads, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_one_iteration_is_compiled_per_shape(as_for_users):
    """Twelve matrices of two shapes, in either orientation, cost no more program than two."""

    def loops(params):
        tx = scale_by_root(threshold=None)
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
        return len(re.findall(r" while\(", text)), len(
            re.findall(r" dot\(|custom-call.*matmul", text)
        )

    few = {"a": jnp.ones((8, 12)), "b": jnp.ones((8, 20))}
    many = {f"a{i}": jnp.ones((8, 12) if i % 2 else (12, 8)) for i in range(6)}
    many |= {f"b{i}": jnp.ones((8, 20) if i % 3 else (20, 8)) for i in range(6)}
    assert loops(many) == loops(few)
    assert loops(few) > loops({"a": jnp.ones((8, 12))})


def test_large_stacks_go_in_chunks():
    """A stack beyond the workspace bound gives the same as its matrices alone."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 300, 500)), jnp.float32)
    tx = scale_by_root(coefficients=newton.muon(), axes=(("w", "L | A -> B"),))
    got = jax.jit(tx.update)({"w": x}, tx.init({"w": x}))[0]["w"]
    one = scale_by_root(coefficients=newton.muon())
    for i in (0, 5):
        want, _ = jax.jit(one.update)({"w": x[i]}, one.init({"w": x[i]}))
        np.testing.assert_allclose(got[i], want["w"], atol=1e-5)


def test_hermitian_products_by_quarters():
    """The saving changes nothing: sizes on both sides of the threshold, odd and even, both orientations."""
    rng = np.random.default_rng(0)
    coefficients = newton.muon(3).for_shape((1, 1))
    for shape in ((orthogonal.SPLIT + 1, 300), (300, orthogonal.SPLIT), (2, 40, 30)):
        x = rng.normal(size=shape)
        x = x / np.sqrt(np.sum(x * x, axis=(-2, -1), keepdims=True))
        got = orthogonal.quintic_steps(
            jnp.asarray(x, jnp.float32), coefficients, precision="highest"
        )
        flat = x.reshape(-1, *shape[-2:])
        want = np.stack([reference_root.newton(m, coefficients) for m in flat]).reshape(shape)
        # Products of unit norm matrices in float32, each step amplifying what was lost by at most a = 3.4.
        np.testing.assert_allclose(got, want, atol=3.4**3 * 6e-8 * 10)


def test_complex_matrices():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 8)) + 1j * rng.normal(size=(5, 8))
    for w in (g, g.T):
        x = {"w": jnp.asarray(w, jnp.complex64)}
        tx = scale_by_root(threshold=newton.quantile(0.7), coefficients=newton.polar_express(8))
        update, _ = tx.update(x, tx.init(x))
        d = w * (1 + 0.95)
        theta = np.quantile(np.abs(d), 0.7)
        d = d * np.minimum(1, theta / np.abs(d))
        u, _, vh = np.linalg.svd(d, full_matrices=False)
        np.testing.assert_allclose(update["w"], 0.2 * np.sqrt(8) * u @ vh, atol=2e-2)


def test_momentum_spectra_fit_coefficients():
    weights, grads = tree(0), gradients(steps=3)
    tx = root(0.01, axes=AXES)
    _, state = run(tx, weights, grads)
    spectra = momentum_spectra(state, AXES)
    assert {shape: len(s) for shape, s in spectra.items()} == {
        (11, 23): 1,
        (10, 24): 1,
        (16, 16): 1,
        (9, 14): 3,
        (12, 20): 1,
    }
    m = np.asarray(state[0].mu["wide"], np.float64)
    theta = np.quantile(np.abs(m), 0.9)
    want = np.linalg.svd(np.clip(m, -theta, theta), compute_uv=False)
    np.testing.assert_allclose(spectra[11, 23][0], want, rtol=1e-5)
    fitted = {
        shape: newton_fit.fit_coefficients(shape, spectra=s)
        for shape, s in spectra.items()
        if shape == (9, 14)
    }
    fresh = root(0.01, coefficients=newton.by_shape(fitted), axes=AXES)
    a, _ = run(fresh, weights, grads)
    b, _ = run(tx, weights, grads)
    assert np.abs(a[-1]["stack"] - b[-1]["stack"]).max() > 1e-6
    np.testing.assert_array_equal(a[-1]["wide"], b[-1]["wide"])
    with pytest.raises(ValueError, match="no ScaleByRootState"):
        momentum_spectra(optax.sgd(0.1).init(weights))


SHARDED = {
    "a": ((3, 16, 24), "L | A -> B", jax.P(None, "fsdp", "tensor")),
    "b": ((24, 16), "B -> A", jax.P("tensor", "fsdp")),
    "c": ((16, 4, 6), "A -> H E", jax.P("fsdp", "tensor")),
    "d": ((8, 12), "G -> D", jax.P("fsdp", None)),
    "v": ((16,), "A", jax.P("fsdp")),
}


@pytest.mark.parametrize("stack_axes", [None, (), "tensor"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_equals_single(kind, stack_axes):
    axes = tuple((name, text) for name, (_, text, _) in SHARDED.items())
    rng = np.random.default_rng(0)
    grads = [
        {name: rng.normal(size=shape) for name, (shape, _, _) in SHARDED.items()} for _ in range(2)
    ]
    weights = {name: rng.normal(size=shape) for name, (shape, _, _) in SHARDED.items()}
    want, _ = run(root(0.01, axes=axes), weights, grads)
    tx = root(0.01, axes=axes, stack_axes=stack_axes)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    place = {name: jax.NamedSharding(mesh, spec) for name, (_, _, spec) in SHARDED.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(cast(weights, jnp.float32), place)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            if kind == "Explicit":
                for name in SHARDED:
                    assert jax.typeof(updates[name]).sharding == jax.typeof(g[name]).sharding
            return optax.apply_updates(params, updates), state

        for g in grads:
            params, state = step(params, state, jax.device_put(cast(g, jnp.float32), place))
    for name in SHARDED:
        np.testing.assert_allclose(params[name], want[-1][name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_collectives_do_not_grow_with_steps_or_matrices(kind, as_for_users):
    """Data moves once in and once out: no collective inside the iteration, however long it is."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    spec = jax.P(None, "fsdp", "tensor")

    def program(layers, steps):
        tx = scale_by_root(coefficients=newton.polar_express(steps), axes=(("w", "L | A -> B"),))
        place = jax.NamedSharding(mesh, spec)
        x = {"w": jax.device_put(jnp.ones((layers, 16, 24)), place)}
        with jax.set_mesh(mesh):
            state = tx.init(x)
            state = state._replace(mu=jax.device_put(state.mu, place))
            out = jax.tree.map(
                lambda a: place if a.ndim else jax.NamedSharding(mesh, jax.P()), state
            )
            step = jax.jit(tx.update, out_shardings=({"w": place}, out))
            text = step.lower(x, state).compile().as_text()
        found = re.findall(r" (all-reduce|all-to-all|all-gather|collective-permute)\(", text)
        return len(found), text

    count, text = program(8, 5)
    assert count == program(16, 8)[0]
    assert " all-to-all(" in text and " all-gather(" not in text
    bodies = re.findall(r"body=%?([\w.]+)", text)
    assert bodies
    for name in bodies:
        body = re.search(rf"(?m)^%?{re.escape(name)} .*?^}}", text, re.S)
        assert body is not None
        assert not re.search(r" (all-reduce|all-to-all|all-gather)\(", body[0])


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 9)), jnp.float32)}
    tx = scale_by_root(axes=(("w", "L | A -> B"),))

    def step(g):
        return tx.update(g, tx.init(g))[0]

    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")))(g)
    np.testing.assert_allclose(got["w"], jax.jit(step)(g)["w"], atol=1e-6)


def test_resume_is_bitwise():
    weights, grads = tree(0, 0.1), gradients(steps=4)
    tx = root(0.01, axes=AXES)
    want, _ = run(tx, weights, grads)
    params = cast(weights, jnp.float32)
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        host = [np.asarray(x).copy() for x in jax.tree.leaves(state)]
        state = jax.tree.unflatten(jax.tree.structure(tx.init(params)), map(jnp.asarray, host))
        params, state = step(params, state, cast(g, jnp.float32))
    for leaf in SHAPES:
        np.testing.assert_array_equal(params[leaf], want[-1][leaf])


def test_errors_name_the_nearest_choice():
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        scale_by_root(coefficients="moun")
    with pytest.raises(ValueError, match=r"pass muon\(\)"):
        scale_by_root(coefficients="muon")
    with pytest.raises(ValueError, match=r"q=1\.2 .* nearest allowed value is 1"):
        root(0.1, threshold=newton.quantile(1.2))
    with pytest.raises(ValueError, match=r"q=1\.2 .* nearest allowed value is 1"):
        root(0.1, threshold=newton.Quantile(1.2))
    with pytest.raises(ValueError, match=r"threshold=0.* a number above 0"):
        scale_by_root(threshold=0.0)
    with pytest.raises(ValueError, match="mask of its own"):
        root(0.1, weight_decay=optax_decay.huber_decay(), mask="hidden")
    optax.inject_hyperparams(scale_by_root)().init({"w": jnp.ones((2, 3))})
