"""Steps on broken numbers change nothing, not even the last bit; the others are as if nothing watched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from tests.references.skip_on_spike import reference_skips
from tests.support import toy


def inner() -> optax.GradientTransformationExtraArgs:
    """Moments, decay, a schedule and a spectral refresh every second step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax_decay.spectral_alpha_decay(
            0.1, axes=toy.AXES, min_eigenvalues=4, refresh_every=2, metric="stable_rank"
        ),
        optax.scale_by_schedule(lambda count: -0.01 / (1 + count)),
    )


def stepper(tx):
    @jax.jit
    def step(params, state, gradient, value):
        change, state = tx.update(gradient, state, params, value=value)
        return optax.apply_updates(params, change), state

    return step


def signed_zeros(params):
    """Weights among which are -0 and +0, whose bits an added zero could change."""
    bias = params["bias"].at[0].set(-0.0).at[1].set(0.0)
    return {**params, "bias": bias}


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def compiled():
    guarded = optax_decay.skip_on_spike(inner(), sigma=math.inf)
    return inner(), stepper(inner()), guarded, stepper(guarded)


@pytest.mark.parametrize("broken", ["nan loss", "inf loss", "nan gradient", "-inf gradient"])
def test_a_step_left_out_changes_no_bit(compiled, broken):
    _, _, guarded, step = compiled
    params, gradients = signed_zeros(toy.params()), toy.gradients(4)
    state = guarded.init(params)
    for gradient in gradients[:3]:
        params, state = step(params, state, gradient, 2.0)
    params = signed_zeros(params)
    bad, value = gradients[3], 2.0
    number = float(broken.split()[0])
    if "loss" in broken:
        value = number
    else:
        # One value of one leaf, everything else healthy.
        bad = {**bad, "head": {"kernel": bad["head"]["kernel"].at[3, 2].set(number)}}
    after, kept = step(params, state, bad, value)
    assert bits(after) == bits(params)
    assert bits(kept.inner_state) == bits(state.inner_state)
    assert bits((kept.values, kept.norms, kept.taken)) == bits(
        (state.values, state.norms, state.taken)
    )
    assert (int(kept.skipped), int(kept.in_a_row), int(kept.spikes)) == (1, 1, 0)
    # The same step with healthy numbers changes all of it.
    moved, _ = step(params, state, gradients[3], 2.0)
    assert all(a != b for a, b in zip(bits(moved), bits(params)))


def test_a_thousand_broken_batches_leave_the_run_of_the_others(compiled):
    """Steps that are taken are those of the bare optimizer; 1000 of 1020 are left out."""
    plain, plain_step, guarded, step = compiled
    generator = np.random.default_rng(0)
    params = expected = toy.params()
    state, bare = guarded.init(params), plain.init(params)
    healthy = iter(toy.gradients(20))
    good = set(generator.choice(1020, 20, replace=False).tolist())
    nothing = jax.tree.map(np.zeros_like, params)
    for index in range(1020):
        if index in good:
            gradient = next(healthy)
            params, state = step(params, state, gradient, 1.0)
            expected, bare = plain_step(expected, bare, gradient, 1.0)
            assert int(state.in_a_row) == 0
        else:
            leaf = ("embed", "head")[index % 2]
            name = "embedding" if leaf == "embed" else "kernel"
            number = (math.nan, math.inf, -math.inf)[index % 3]
            hit = np.zeros(toy.SHAPES[f"{leaf}/{name}"], np.float32)
            hit[index % 8, index % 5] = number
            bad = {**nothing, leaf: {name: hit}}
            params, state = step(params, state, bad, 1.0)
    assert int(state.skipped) == 1000
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])).all()
    # The same operations in two compiled programs: fused differently, each step rounds a few times more or less.
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=20 * 32 * 2.0**-24, atol=20 * 32 * 2.0**-24)


def watched(losses, norms, **options) -> list[bool]:
    """What is left out of steps with the given losses and gradient norms."""
    tx = optax_decay.skip_on_spike(optax.sgd(1.0), **options)
    direction = jnp.asarray([0.6, 0.8])

    def body(state, x):
        loss, norm = x
        change, after = tx.update(norm * direction, state, direction, value=loss)
        return after, (after.skipped > state.skipped, change)

    xs = (jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32))
    state, (skipped, changes) = jax.lax.scan(body, tx.init(direction), xs)
    assert int(state.skipped) == int(skipped.sum())
    assert not np.asarray(changes)[np.asarray(skipped)].any()
    return np.asarray(skipped).tolist()


@pytest.mark.parametrize(("sigma", "window", "bound"), [(3.0, 8, 2), (1.5, 16, 5), (math.inf, 8, 2)])
def test_what_is_left_out_against_float64(sigma, window, bound):
    generator = np.random.default_rng(3)
    losses = 3 + 0.1 * generator.normal(size=300) - np.linspace(0, 1, 300)
    norms = np.exp(0.2 * generator.normal(size=300))
    losses[generator.choice(300, 25, replace=False)] += generator.choice([0.5, 5.0, np.nan], 25)
    norms[generator.choice(300, 25, replace=False)] *= generator.choice([4.0, 50.0, np.inf], 25)
    losses[200:] += 4  # a new level, which is accepted in the end
    found = watched(losses, norms, sigma=sigma, window=window, max_consecutive_spikes=bound)
    limit = sigma if math.isfinite(sigma) else None
    expected = reference_skips(losses.tolist(), norms.tolist(), limit, window, bound)
    assert found == expected
    assert 10 < sum(found) < 150
    other = watched(losses, norms, sigma=2 * (limit or 1), window=window)
    assert other != found


def test_a_new_level_is_accepted_and_the_bound_begins_anew():
    quiet = [1.0, 1.1] * 4
    high = [9.0, 9.1] * 8
    flat = [1.0] * 24
    first = watched(quiet + high, flat, window=4, max_consecutive_spikes=3)
    assert first == [False] * 8 + [True] * 3 + [False] * 13
    twice = watched(quiet + high[:8] + [99.0, 98.0] * 4, flat, window=4, max_consecutive_spikes=3)
    assert twice == [False] * 8 + [True] * 3 + [False] * 5 + [True] * 3 + [False] * 5
    # NaN is never accepted, and does not use up the patience for spikes.
    nan = [math.nan] * 20 + [9.0, 1.0, 9.0, 1.05]
    mixed = watched(quiet[:4] + nan[:-4] + nan[-4:], [1.0] * 28, window=4, max_consecutive_spikes=3)
    assert mixed == [False] * 4 + [True] * 20 + [True, False, True, False]


def test_equal_values_are_no_spikes():
    assert not any(watched([0.1] * 50, [0.3] * 50, window=8, sigma=1e-3))


def test_nothing_is_read_back_and_the_state_may_be_donated():
    tx = optax_decay.skip_on_spike(optax.adam(0.1))
    params = toy.params()
    step = jax.jit(lambda s, g: tx.update(g, s, params, value=1.0)[1], donate_argnums=0)
    state = tx.init(params)
    assert "callback" not in step.lower(state, toy.gradients(1)[0]).as_text()
    for gradient in toy.gradients(2):
        before, state = state, step(state, gradient)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sigma": 0}, "sigma=0 .*a number above 0"),
        ({"window": 2}, "window=2 .*nearest allowed value is 4"),
        ({"max_consecutive_spikes": 0}, "max_consecutive_spikes=0 .*nearest allowed value is 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        optax_decay.skip_on_spike(optax.sgd(0.1), **wrong)
