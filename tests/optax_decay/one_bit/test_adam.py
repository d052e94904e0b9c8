"""1-bit Adam against the NumPy simulation of all its workers, and what it promises beside the trajectory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay.one_bit import compression
from optax_decay.one_bit.adam import one_bit_adam, scale_by_one_bit_adam
from optax_decay.one_bit.state import one_bit_phase, state_partition_specs
from optax_decay.one_bit.warmup import VarianceCriterion
from optax_decay.parameters import meshes
from optax_decay.product.decay import decay
from tests.references.one_bit_adam import OneBitAdam
from tests.support import workers

STEPS, WARMUP, RATE = 20, 6, 0.003
EVERY = tuple(workers.SHAPES)


def ours(**options):
    options = {"b2": 0.99, "weight_decay": 0.1, "mask": None, "compress": None} | options
    return one_bit_adam(RATE, "data", options.pop("warmup_steps", WARMUP), **options)


def expected(grads, dtype, **options):
    """Weights after every step, and the reference itself."""
    options = {"b2": 0.99, "weight_decay": 0.1, "compressed": EVERY} | options
    n = grads["bias"].shape[1]
    reference = OneBitAdam(workers.weights(dtype), n, WARMUP, RATE, dtype=dtype, **options)
    return [dict(reference.step(workers.per_worker(grads, t))) for t in range(STEPS)], reference


def assert_close(got, want, tolerance):
    """Relative to how far a coordinate has walked: of a dead one, whose noise is divided by eps, terms of 1e5 and more
    cancel, each rounded on its own.
    """
    for name in EVERY:
        a, b = (np.stack([step[name] for step in run]) for run in (got, want))
        size = 1 + np.cumsum(np.abs(np.diff(b, axis=0, prepend=b[:1])), axis=0)
        assert np.max(np.abs(a - b) / size) < tolerance, name


# A weight is rounded once per step, to 2^-24 relative: at most 20 x 2^-24 = 1.2e-6 apart, and with signs that differ
# less. A step is a dozen roundings of a number that is 100 times smaller than the weight.
FLOAT32 = 1e-6


@pytest.mark.parametrize(
    ("count", "masked", "layout"),
    [
        *((count, masked, "joined") for count in (4, 8) for masked in (True, False)),
        *((4, False, layout) for layout in ("per_leaf", "flat")),
        *((8, True, layout) for layout in ("per_leaf", "flat")),
    ],
)
def test_matches_the_simulated_workers(count, masked, layout):
    options, flat = {"layout": layout}, layout == "flat"
    mask = None if masked else dict.fromkeys(EVERY, 1.0)
    if not masked:
        options["variance_floor"] = None
    grads = workers.gradients(STEPS, count)
    want, _ = expected(grads, np.float64, flat=flat, mask=mask)
    with jax.enable_x64(True):
        got, _ = workers.train(ours(**options), workers.weights(), grads)
        # 1e-8 in the denominator multiplies rounding by as much as it multiplies the noise that is measured against.
        assert_close(got, want, 1e-12)

    grads = workers.gradients(STEPS, count, np.float32)
    want, reference = expected(grads, np.float32, flat=flat, mask=mask)
    got, state = workers.train(ours(**options), workers.weights(np.float32), grads)
    assert_close(got, want, FLOAT32)
    assert int(state[0].warmup_end) == WARMUP and one_bit_phase(state) == "compressed"
    for name, leaf in state[0].mu.items():
        np.testing.assert_allclose(leaf, reference.m[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("signature", "axis"), [("L | M -> N", 0), ("M L N : L | M -> N", 1)])
def test_stacked_matrices_are_compressed_one_by_one(signature, axis):
    """To the reference, every slice is a parameter."""
    axes = (("bias", "B"), ("kernel", "D -> F"), ("stack", signature))
    grads = workers.gradients(STEPS, 4)

    def slices(tree, axis):
        """Of the leaf `stack`, cut along `axis`."""
        parts = np.moveaxis(tree["stack"], axis, 0)
        rest = {k: x for k, x in tree.items() if k != "stack"}
        return rest | {f"stack{i}": part for i, part in enumerate(parts)}

    cut, start = slices(grads, axis + 2), slices(workers.weights(), axis)
    reference = OneBitAdam(
        start, 4, WARMUP, RATE, b2=0.99, weight_decay=0.1, compressed=tuple(start)
    )
    with jax.enable_x64(True):
        got, state = workers.train(ours(axes=axes), workers.weights(), grads)
        whole, _ = workers.train(ours(), workers.weights(), grads)
    for t in range(STEPS):
        want = reference.step(workers.per_worker(cut, t))
        for name, value in slices(got[t], axis).items():
            np.testing.assert_allclose(value, want[name], rtol=1e-11, atol=1e-12)
    assert state[0].worker_error["stack"].shape[1] == workers.SHAPES["stack"][axis]
    assert np.max(np.abs(whole[-1]["stack"] - got[-1]["stack"])) > 1e-3


def test_directions_are_bounded_after_the_warmup():
    """Of what is compressed; without a mask, dead coordinates would be where the bound is met."""
    compressed = tuple(name for name in EVERY if name != "bias")
    grads = workers.gradients(STEPS, 4)
    want, _ = expected(
        grads, np.float64, compressed=compressed, mask=dict.fromkeys(EVERY, 1.0), largest=0.7
    )
    free, _ = expected(grads, np.float64, compressed=compressed, mask=dict.fromkeys(EVERY, 1.0))
    with jax.enable_x64(True):
        options = {"variance_floor": None, "largest_direction": 0.7, "weight_decay": 0.1}
        mask = [(name, name in compressed) for name in EVERY]
        got, _ = workers.train(ours(compress=mask, **options), workers.weights(), grads)
        assert_close(got, want, 1e-12)
    last = [{k: np.abs(run[-1][k] - run[-2][k]).max() for k in EVERY} for run in (want, free)]
    assert last[1]["kernel"] > 10 * last[0]["kernel"]
    assert all(last[0][k] <= RATE * (0.7 + 0.1 * np.abs(want[-2][k]).max()) for k in compressed)
    with pytest.raises(ValueError, match="largest_direction=0"):
        ours(largest_direction=0.0)


def test_dead_coordinates_blow_up_unless_masked():
    grads = workers.gradients(STEPS, 4, np.float32)
    size = {}
    for floor in (0.0, None):
        got, _ = workers.train(ours(variance_floor=floor), workers.weights(np.float32), grads)
        size[floor] = abs(got[-1]["kernel"][workers.DEAD["kernel"]])
    assert size[None] > 1e3
    # Masked, only the weight decay moves it.
    start = workers.weights(np.float32)["kernel"][workers.DEAD["kernel"]]
    np.testing.assert_allclose(size[0.0], abs(start) * (1 - RATE * 0.1) ** STEPS, rtol=1e-5)


@pytest.mark.parametrize("correct", [False, True])
def test_leaves_left_out_go_on_as_in_the_warmup(correct):
    rules = (("bias", False), ("kernel|stack", True))
    grads = workers.gradients(STEPS, 4)
    options = {"compressed": ("kernel", "stack"), "correct_frozen": correct}
    want, reference = expected(grads, np.float64, **options)
    with jax.enable_x64(True):
        tx = ours(compress=rules, bias_correction="frozen_variance" if correct else False)
        got, state = workers.train(tx, workers.weights(), grads)
        assert_close(got, want, 1e-12)
        np.testing.assert_allclose(state[0].nu["bias"], reference.v["bias"], rtol=1e-12)
    assert set(state[0].worker_error) == {"kernel", "stack"}
    assert reference.v["bias"].max() > 0 and reference.steps > WARMUP
    if correct:
        other, _ = expected(grads, np.float64, compressed=("kernel", "stack"))
        assert np.max(np.abs(other[-1]["kernel"] - want[-1]["kernel"])) > 0.01


def test_embeddings_norms_and_biases_are_left_out_by_default():
    axes = (
        ("embed/table", "V -> D"),
        ("up/kernel", "D -> F"),
        ("up/bias", "F"),
        ("head", "D -> V"),
    )
    params = {"embed": {"table": jnp.ones((9, 4))}, "head": jnp.ones((4, 9))}
    params["up"] = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    tx = one_bit_adam(RATE, "data", WARMUP, axes=axes, mesh=workers.mesh_of(4))
    assert set(tx.init(params)[0].worker_error) == {"up/kernel", "head"}


def test_warmup_is_adamw_on_the_mean():
    grads = workers.gradients(STEPS, 4)
    tx = ours(warmup_steps=STEPS + 1, bias_correction=True)
    adamw = optax.adamw(RATE, b2=0.99, weight_decay=0.1)
    with jax.enable_x64(True):
        got, state = workers.train(tx, workers.weights(), grads)
        params = workers.weights()
        reference = adamw.init(params)
        for t in range(STEPS):
            mean = {k: g[t].mean(0) for k, g in grads.items()}
            updates, reference = adamw.update(mean, reference, params)
            params = optax.apply_updates(params, updates)
    assert one_bit_phase(state) == "warmup"
    for name in EVERY:
        np.testing.assert_allclose(got[-1][name], params[name], rtol=1e-12, atol=1e-12)


def test_bias_correction_goes_on_with_the_count_at_the_freeze():
    grads = workers.gradients(STEPS, 4)
    steps = {}
    with jax.enable_x64(True):
        for correct in (False, True):
            link = scale_by_one_bit_adam("data", WARMUP, b2=0.99, bias_correction=correct)
            got, _ = workers.train(link, workers.weights(), grads)
            steps[correct] = got[-1]["kernel"] - got[-2]["kernel"]
    ratio = np.sqrt(1 - 0.99**WARMUP) / (1 - 0.9**STEPS)
    live = steps[False] != 0
    np.testing.assert_allclose(steps[True][live], ratio * steps[False][live], rtol=1e-6)
    assert live.sum() == live.size - 1


def test_one_program_per_phase_is_the_same_as_both_in_one():
    grads = workers.gradients(STEPS, 8, np.float32)
    one, state = workers.train(ours(), workers.weights(np.float32), grads)
    two, other = workers.train(ours(), workers.weights(np.float32), grads, two_programs=True)
    assert int(state[0].warmup_end) == int(other[0].warmup_end) == WARMUP
    # The two programs may fuse differently: a few roundings apart, not bit for bit.
    assert_close(one, two, FLOAT32)


def test_phases_called_by_name_out_of_turn():
    grads = workers.gradients(4, 4, np.float32)
    params = workers.weights(np.float32)
    mesh = workers.mesh_of(4)
    tx = ours()
    with jax.set_mesh(mesh):
        state = tx.init(params)
    warm, packed = (workers.compiled(tx, state, mesh, p) for p in ("warmup", "compressed"))
    g = [{k: x[t] for k, x in grads.items()} for t in range(4)]
    params, first = warm(params, state, g[0])
    params, early = packed(params, first, g[1])
    assert one_bit_phase(first) == "warmup" and one_bit_phase(early) == "compressed"
    assert int(early[0].warmup_end) == 1
    params, late = warm(params, early, g[2])
    assert workers.bits(late[0].nu) == workers.bits(early[0].nu) == workers.bits(first[0].nu)
    assert workers.bits(late[0].worker_error) == workers.bits(early[0].worker_error)
    exact = {k: 0.9 * np.asarray(early[0].mu[k]) + 0.1 * g[2][k].mean(0) for k in EVERY}
    for name in EVERY:
        np.testing.assert_allclose(late[0].mu[name], exact[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"phase='compress' .*did you mean 'compressed'"):
        tx.update(params, state, params, phase="compress")


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicas_are_bit_identical(check_vma):
    grads = workers.gradients(STEPS, 8, np.float32)
    mesh = workers.mesh_of(8)
    tx = ours()
    params = workers.weights(np.float32)
    with jax.set_mesh(mesh):
        state = tx.init(params)
    step = workers.compiled(tx, state, mesh, check_vma=check_vma)
    for t in range(STEPS):
        params, state = jax.block_until_ready(
            step(params, state, {k: g[t] for k, g in grads.items()})
        )
    assert one_bit_phase(state) == "compressed"
    for leaf in jax.tree.leaves((params, state[0].mu, state[0].nu)):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8 and len(copies) == 1
    own = state[0].worker_error["kernel"]
    assert len({np.asarray(shard.data).tobytes() for shard in own.addressable_shards}) == 8


def freeze_step(norms, every, minimum, ratio, growth):
    last = None
    for t, norm in enumerate(norms, 1):
        if t % every:
            continue
        if last is not None and t >= minimum and ratio <= norm / last <= growth:
            return t
        last = norm
    return 0


@pytest.mark.parametrize("growth", [1 / 0.96, np.inf])
@pytest.mark.parametrize("minimum", [1, 37])
def test_automatic_freeze(minimum, growth):
    steps, b2 = 120, 0.9
    rng = np.random.default_rng(3)
    # The variance climbs from 0, falls when the gradients do, and settles.
    scale = 0.2 + 0.8 / (1 + np.exp((np.arange(steps) - 30) / 3))
    mean = scale[:, None] * rng.normal(size=(1, 400)) * (1 + 0.1 * rng.normal(size=(steps, 400)))
    grads = {"w": np.repeat(mean[:, None], 4, axis=1).astype(np.float32)}
    v, norms = np.zeros(400), []
    for g in mean:
        v = b2 * v + (1 - b2) * g**2
        norms.append(v.sum())
    want = freeze_step(norms, 10, minimum, 0.96, growth)
    assert 0 < want < steps
    tx = scale_by_one_bit_adam(
        "data", VarianceCriterion(min_steps=minimum, max_ratio=growth), b2=b2
    )
    _, state = workers.train(tx, {"w": np.ones(400, np.float32)}, grads)
    assert int(state.warmup_end) == want
    if minimum == 1:
        # The paper's rule takes the climb for a standstill.
        assert (want == 20) == (growth == np.inf)


def test_any_decay_may_stand_in_for_the_number():
    grads = workers.gradients(STEPS, 4, np.float32)
    start = workers.weights(np.float32)
    number, _ = workers.train(ours(weight_decay=0.3), start, grads)
    tx = one_bit_adam(RATE, "data", WARMUP, b2=0.99, compress=None, weight_decay=decay(0.3))
    given, _ = workers.train(tx, start, grads)
    none, _ = workers.train(ours(weight_decay=0.0), start, grads)
    assert workers.bits(number) == workers.bits(given) != workers.bits(none)


def test_gradients_stay_local_under_local_params():
    x = np.arange(1.0, 9.0, dtype=np.float32).reshape(8, 1)

    def gradient(mark, w, x):
        w = compression.local_params(w, "data") if mark else w
        g = jax.grad(lambda w: jnp.sum(w * x))(w)
        return meshes.mark_varying(g, ("data",))[None] if not mark else g[None]

    for mark, want in ((True, x[:, 0]), (False, np.full(8, x.sum()))):
        run = jax.shard_map(
            functools.partial(gradient, mark),
            mesh=workers.mesh_of(8),
            in_specs=(jax.P(), jax.P("data")),
            out_specs=jax.P("data"),
        )
        np.testing.assert_array_equal(jax.jit(run)(np.float32(2.0), x), want)


def test_trains_like_adam():
    """A small network on eight workers ends within the spread over seeds of uncompressed Adam."""
    steps, seeds = 300, 6

    def loss(params, x, y):
        h = jnp.tanh(x @ params["in"] + params["b"])
        return jnp.mean((h @ params["out"] - y) ** 2)

    def data(key, teacher):
        x = jax.random.normal(key, (8, 12))
        return x, jnp.sin(x @ teacher) + 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (8, 2))

    def run(tx, seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {
            "in": jax.random.normal(keys[0], (12, 32)) / 12**0.5,
            "out": jax.random.normal(keys[1], (32, 2)) / 32**0.5,
            "b": jnp.zeros(32),
        }
        teacher = jax.random.normal(jax.random.key(99), (12, 2)) / 12**0.5

        def step(carry, t):
            params, state = carry
            key = jax.random.fold_in(jax.random.fold_in(keys[2], t), jax.lax.axis_index("data"))
            x, y = data(key, teacher)
            g = jax.grad(loss)(compression.local_params(params, "data"), x, y)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        test = [data(jax.random.fold_in(jax.random.key(7), i), teacher) for i in range(16)]
        return jnp.mean(jnp.stack([loss(carry[0], x, y) for x, y in test])), carry[1]

    def results(tx):
        one = jax.shard_map(
            lambda seed: run(tx, seed)[0],
            mesh=workers.mesh_of(8),
            in_specs=jax.P(),
            out_specs=jax.P(),
            check_vma=False,
        )
        return np.array([jax.jit(one)(seed) for seed in range(seeds)])

    rate = optax.linear_schedule(0.02, 0.0, steps)
    common = {"b2": 0.95, "compress": None, "bias_correction": True}
    plain = results(one_bit_adam(rate, "data", steps + 1, **common))
    packed = results(one_bit_adam(rate, "data", 60, **common))
    assert np.all(plain != packed)
    # Means of six differ by less than 2.8 standard errors of their difference (99.5 % two-sided).
    error = np.sqrt((plain.var(ddof=1) + packed.var(ddof=1)) / seeds)
    assert packed.mean() - plain.mean() < 2.8 * error, (plain, packed)
    assert packed.mean() < 0.5 * np.mean(np.sin(np.random.default_rng(0).normal(size=1000)) ** 2)


def test_state_specs_cover_a_chain():
    with jax.set_mesh(workers.mesh_of(4)):
        state = jax.eval_shape(ours().init, workers.weights(np.float32))
    specs = state_partition_specs(state, "data")
    assert specs[0].worker_error == dict.fromkeys(EVERY, jax.P("data"))
    assert {*jax.tree.leaves((specs[0].mu, specs[1], specs[2]))} == {jax.P()}
