"""Muon and NorMuon: against the released rules and optax, on stacks, experts and heads, and where they run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import muon, newton, normuon, scale_by_muon, scale_by_normuon, shape_scales
from tests.references import muon as reference

# Flax layout: [inputs, outputs]; torch holds the transpose.
AXES = (
    (r"wide", "A -> B"),
    (r"tall", "C -> D"),
    (r"square", "F -> G"),
    (r"stack", "L | I -> J"),
    (r"experts", "L E | M -> N"),
    (r"heads", "O -> H K"),
    (r"embedding", "V -> Q"),
    (r"bias", "R"),
)
SHAPES = {
    "wide": (11, 23),
    "tall": (24, 10),
    "square": (16, 16),
    "stack": (3, 14, 9),
    "experts": (2, 3, 9, 14),
    "heads": (12, 4, 5),
    "embedding": (13, 7),
    "bias": (6,),
}
OTHERS = ("embedding", "bias")
BATCH = {"stack": 1, "experts": 2}
STEPS = 12
SCHEDULE = 0.01 * np.minimum((1 + np.arange(STEPS)) / 4, 1.0)
# Twelve steps of 15 products in float32, each of unit norm matrices; measured in the same iteration of ROOT.
FLOAT32 = 2e-5


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(seed=1, steps=STEPS):
    """Sizes differ between parameters and drift from step to step."""
    sizes = dict(zip(SHAPES, (1.0, 0.03, 3.0, 0.3, 0.1, 10.0, 1e-3, 2.0)))
    return [
        {name: g * sizes[name] * 1.05**t for name, g in tree(seed + t).items()}
        for t in range(steps)
    ]


def cast(values, dtype=jnp.float32):
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


def expected(weights, grads, lr, weight_decay=0.1, adam_b2=0.95, **options):
    """The reference's weights after the last step, in our layout."""
    last = {}
    for name, w in weights.items():
        gs = [g[name] for g in grads]
        if name in OTHERS:
            last[name] = reference.adam_run(w, gs, lr, b2=adam_b2)[-1]
            continue
        lead = w.shape[: BATCH.get(name, 0)]
        inputs = w.shape[len(lead)]
        out = np.empty_like(w)
        for index in np.ndindex(lead):
            torch = lambda x, index=index, inputs=inputs: x[index].reshape(inputs, -1).T
            history = reference.matrix_run(
                torch(w), [torch(g) for g in gs], lr, weight_decay=weight_decay, **options
            )
            out[index] = history[-1].T.reshape(w.shape[len(lead) :])
        last[name] = out
    return last


def schedule(count):
    return jnp.asarray(SCHEDULE)[count]


SCALES = {
    "moonshot": (shape_scales.sqrt_larger_side(0.2), lambda m, n: 0.2 * max(m, n) ** 0.5),
    "jordan": (shape_scales.sqrt_outputs_per_input(), lambda m, n: max(1, m / n) ** 0.5),
    "unit": (shape_scales.sqrt_outputs_per_input(at_least=0.0), lambda m, n: (m / n) ** 0.5),
    "one": (shape_scales.one(), lambda m, n: 1.0),
}


@pytest.mark.parametrize("form", ["nesterov", "plain", "bias_corrected_nesterov"])
@pytest.mark.parametrize("scale", sorted(SCALES))
@pytest.mark.parametrize("beta", [None, 0.9])
def test_matches_the_released_rules(form, scale, beta):
    if scale in ("unit", "one") and (beta is None) != (form == "plain"):
        return  # every pair of values occurs without these
    weights, grads = tree(0), gradients()
    ours, theirs = SCALES[scale]
    coefficients = newton.polar_express(steps=4) if beta else newton.muon()
    table = coefficients.for_shape((1, 1))
    want = expected(
        weights, grads, SCHEDULE, form=form, scale=theirs, beta=beta, coefficients=table
    )
    make = muon if beta is None else functools.partial(normuon, output_memory=beta)
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, FLOAT32)):
        with jax.enable_x64(dtype == jnp.float64):
            tx = make(
                schedule,
                mask="hidden",
                momentum_form=form,
                shape_scale=ours,
                coefficients=coefficients,
                axes=AXES,
            )
            got, _ = run(tx, weights, grads, dtype)
        for name in SHAPES:
            np.testing.assert_allclose(got[-1][name], want[name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("consistent_rms", "nesterov"), [(None, True), (0.2, True), (0.2, False)])
def test_equals_optax(consistent_rms, nesterov):
    """With Nesterov, optax's Adam of the other parameters is NAdam: there only the matrices can agree."""
    weights, grads = tree(0), gradients()
    scale = (
        shape_scales.sqrt_outputs_per_input()
        if consistent_rms is None
        else shape_scales.sqrt_larger_side(consistent_rms)
    )
    numbers = optax.contrib.MuonDimensionNumbers
    dimensions = {
        "wide": numbers(0, 1),
        "tall": numbers(0, 1),
        "square": numbers(0, 1),
        "stack": numbers(1, 2),
        "experts": numbers(2, 3),
        "heads": numbers(0, (1, 2)),
        "embedding": None,
        "bias": None,
    }
    theirs = optax.contrib.muon(
        schedule,
        weight_decay=0.1,
        adam_b2=0.95,
        consistent_rms=consistent_rms,
        nesterov=nesterov,
        muon_weight_dimension_numbers=dimensions,
    )
    common = dict(mask="hidden", shape_scale=scale, axes=AXES)
    form = "bias_corrected_nesterov" if nesterov else "plain"
    ours = muon(schedule, momentum_form=form, **common)
    want, got = (run(tx, weights, grads)[0][-1] for tx in (theirs, ours))
    other = run(muon(schedule, **common), weights, grads)[0][-1]
    for name in set(SHAPES) - set(OTHERS if nesterov else ()):
        np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)
        assert name in OTHERS or np.abs(other[name] - want[name]).max() > 1e-4
    # The dimension numbers of optax are axes too.
    same = dict(mask="hidden", shape_scale=scale, axes=dimensions)
    same = muon(schedule, momentum_form=form, **same)
    for name, w in run(same, weights, grads)[0][-1].items():
        np.testing.assert_array_equal(w, got[name])


def test_heavy_ball_momentum_has_the_same_direction():
    """``M ← μ M + g``, ``d = g + μ M`` is ``1/(1-μ)`` times the form used here."""
    weights, grads = tree(0), gradients(steps=5)
    got, _ = run(muon(0.01, eps=0.0, weight_decay=0.0, axes=AXES), weights, grads)
    p, m = weights["tall"].T.copy(), 0.0
    for g in grads:
        m = 0.95 * m + g["tall"].T
        d = g["tall"].T + 0.95 * m
        p = p - 0.01 * 0.2 * 24**0.5 * reference.newton(d, newton.muon().for_shape((1, 1)), 0.0)
    np.testing.assert_allclose(got[-1]["tall"], p.T, atol=FLOAT32)


def test_experts_are_matrices_of_their_own():
    """Jordan's code makes one matrix of all experts of a layer, silently."""
    g = cast(gradients(steps=1)[0])
    tx = scale_by_muon(coefficients=newton.polar_express(steps=8), axes=AXES)
    u = np.asarray(tx.update(g, tx.init(g))[0]["experts"], np.float64)
    values = np.linalg.svd(u, compute_uv=False) / (0.2 * 14**0.5)
    np.testing.assert_allclose(values, 1, atol=2e-2)
    flat = np.linalg.svd(u.reshape(2, -1, 14)[0], compute_uv=False) / (0.2 * 27**0.5)
    assert np.abs(flat - 1).max() > 0.1


def test_heads_together_or_one_by_one():
    x = {"w": jnp.asarray(tree(0)["heads"], jnp.float32)}

    def update(text):
        tx = scale_by_muon(axes=(("w", text),))
        return np.asarray(tx.update(x, tx.init(x))[0]["w"])

    together, each = update("A -> H K"), update("A H K : H | A -> K")
    assert np.abs(together - each).max() > 0.01
    for head in range(4):
        one = {"w": x["w"][:, head]}
        tx = scale_by_muon()
        want = tx.update(one, tx.init(one))[0]["w"]
        np.testing.assert_allclose(each[:, head], want, atol=1e-6)


def test_normuon_evens_out_outputs():
    """Outputs whose gradients are small get as much as the others; inputs do not."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((16, 16)) * np.geomspace(1e-3, 1, 16)[None, :]
    g = {"w": jnp.asarray(g, jnp.float32)}

    def spread(tx, axis):
        u = np.asarray(tx.update(g, tx.init(g))[0]["w"])
        rms = np.sqrt((u**2).mean(axis=axis))
        return rms.max() / rms.min()

    few = newton.muon(steps=2)
    assert spread(scale_by_muon(coefficients=few), 0) > 2
    np.testing.assert_allclose(spread(scale_by_normuon(coefficients=few), 0), 1, rtol=1e-3)
    assert spread(scale_by_normuon(coefficients=few), 1) > 1.2


def test_zero_gradients_stay_zero_and_nan_shows():
    zero = cast(jax.tree.map(np.zeros_like, tree(0)))
    for make in (scale_by_muon, scale_by_normuon):
        tx = make(axes=AXES)
        for u in jax.tree.leaves(tx.update(zero, tx.init(zero))[0]):
            np.testing.assert_array_equal(u, 0)
        x = {"w": jnp.ones((4, 6)).at[1, 2].set(jnp.nan)}
        assert np.isnan(make().update(x, make().init(x))[0]["w"]).all()


@pytest.mark.parametrize("make", [muon, normuon])
def test_any_decay_in_the_slot(make):
    weights, grads = tree(0), gradients(steps=2)

    def huber():
        return optax_decay.huber_decay(0.3, threshold=0.5, mask="hidden", axes=AXES)

    got, _ = run(make(0.1, weight_decay=huber(), axes=AXES), weights, grads)
    scale = scale_by_muon if make is muon else scale_by_normuon
    chain = optax.chain(scale(axes=AXES), huber(), optax.scale_by_learning_rate(0.1))
    want, _ = run(chain, weights, grads)
    plain, _ = run(make(0.1, weight_decay=0.0, axes=AXES), weights, grads)
    for leaf in SHAPES:
        np.testing.assert_array_equal(got[1][leaf], want[1][leaf])
        assert np.array_equal(got[1][leaf], plain[1][leaf]) == (leaf in OTHERS)


def test_state_is_float32_and_small():
    params = jax.eval_shape(lambda: cast(tree(0), jnp.bfloat16))
    tx = scale_by_normuon(axes=AXES)
    state = tx.init(params)
    assert set(state.nu) == set(OTHERS)
    assert {path: v.shape for path, v in state.outputs.items()} == {
        "wide": (1, 23),
        "tall": (1, 10),
        "square": (1, 16),
        "stack": (3, 1, 9),
        "experts": (2, 3, 1, 14),
        "heads": (1, 4, 5),
    }
    assert scale_by_muon(axes=AXES).init(params).outputs == {}
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype(jnp.float32)}
    updates, new = tx.update(cast(tree(1), jnp.bfloat16), state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_low_precision_iteration():
    """Products in bfloat16 change the result a little, not the state."""
    weights, grads = tree(0), gradients()
    want, _ = run(muon(0.01, axes=AXES), weights, grads)
    got, state = run(muon(0.01, iteration_dtype=jnp.bfloat16, axes=AXES), weights, grads)
    moved = np.abs(want[-1]["wide"] - weights["wide"]).max()
    change = np.abs(got[-1]["wide"] - want[-1]["wide"]).max()
    assert 1e-4 * moved < change < 0.05 * moved
    assert {x.dtype for x in jax.tree.leaves(state[0][1:])} == {jnp.dtype(jnp.float32)}


def test_one_iteration_is_compiled_per_shape(as_for_users):
    """Twelve matrices of two shapes, in either orientation, cost no more program than two."""

    def loops(params):
        tx = scale_by_muon()
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
        return len(re.findall(r" while\(", text))

    few = {"a": jnp.ones((8, 12)), "b": jnp.ones((8, 20))}
    many = {f"a{i}": jnp.ones((8, 12) if i % 2 else (12, 8)) for i in range(6)}
    many |= {f"b{i}": jnp.ones((8, 20) if i % 3 else (20, 8)) for i in range(6)}
    assert loops(many) == loops(few) > loops({"a": jnp.ones((8, 12))})


SHARDED = {
    "a": ((3, 16, 24), "L | A -> B", jax.P(None, "fsdp", "tensor")),
    "b": ((24, 16), "B -> A", jax.P("tensor", "fsdp")),
    "c": ((16, 4, 6), "A -> H K", jax.P("fsdp", "tensor")),
    "d": ((8, 12), "G -> D", jax.P("fsdp", None)),
    "e": ((2, 4, 6, 8), "L E | M -> N", jax.P(None, "fsdp", None, "tensor")),
    "v": ((16,), "A", jax.P("fsdp")),
}


@pytest.mark.parametrize("make", [muon, normuon])
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "Manual"])
def test_the_mesh_does_not_matter(kind, make):
    axes = tuple((name, text) for name, (_, text, _) in SHARDED.items())
    specs = {name: spec for name, (_, _, spec) in SHARDED.items()}
    rng = np.random.default_rng(0)
    weights, *grads = (
        {name: rng.normal(size=shape) for name, (shape, _, _) in SHARDED.items()} for _ in range(4)
    )
    want, _ = run(make(0.01, axes=axes), weights, grads)
    tx = make(0.01, axes=axes, param_specs=specs)
    types = (jax.sharding.AxisType.Explicit if kind == "Explicit" else jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=types * 2)
    place = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}

    def steps(params, grads):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
            if kind == "Explicit":
                for name in SHARDED:
                    assert jax.typeof(updates[name]).sharding == jax.typeof(g[name]).sharding
            params = optax.apply_updates(params, updates)
        return params

    with jax.set_mesh(mesh):
        if kind == "Manual":
            steps = jax.shard_map(steps, in_specs=(specs, [specs] * 3), out_specs=specs)
        got = jax.jit(steps)(
            jax.device_put(cast(weights), place), [jax.device_put(cast(g), place) for g in grads]
        )
    for name in SHARDED:
        np.testing.assert_allclose(got[name], want[-1][name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_stacks_are_exchanged_and_not_gathered(kind, as_for_users):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    place = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))

    def program(layers, steps):
        tx = scale_by_muon(
            coefficients=newton.polar_express(steps=steps), axes=(("w", "L | A -> B"),)
        )
        x = {"w": jax.device_put(jnp.ones((layers, 16, 24)), place)}
        with jax.set_mesh(mesh):
            state = tx.init(x)
            state = state._replace(mu=jax.device_put(state.mu, place))
            out = jax.tree.map(
                lambda a: place if a.ndim else jax.NamedSharding(mesh, jax.P()), state
            )
            step = jax.jit(tx.update, out_shardings=({"w": place}, out))
            return step.lower(x, state).compile().as_text()

    text = program(8, 5)
    collectives = r" (all-reduce|all-to-all|all-gather|collective-permute)\("
    assert len(re.findall(collectives, text)) == len(re.findall(collectives, program(16, 8)))
    assert " all-to-all(" in text and " all-gather(" not in text


def test_split_matrices_in_shard_map_need_their_partition():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    g, tx = {"w": jnp.ones((8, 6))}, scale_by_muon()
    step = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x")
    )
    with pytest.raises(ValueError, match=r"varies over \['x'\].*pass its partition"):
        step(g)


def test_vmap_over_numbers():
    g = cast(gradients(steps=1)[0])

    def one(momentum, eps, factor, memory):
        tx = scale_by_normuon(
            momentum,
            shape_scale=shape_scales.sqrt_larger_side(factor),
            output_memory=memory,
            eps=eps,
            axes=AXES,
        )
        state = tx.init(g)
        _, state = tx.update(g, state)
        return tx.update(jax.tree.map(jnp.cos, g), state)[0]

    numbers = [jnp.array(x) for x in ([0.9, 0.6], [1e-8, 0.1], [0.2, 0.5], [0.9, 0.3])]
    many = jax.vmap(one)(*numbers)
    alone = one(*(float(x[1]) for x in numbers))
    for name in SHAPES:
        np.testing.assert_allclose(many[name][1], alone[name], atol=1e-5)
    assert np.abs(many["wide"][0] - many["wide"][1]).max() > 0.01


def test_errors_name_the_nearest_choice():
    with pytest.raises(ValueError, match="did you mean 'nesterov'"):
        scale_by_muon(momentum_form="nestrov")
    with pytest.raises(ValueError, match=r"momentum=1.0 .* a number below 1"):
        muon(0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"output_memory=-0.1 .* nearest allowed value is 0"):
        normuon(0.1, output_memory=-0.1)
    with pytest.raises(ValueError, match=r"'spectral' is not a value of optax_decay.shape_scales"):
        muon(0.1, shape_scale="spectral")
    with pytest.raises(ValueError, match=r"factor=0.0 .* a number above 0"):
        shape_scales.sqrt_larger_side(0.0)
    with pytest.raises(ValueError, match="mask of its own"):
        muon(0.1, weight_decay=optax_decay.huber_decay(), mask="hidden")
