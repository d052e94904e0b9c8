"""Huber decay against float64 references, its limits, and the claims of AdamHD's abstract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import thresholds
from tests.references import decays as references
from tests.support import toy

STEPS = 12
RATE = 0.05
DECAY = 0.7

# In float32 one step rounds a handful of times; weights and steps are of order one, and Adam's division amplifies the
# rounding of v by at most a few units. 12 steps times 16 roundings of 2^-24 is 1.2e-5.
FLOAT32 = 12 * 16 * 2.0**-24


KINDS = {
    "mean": thresholds.mean_size,
    "rms": thresholds.rms_size,
    "running_mean": thresholds.running_mean_size,
}


def threshold_of(kind, factor=0.8, **options):
    """A number, or the threshold that the references call by this name."""
    if not isinstance(kind, str):
        return kind
    memory = {"memory": 0.9} if kind == "running_mean" else {}
    return KINDS[kind](factor, **memory, **options)


def adamhd(threshold, proximal=False, mask=("hidden", "head"), axes=toy.AXES):
    """Adam with either form of the decay."""
    if not proximal:
        return optax_decay.adam_huber_decay(
            RATE, weight_decay=DECAY, threshold=threshold, mask=mask, axes=axes
        )
    last = optax_decay.huber_proximal_decay(
        DECAY, threshold, learning_rate=RATE, mask=mask, axes=axes
    )
    return optax.chain(optax.adam(RATE), last)


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("kind", [0.2, "mean", "rms", "running_mean"])
def test_matches_reference(kind, proximal):
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, FLOAT32)):
        expected = references.huber_trajectory(
            toy.flat_params(),
            toy.flat_gradients(STEPS),
            rates=[RATE] * STEPS,
            weight_decay=DECAY,
            delta=references.thresholds(kind, 0.8, 0.9, toy.STACKED),
            decayed=toy.MATRICES,
            proximal=proximal,
        )
        with jax.enable_x64(dtype == jnp.float64):
            tx = adamhd(threshold_of(kind), proximal)
            got, _ = toy.train(tx, toy.params(dtype), toy.gradients(STEPS, dtype))
            for path, w in toy.unnest(got).items():
                np.testing.assert_allclose(w, expected[path], rtol=tolerance, atol=tolerance)


def test_threshold_schedule_and_rate_schedule_match_reference():
    rates = [RATE * (1 - t / STEPS) for t in range(STEPS)]
    deltas = [0.05 * (t + 1) for t in range(STEPS)]
    calls = iter(np.repeat(deltas, len(toy.MATRICES)))
    expected = references.huber_trajectory(
        toy.flat_params(),
        toy.flat_gradients(STEPS),
        rates=rates,
        weight_decay=DECAY,
        delta=lambda name, w: next(calls),
        decayed=toy.MATRICES,
    )
    with jax.enable_x64(True):
        tx = optax_decay.adam_huber_decay(
            lambda t: RATE * (1 - t.astype(float) / STEPS),
            weight_decay=DECAY,
            threshold=lambda t: 0.05 * (t.astype(float) + 1),
            axes=toy.AXES,
        )
        got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(STEPS, jnp.float64))
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, expected[path], rtol=1e-12, atol=1e-12)


def test_is_adamw_bit_for_bit_for_a_large_threshold():
    ours = optax_decay.adam_huber_decay(RATE, weight_decay=DECAY, threshold=1e30, mask=None)
    finite = optax_decay.adam_huber_decay(RATE, weight_decay=DECAY, threshold=0.2, mask=None)
    start, grads = toy.params(), toy.gradients(20)
    expected, _ = toy.train(optax.adamw(RATE, weight_decay=DECAY), start, grads)
    got, _ = toy.train(ours, start, grads)
    other, _ = toy.train(finite, start, grads)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(expected)))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(x, y)


def test_no_decay_as_the_threshold_vanishes():
    start, grads = toy.params(), toy.gradients(STEPS)
    plain, _ = toy.train(optax.adam(RATE), start, grads)
    for proximal in (False, True):
        tx = adamhd(1e-9, proximal, mask=None)
        got, _ = toy.train(tx, start, grads)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(plain)):
            # 12 steps move a weight by at most 12·ηλδ = 4e-10, plus the rounding of a different order of operations.
            np.testing.assert_allclose(x, y, atol=4e-10 + 12 * 4 * 2.0**-24)


def test_l1_when_rate_times_threshold_is_held():
    """λδ = μ with δ → 0: the explicit form adds μ·sign(w), the proximal form soft-thresholds at ημ."""
    w = {"w": jnp.array([[0.5, -0.3, 2.0], [1e-3, -4.0, 0.02]])}
    u = {"w": jnp.array([[0.1, 0.2, -0.3], [0.0, 0.5, -0.01]])}
    mu, delta, eta = 0.25, 1e-6, 0.1
    tx = optax_decay.huber_decay(mu / delta, threshold=delta)
    got = tx.update(u, tx.init(w), w)[0]["w"]
    # Rounding of λ = 2.5e5 and of the product with δ: a few 2^-24 relative.
    np.testing.assert_allclose(got, u["w"] + mu * jnp.sign(w["w"]), rtol=1e-6)
    tx = optax_decay.huber_proximal_decay(mu / delta, threshold=delta, learning_rate=eta)
    theta = w["w"] + u["w"]
    expected = jnp.sign(theta) * jnp.maximum(jnp.abs(theta) - eta * mu, 0)
    got = w["w"] + tx.update(u, tx.init(w), w)[0]["w"]
    # Inside (1+τ)δ the map divides by 1+τ = 25001 instead of returning 0: off by at most δ.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1.1e-6)
    assert not np.any(np.asarray(got) == 0), "a Huber map with δ > 0 never gives an exact zero"


def test_pull_is_bounded():
    """AdamHD: the gradient of the penalty is bounded by λδ, however large the weight."""
    w = {"w": jnp.array([[-1e6, -3.0, 0.1, 5.0, 1e20]])}
    tx = optax_decay.huber_decay(0.3, threshold=2.0)
    pull = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)[0]["w"]
    np.testing.assert_allclose(pull, [[-0.6, -0.6, 0.03, 0.6, 0.6]], rtol=1e-6)


def test_invariant_to_rescaling_of_gradient_coordinates():
    """AdamHD: the decay does not see the second moment. With eps → 0, Adam does not see the scale either."""
    start, grads = toy.params(), toy.gradients(STEPS)
    rng = np.random.default_rng(5)
    scales = jax.tree.map(lambda w: jnp.asarray(2.0 ** rng.integers(-6, 7, w.shape)), start)
    scaled = [jax.tree.map(lambda g, s: g * s, g, scales) for g in grads]
    assert np.abs(scaled[0]["bias"] - grads[0]["bias"]).max() > 0.1

    def run(tx, g):
        return toy.train(tx, start, g)[0]

    tx = optax_decay.adam_huber_decay(RATE, eps=0.0, weight_decay=DECAY, mask=None)
    # Powers of two scale exactly, so only the order of roundings inside sqrt(v) could differ: it does not.
    for x, y in zip(jax.tree.leaves(run(tx, grads)), jax.tree.leaves(run(tx, scaled))):
        np.testing.assert_allclose(x, y, rtol=2.0**-20)
    coupled = optax.chain(
        optax_decay.huber_decay(DECAY), optax.scale_by_adam(eps=0.0), optax.scale(-RATE)
    )
    differs = [
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(run(coupled, grads)), jax.tree.leaves(run(coupled, scaled)))
    ]
    assert max(differs) > 1e-2, "a decay added to the gradient does see the scale"


def test_stronger_than_l2_only_at_a_larger_rate():
    """At equal λ the Huber pull never exceeds l2; holding λδ, small weights feel more than under l2."""
    w = {"w": jnp.linspace(-3.0, 3.0, 31).reshape(1, 31)}
    zero = jax.tree.map(jnp.zeros_like, w)

    def pull(tx):
        return jnp.abs(tx.update(zero, tx.init(w), w)[0]["w"])

    l2 = pull(optax_decay.decay(0.1))
    assert jnp.all(pull(optax_decay.huber_decay(0.1, 0.5)) <= l2)
    raised = pull(optax_decay.huber_decay(0.6, 0.5))
    assert jnp.all(raised[jnp.abs(w["w"]) < 2.9] >= l2[jnp.abs(w["w"]) < 2.9])


@pytest.mark.parametrize("kind", ["mean", "rms", "running_mean"])
def test_threshold_is_per_slice_of_a_stack(kind):
    """A stacked leaf and its slices as separate leaves give the same weights."""
    rng = np.random.default_rng(3)
    stack = rng.standard_normal((3, 4, 6)).astype(np.float32) * np.array([1, 5, 0.2])[:, None, None]
    steps = rng.standard_normal((5, 3, 4, 6)).astype(np.float32)

    def run(axes, weights, grads):
        tx = optax.chain(
            optax_decay.huber_decay(0.5, KINDS[kind](0.7), axes=axes), optax.scale(-0.1)
        )
        return toy.train(tx, weights, grads)[0]

    whole = run(
        (("w", "L | D -> F"),), {"w": jnp.asarray(stack, jnp.float32)}, [{"w": g} for g in steps]
    )
    parts = run(
        ((r"w\d", "D -> F"),),
        {f"w{i}": jnp.asarray(stack[i], jnp.float32) for i in range(3)},
        [{f"w{i}": g[i] for i in range(3)} for g in steps],
    )
    mixed = run(
        (("w", "D E -> F"),), {"w": jnp.asarray(stack, jnp.float32)}, [{"w": g} for g in steps]
    )
    for i in range(3):
        np.testing.assert_allclose(whole["w"][i], parts[f"w{i}"], rtol=1e-6)
    assert np.abs(whole["w"] - mixed["w"]).max() > 1e-3, (
        "one threshold for the stack is something else"
    )


def test_proximal_map_minimises_its_objective():
    def penalty(delta):
        return lambda x: x * x / 2 if abs(x) <= delta else delta * abs(x) - delta * delta / 2

    rng = np.random.default_rng(0)
    for _ in range(40):
        theta, tau, delta = rng.normal() * 2, rng.uniform(0.01, 3), rng.uniform(0.05, 2)
        expected = references.prox_by_search(penalty(delta), theta, tau)
        got = optax_decay.pulls.huber(delta).prox(np.float64(theta), tau, delta, np.float64(0.0))
        # Golden section finds a minimum to the square root of float64's precision.
        assert abs(float(got) - expected) < 1e-6


def test_cautious_huber_matches_reference():
    expected = references.huber_trajectory(
        toy.flat_params(),
        toy.flat_gradients(STEPS),
        rates=[RATE] * STEPS,
        weight_decay=DECAY,
        delta=references.thresholds("mean", 0.8, 0.9, toy.STACKED),
        decayed=toy.MATRICES,
        cautious=True,
    )
    with jax.enable_x64(True):
        tx = optax_decay.adam_huber_decay(
            RATE, weight_decay=DECAY, axes=toy.AXES, cautious=True, threshold=threshold_of("mean")
        )
        got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(STEPS, jnp.float64))
        tx = adamhd(threshold_of("mean"))
        plain, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(STEPS, jnp.float64))
    assert np.abs(plain["mix"]["kernel"] - got["mix"]["kernel"]).max() > 1e-3
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, expected[path], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "rms", "running_mean"])
def test_shard_map_needs_and_uses_the_axis_name(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = jnp.asarray(np.random.default_rng(2).standard_normal((8, 12)) ** 3, jnp.float32)
    u = jnp.zeros_like(w)

    def one_step(tx, w, u):
        return tx.update({"w": u}, tx.init({"w": w}), {"w": w})[0]["w"]

    def sharded(axis_name):
        tx = optax_decay.huber_decay(0.5, KINDS[kind](1.5, axis_name=axis_name))
        spec = jax.P("x", "y")
        return jax.jit(
            jax.shard_map(
                lambda w, u: one_step(tx, w, u), mesh=mesh, in_specs=(spec, spec), out_specs=spec
            )
        )(w, u)

    expected = one_step(optax_decay.huber_decay(0.5, KINDS[kind](1.5)), w, u)
    # A mean of 96 numbers in another order.
    np.testing.assert_allclose(sharded(("x", "y")), expected, rtol=96 * 2.0**-24)
    with pytest.raises(ValueError, match="axis_name"):
        sharded(None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optax_decay.huber_decay(0.1, "mean"), r"'mean'.*thresholds.mean_size\(\)"),
        (lambda: optax_decay.huber_decay(0.1, "rsm"), r"'rsm'.*did you mean .*rms_size\(\)"),
        (lambda: optax_decay.huber_decay(-0.1), r"weight_decay=-0.1 is outside \[0, inf\)"),
        (lambda: optax_decay.huber_decay(0.1, 0.0), r"threshold=0.0 .* a number above 0"),
        (lambda: thresholds.mean_size(-1.0), r"factor=-1.0"),
        (lambda: thresholds.rms_size(0), r"factor=0 .*above 0"),
        (lambda: thresholds.running_mean_size(memory=1.0), r"memory=1.0 .*below 1"),
        (lambda: optax_decay.huber_proximal_decay(learning_rate=-1.0), r"learning_rate=-1.0"),
    ],
)
def test_bad_arguments_say_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "ignored",
    [
        {"factor": -3.0},
        {"decay_rate": 9.0},
        {"axis_name": "nowhere"},
        {"learning_rate": -1.0},
        {"peak_learning_rate": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_fixed_threshold_would_ignore_cannot_be_written(ignored):
    with pytest.raises(TypeError, match=next(iter(ignored))):
        optax_decay.huber_decay(0.1, threshold=0.5, **ignored)


def test_the_gate_belongs_to_the_explicit_form():
    with pytest.raises(TypeError, match="cautious"):
        optax_decay.huber_proximal_decay(0.1, learning_rate=0.1, cautious=True)
