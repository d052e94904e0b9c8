"""Conda: against the released rules, its special cases, its refreshes, and where it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.optimizers.conda import conda, scale_by_conda
from tests.references import conda as reference_conda

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
SCHEDULE = 0.01 * np.minimum(np.arange(STEPS) / 4, 1.0)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(seed=1, steps=STEPS):
    """Full rank, of a size that differs between parameters and drifts from step to step."""
    sizes = dict(zip(SHAPES, (1.0, 0.03, 3.0, 0.3, 0.1, 1e-3, 2.0)))
    return [
        {name: g * sizes[name] * 1.05**t for name, g in tree(seed + t).items()}
        for t in range(steps)
    ]


def cast(values, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)


def run(tx, weights, grads, dtype=jnp.float32, **extra):
    """Weights after each step."""
    weights = cast(weights, dtype)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, g):
        updates, state = tx.update(g, state, weights, **extra)
        return optax.apply_updates(weights, updates), state

    history = []
    for g in grads:
        weights, state = step(weights, state, cast(g, dtype))
        history.append(jax.tree.map(np.asarray, weights))
    return history, state


def expected(weights, grads, lr, **options):
    """The reference's weights after each step, in our layout."""
    adam = {k: v for k, v in options.items() if k in ("b1", "b2", "eps", "weight_decay")}
    side_of = {"square": options.pop("side", "smaller_or_inputs").removeprefix("smaller_or_")}
    history = [{} for _ in grads]

    def record(name, values):
        for entry, value in zip(history, values):
            entry[name] = value

    for name, w in weights.items():
        gs = [g[name] for g in grads]
        if name in ("embedding", "bias"):
            record(name, reference_conda.adam_run(w, gs, lr, **adam))
            continue
        # torch's "right" turns the inputs of [outputs, inputs].
        side = {"inputs": "right", "outputs": "left"}.get(side_of.get(name), "std")
        inputs = w.shape[-2] if name != "heads" else w.shape[0]

        def matrix(x, inputs=inputs):
            return x.reshape(inputs, -1).T

        def one(p, gs, side=side):
            return reference_conda.matrix_run(p, gs, lr, **{**options, "side": side})

        if name == "stack":
            slices = [one(matrix(w[i]), [matrix(g[i]) for g in gs]) for i in range(len(w))]
            record(name, [np.stack([s[t].T for s in slices]) for t in range(len(gs))])
        else:
            got = one(matrix(w), [matrix(g) for g in gs])
            record(name, [p.T.reshape(w.shape) for p in got])
    return history


SETTINGS = {
    "recipe": dict(b2=0.99, gap=2000, scale=0.25),
    "decay": dict(b2=0.999, gap=5, scale=1.0, weight_decay=0.1),
    "every step": dict(b1=0.8, b2=0.95, gap=1, scale=0.5),
    "large eps": dict(b2=0.99, eps=1e-2, gap=4, scale=0.25, weight_decay=0.01),
    "output side": dict(b2=0.99, gap=3, scale=0.25, side="smaller_or_outputs"),
}


def build(lr, options, **more):
    names = {"gap": "refresh_every"}
    return conda(
        lr, **{names.get(k, k): v for k, v in options.items()}, mask=None, axes=AXES, **more
    )


@pytest.mark.parametrize("basis", ["eigh", "svd"])
@pytest.mark.parametrize("name", SETTINGS)
def test_trajectory_float32(name, basis):
    options = SETTINGS[name]
    weights, grads = tree(0, 0.1), gradients()
    got, _ = run(build(0.01, options, basis=basis), weights, grads)
    want = expected(weights, grads, 0.01, **options)
    for a, b in zip(got, want):
        for leaf in SHAPES:
            # The bound of the issue; 12 steps of at most 0.01, each relative to its basis accurate to 1e-6.
            np.testing.assert_allclose(a[leaf], b[leaf], atol=2e-6, rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("basis", ["eigh", "svd"])
@pytest.mark.parametrize("name", ["decay", "output side"])
def test_trajectory_float64(name, basis):
    options = SETTINGS[name]
    with jax.enable_x64(True):
        weights, grads = tree(0, 0.1), gradients()
        schedule = jnp.asarray(SCHEDULE)
        got, state = run(
            build(lambda t: schedule[t], options, basis=basis), weights, grads, jnp.float64
        )
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state[0]) if x.ndim)
        want = expected(weights, grads, SCHEDULE, **options)
        for a, b in zip(got, want):
            for leaf in SHAPES:
                np.testing.assert_allclose(a[leaf], b[leaf], atol=1e-10, err_msg=leaf)


def test_decay_before_the_update_is_adamw():
    """A transformation differs from the released order by η²λu, and only by that."""
    weights, grads = tree(0), gradients(steps=1)
    link = optax_decay.decay(0.5)
    before, _ = run(conda(0.1, weight_decay=link, axes=AXES), weights, grads)
    after, _ = run(conda(0.1, weight_decay=0.5, mask=None, axes=AXES), weights, grads)
    plain, _ = run(conda(0.1, weight_decay=0.0, mask=None, axes=AXES), weights, grads)
    for leaf, w in weights.items():
        u = (w - plain[0][leaf]) / 0.1
        difference = after[0][leaf] - before[0][leaf]
        assert np.abs(difference).max() > 1e-4
        np.testing.assert_allclose(difference, 0.1**2 * 0.5 * u, atol=2e-6)


def test_any_decay_of_the_library():
    weights, grads = tree(0), gradients(steps=2)
    huber = optax_decay.huber_decay(0.3, threshold=0.5, mask="hidden", axes=AXES)
    got, _ = run(conda(0.1, weight_decay=huber, axes=AXES), weights, grads)
    chain = optax.chain(
        scale_by_conda(axes=AXES),
        optax_decay.huber_decay(0.3, threshold=0.5, mask="hidden", axes=AXES),
        optax.scale_by_learning_rate(0.1),
    )
    want, _ = run(chain, weights, grads)
    plain, _ = run(conda(0.1, axes=AXES), weights, grads)
    for leaf in SHAPES:
        np.testing.assert_array_equal(got[1][leaf], want[1][leaf])
        same = np.array_equal(got[1][leaf], plain[1][leaf])
        assert same == (leaf in ("embedding", "bias"))


def test_default_mask_is_hidden_matrices_and_head():
    axes = (*AXES, (r"head", "Q -> V"))
    weights = {**tree(0), "head": np.random.default_rng(5).normal(size=(7, 13))}
    grads = [{**g, "head": 0.1 * weights["head"]} for g in gradients(steps=1)]
    decayed, _ = run(conda(0.1, weight_decay=0.5, axes=axes), weights, grads)
    plain, _ = run(conda(0.1, axes=axes), weights, grads)
    moved = {leaf for leaf in weights if not np.array_equal(decayed[0][leaf], plain[0][leaf])}
    assert moved == set(weights) - {"embedding", "bias"}


def test_zero_first_gradient_keeps_the_identity():
    weights, grads = tree(0), gradients(steps=6)
    for g in grads[:2]:
        g["wide"] = 0 * g["wide"]
        g["stack"][1] = 0 * g["stack"][1]
    got, state = run(scale_by_conda(refresh_every=4, axes=AXES), weights, grads[:2])
    np.testing.assert_array_equal(state.basis["wide"], np.eye(11))
    np.testing.assert_array_equal(state.basis["stack"][1], np.eye(9))
    assert np.abs(state.basis["stack"][0] - np.eye(9)).max() > 0.1
    np.testing.assert_array_equal(got[1]["wide"], np.float32(weights["wide"]))
    _, state = run(scale_by_conda(refresh_every=4, axes=AXES), weights, grads)
    assert np.abs(state.basis["wide"] - np.eye(11)).max() > 0.1
    # Until then it is Adam.
    tx = scale_by_conda(refresh_every=100, scale=1.0, axes=AXES)
    vector = scale_by_conda(refresh_every=100, axes=(("wide", "A B"), *AXES[1:]))
    got, _ = run(tx, weights, grads)
    want, _ = run(vector, weights, grads)
    np.testing.assert_allclose(got[-1]["wide"], want[-1]["wide"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("basis", ["eigh", "svd"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_rank_deficient_momentum(basis, scale):
    """No step into directions that the momentum does not have, no nan, a basis that is still orthogonal."""
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(10, 4)), rng.normal(size=(4, 24))
    g = scale * factors[0] @ factors[1]
    tx = scale_by_conda(scale=1.0, basis=basis)
    params = {"w": jnp.zeros((10, 24))}
    update, state = jax.jit(tx.update)({"w": jnp.asarray(g, jnp.float32)}, tx.init(params))
    u = np.asarray(update["w"], np.float64)
    q = np.asarray(state.basis["w"], np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(10), atol=2e-6)
    left = np.linalg.svd(factors[0], full_matrices=True)[0]
    inside, outside = left[:, :4].T @ u, left[:, 4:].T @ u
    assert np.abs(inside).max() > 0.9
    # The basis of the row space is accurate to rounding times the squared condition (about 10) of the factors.
    assert np.abs(outside).max() < 1e-4
    # The released rule would move there by one whole step.
    noisy = reference_conda.matrix_run(
        np.zeros((24, 10), np.float32), [g.T.astype(np.float32)], 1.0, b2=0.99, eps=0.0, scale=1.0
    )
    assert np.abs(left[:, 4:].T @ noisy[0].T).max() > 0.1
    # Directions that a later gradient fills move as any other.
    full = scale * rng.normal(size=(10, 24))
    update, _ = jax.jit(tx.update)({"w": jnp.asarray(full, jnp.float32)}, state)
    assert np.abs(left[:, 4:].T @ np.asarray(update["w"])).max() > 0.5


def test_tiny_and_huge_gradients_have_a_basis():
    rng = np.random.default_rng(4)
    g = rng.normal(size=(6, 9))
    results = []
    for scale in (1e-25, 1.0, 1e18):
        tx = scale_by_conda(eps=0.0)
        x = {"w": jnp.asarray(scale * g, jnp.float32)}
        _, state = tx.update(x, tx.init(x))
        q = np.abs(np.asarray(state.basis["w"]))
        assert np.abs(q - np.eye(6)).max() > 0.1
        results.append(q)
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)
    np.testing.assert_allclose(results[2], results[1], atol=1e-5)


def test_sides():
    weights, grads = {"wide": tree(0)["wide"]}, [{"wide": g["wide"]} for g in gradients(steps=3)]
    axes = (("wide", "A -> B"),)
    history = {}
    for side in ("smaller_or_inputs", "inputs"):
        tx = scale_by_conda(side=side, axes=axes)
        history[side], state = run(tx, weights, grads)
        assert state.basis["wide"].shape == (11, 11)
    np.testing.assert_array_equal(
        history["smaller_or_inputs"][-1]["wide"], history["inputs"][-1]["wide"]
    )
    with pytest.raises(
        ValueError, match=r"side='outputs' .* larger side of 'wide' \(11 inputs, 23"
    ):
        scale_by_conda(side="outputs", axes=axes).init(cast(weights, jnp.float32))
    square = {"w": jnp.asarray(tree(0)["square"], jnp.float32)}
    for side in ("smaller_or_outputs", "outputs"):
        tx = scale_by_conda(side=side, axes=(("w", "A -> B"),))
        _, state = tx.update(square, tx.init(square))
        m = np.asarray(square["w"])
        turned = m @ np.asarray(state.basis["w"])
        gram = turned.T @ turned
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-4 * gram.max()
        assert np.all(np.diff(np.diag(gram)) < 0)  # largest direction first


def decompositions(jaxpr):
    """How many eigendecompositions a program holds, each counted once per place."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "eigh"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            count += decompositions(inner) if hasattr(inner, "eqns") else 0
    return count


def test_one_decomposition_per_size_whatever_the_number_of_matrices():
    params = {
        f"w{i}": jnp.ones((8, 5 + i)) for i in range(3, 9)
    }  # six leaves, all with smaller side 8
    params["narrow"] = jnp.ones((4, 30))
    tx = scale_by_conda()
    program = jax.make_jaxpr(tx.update)(params, tx.init(params))
    assert decompositions(program.jaxpr) == 2
    tx = scale_by_conda(staggered=True)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params))
    assert decompositions(program.jaxpr) == 4  # all at first, one at a time afterwards


def test_staggered_refreshes_each_matrix_once_per_period():
    weights, grads = tree(0, 0.1), gradients()
    every = 5
    tx = scale_by_conda(refresh_every=every, staggered=True, axes=AXES)
    state = tx.init(cast(weights, jnp.float32))
    update = jax.jit(tx.update)
    changed = {}
    for t, g in enumerate(grads):
        _, new = update(cast(g, jnp.float32), state)
        for path, q in new.basis.items():
            for i, (a, b) in enumerate(
                zip(np.atleast_3d(q.T).T, np.atleast_3d(state.basis[path].T).T)
            ):
                if not np.array_equal(a, b):
                    changed.setdefault((path, i), []).append(t)
        state = new
    assert set(changed) == {(p, 0) for p in ("wide", "tall", "square", "heads")} | {
        ("stack", i) for i in range(3)
    }
    for key, steps in changed.items():
        phase = 0 if key[0] != "stack" else (key[1] * every) // 3
        due = [t for t in range(1, STEPS) if t % every == phase]
        assert steps == [0, *due], key
    # The trajectory is that of the rules with these steps for these matrices.
    got, _ = run(conda(0.01, refresh_every=every, staggered=True, axes=AXES), weights, grads)
    for i in range(3):
        want = reference_conda.matrix_run(
            weights["stack"][i].T,
            [g["stack"][i].T for g in grads],
            0.01,
            b2=0.99,
            refresh_at={0, *changed["stack", i]},
        )
        np.testing.assert_allclose(got[-1]["stack"][i], want[-1].T, atol=2e-6)


def test_more_matrices_than_steps_between_refreshes():
    params = {"w": jnp.zeros((7, 5, 6))}
    rng = np.random.default_rng(0)
    tx = scale_by_conda(refresh_every=3, staggered=True, axes=(("w", "L | A -> B"),))
    state = tx.init(params)
    update = jax.jit(tx.update)
    counts = np.zeros(7, int)
    for _ in range(7):
        _, new = update({"w": jnp.asarray(rng.normal(size=(7, 5, 6)), jnp.float32)}, state)
        counts += np.any(np.asarray(new.basis["w"] != state.basis["w"]), axis=(1, 2))
        state = new
    assert (counts == [3, 3, 3, 3, 3, 3, 3]).all()  # at step 0 and twice in the six steps after


def test_caller_owns_the_refresh():
    weights, grads = tree(0, 0.1), gradients()
    tx = conda(0.01, refresh_every=4, axes=AXES)
    want, _ = run(tx, weights, grads)
    state = tx.init(cast(weights, jnp.float32))
    params = cast(weights, jnp.float32)

    @jax.jit
    def step(params, state, g, refresh):
        updates, state = tx.update(g, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    for t, g in enumerate(grads):
        params, state = step(params, state, cast(g, jnp.float32), t % 4 == 0)
    for leaf in SHAPES:
        np.testing.assert_array_equal(params[leaf], want[-1][leaf])
    never = scale_by_conda(axes=AXES)
    _, state = never.update(cast(grads[0], jnp.float32), never.init(params), refresh=False)
    np.testing.assert_array_equal(state.basis["tall"], np.eye(10))


@pytest.mark.parametrize("staggered", [False, True])
def test_resume_across_a_refresh_is_bitwise(staggered):
    weights, grads = tree(0, 0.1), gradients()
    tx = conda(0.01, refresh_every=4, staggered=staggered, weight_decay=0.1, axes=AXES)
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


def test_state_by_name_and_by_shape():
    params = jax.eval_shape(lambda: cast(tree(0), jnp.bfloat16))
    state = scale_by_conda(axes=AXES).init(params)
    assert {p: q.shape for p, q in state.basis.items()} == {
        "wide": (11, 11),
        "tall": (10, 10),
        "square": (16, 16),
        "stack": (3, 9, 9),
        "heads": (12, 12),
    }
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype(jnp.float32)}
    grads = cast(tree(1), jnp.bfloat16)
    updates, new = scale_by_conda(axes=AXES).update(grads, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_complex_matrices():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 8)) + 1j * rng.normal(size=(5, 8))
    for w in (g, g.T):
        params = {"w": jnp.asarray(w, jnp.complex64)}
        tx = scale_by_conda(scale=1.0)
        update, state = tx.update(params, tx.init(params))
        assert not jnp.iscomplexobj(state.nu["w"])
        q = np.asarray(state.basis["w"])
        turned = q.conj().T @ w if w.shape[0] < w.shape[1] else w @ q
        size = np.abs(turned)
        want = turned / size
        back = q @ want if w.shape[0] < w.shape[1] else want @ q.conj().T
        np.testing.assert_allclose(update["w"], back, atol=1e-5)


def sharded(kind, names=("fsdp", "tensor"), sizes=(4, 2)):
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType[kind],) * len(names))
    return mesh


SHARDED = {
    "a": ((3, 16, 24), "L | A -> B", jax.P(None, "fsdp", "tensor")),
    "b": ((24, 16), "B -> A", jax.P("tensor", "fsdp")),
    "c": ((16, 4, 6), "A -> H E", jax.P("fsdp", "tensor")),
    "d": ((8, 12), "G -> D", jax.P("fsdp", None)),
    "v": ((16,), "A", jax.P("fsdp")),
}


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_equals_single(kind, staggered):
    axes = tuple((name, text) for name, (_, text, _) in SHARDED.items())
    rng = np.random.default_rng(0)
    grads = [
        {name: rng.normal(size=shape) for name, (shape, _, _) in SHARDED.items()} for _ in range(5)
    ]
    weights = {name: rng.normal(size=shape) for name, (shape, _, _) in SHARDED.items()}
    tx = conda(0.01, refresh_every=2, staggered=staggered, weight_decay=0.1, axes=axes)
    want, _ = run(tx, weights, grads)
    mesh = sharded(kind)
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
        # 5 steps of 0.01, whose directions differ by rounding in another order of summation.
        np.testing.assert_allclose(params[name], want[-1][name], atol=2e-6, err_msg=name)


def test_explicit_without_a_mesh_in_context():
    mesh = sharded("Explicit")
    g = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    x = {"w": jax.device_put(g, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))}
    tx = scale_by_conda()
    got, _ = jax.jit(tx.update)(x, tx.init(x))
    want, _ = tx.update({"w": jnp.asarray(g)}, tx.init({"w": jnp.asarray(g)}))
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-5)


def test_inside_shard_map():
    """Whole matrices on every device, the stack split by hand."""
    mesh = sharded("Auto", ("x",), (8,))
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 9)), jnp.float32)}
    tx = scale_by_conda(axes=(("w", "L | A -> B"),))

    def step(g):
        return tx.update(g, tx.init(g))[0]

    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")))(g)
    np.testing.assert_allclose(got["w"], jax.jit(step)(g)["w"], atol=1e-6)


def test_errors_name_the_nearest_choice():
    with pytest.raises(ValueError, match="did you mean 'inputs'"):
        scale_by_conda(side="input")
    with pytest.raises(ValueError, match="basis='qr' is not known; allowed: 'eigh', 'svd'"):
        scale_by_conda(basis="qr")
    with pytest.raises(ValueError, match=r"refresh_every=0 .* nearest allowed value is 1"):
        scale_by_conda(refresh_every=0)
    with pytest.raises(ValueError, match=r"b2=1\.0 is outside \[0, 1\)"):
        conda(0.1, b2=1.0)
    with pytest.raises(ValueError, match="mask of its own"):
        conda(0.1, weight_decay=optax_decay.huber_decay(), mask="hidden")
    with pytest.raises(ValueError, match="stack_axes names 'fsdp'"):
        g = {"w": jnp.ones((3, 4))}
        tx = scale_by_conda(stack_axes="fsdp")
        tx.update(g, tx.init(g))


@pytest.mark.parametrize("basis", ["eigh", "svd"])
@pytest.mark.parametrize("staggered", [False, True])
def test_rounding_of_sixteen_bit_gradients_is_not_blown_up(basis, staggered):
    """A gradient of rank 1, rounded to bfloat16, has rank 12 of noise. The first step stays within one rounding."""
    keys = jax.random.split(jax.random.key(5), 2)
    g = jax.random.normal(keys[0], (12, 1)) @ jax.random.normal(keys[1], (1, 20))
    tx = optax_decay.scale_by_conda(basis=basis, staggered=staggered, axes=(("w", "D -> F"),))

    def first(dtype):
        given = {"w": g.astype(dtype)}
        return tx.update(given, tx.init(given))[0]["w"].astype(jnp.float32)

    exact = first(jnp.float32)
    # Rounding the gradient and the update: 2^-9 each in the worst case, 2^-8 together.
    assert jnp.linalg.norm(first(jnp.bfloat16) - exact) <= 2**-8 * jnp.linalg.norm(exact)
