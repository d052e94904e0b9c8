"""The product: pulls, multipliers, couplings, masks, the cautious gate, metrics, tables and low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import couplings, multipliers, pulls, thresholds
from optax_decay.product import diagnostics
from tests.references import decays as references
from tests.support import toy

RATE = 0.05


def shrink(tx, weights, steps=1):
    """Weights after steps with zero gradients."""
    zero = jax.tree.map(jnp.zeros_like, weights)
    return toy.train(tx, weights, [zero] * steps)[0]


PULLS = {
    name: getattr(pulls, name) for name in ("l2", "l1", "huber", "pseudo_huber", "log_cosh", "fair")
}
PENALTIES = {
    "l2": lambda x, d: x * x / 2,
    "l1": lambda x, d: abs(x),
    "huber": lambda x, d: x * x / 2 if abs(x) <= d else d * abs(x) - d * d / 2,
    "pseudo_huber": lambda x, d: d * d * (np.sqrt(1 + (x / d) ** 2) - 1),
    "log_cosh": lambda x, d: d * d * np.log(np.cosh(x / d)),
    "fair": lambda x, d: d * d * (abs(x) / d - np.log1p(abs(x) / d)),
}


@pytest.mark.parametrize("name", sorted(PULLS))
def test_pull_is_the_gradient_of_its_penalty(name):
    delta = 0.7
    pull = PULLS[name]() if name in ("l1", "l2") else PULLS[name](delta)
    assert set(PENALTIES) == set(PULLS) == set(pulls.NAMES) - {"lp", "padam", "elastic_net"}
    with jax.enable_x64(True):
        for w in (-3.1, -0.71, -0.2, 0.05, 0.69, 2.4):
            h = 1e-6
            slope = (PENALTIES[name](w + h, delta) - PENALTIES[name](w - h, delta)) / (2 * h)
            got = float(pull.apply(jnp.asarray(w, jnp.float64), delta))
            # Central differences: h² times the third derivative, plus rounding 2^-52/h.
            assert got == pytest.approx(slope, abs=1e-8)
            if pull.prox:
                expected = references.prox_by_search(lambda x: PENALTIES[name](x, delta), w, 0.9)
                got = float(pull.prox(jnp.asarray(w, jnp.float64), 0.9, delta, None))
                assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["huber", "pseudo_huber", "log_cosh", "fair"])
def test_bounded_pulls(name):
    pull = PULLS[name](0.5)
    w = jnp.array([-1e4, -2.0, 1e-4, 3.0, 1e4])
    got = pull.apply(w, 0.5)
    assert jnp.all(jnp.abs(got) <= 0.5)
    assert got[2] == pytest.approx(1e-4, rel=1e-3)
    wide = PULLS[name](1e12)
    np.testing.assert_allclose(wide.apply(w, 1e12), w, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(PULLS))
def test_complex_weights_are_pulled_along_their_phase(name):
    pull = PULLS[name]() if name in ("l1", "l2") else PULLS[name](0.7)
    size = jnp.array([0.2, 0.69, 3.0])
    phase = jnp.exp(1j * jnp.array([0.3, 2.0, -1.0]))
    got = pull.apply((size * phase).astype(jnp.complex64), 0.7)
    np.testing.assert_allclose(got, pull.apply(size, 0.7) * phase, rtol=2e-6)


def test_couplings_shrink_as_the_table_says():
    """With zero gradients and l2, one step multiplies a weight by 1 - shrink (needs.md's F1)."""
    weights = {"w": jnp.array([[1.0, -2.0, 3.0]])}
    schedule = lambda t: jnp.asarray([0.01, 0.04, 0.02])[t]
    eta, peak, lam = np.array([0.01, 0.04, 0.02]), 0.04, 0.3
    expected = {
        couplings.learning_rate(): eta * lam,
        couplings.schedule(peak): eta / peak * lam,
        couplings.corrected(schedule, peak): eta**2 / peak * lam,
        couplings.independent(): np.full(3, lam),
    }
    assert {coupling.name for coupling in expected} == set(couplings.NAMES)
    for coupling, shrinks in expected.items():
        tx = optax_decay.adam_huber_decay(
            schedule,
            weight_decay=lam,
            threshold=1e6,
            coupling=coupling,
        )
        got = shrink(tx, weights, 3)["w"]
        np.testing.assert_allclose(got, weights["w"] * np.prod(1 - shrinks), rtol=3e-6)
        table = optax_decay.decay_table(
            weights, lam, coupling=coupling, learning_rate=schedule, step=2
        )
        assert table.rows[0].shrink == pytest.approx(shrinks[2], rel=1e-6)


def test_schedule_coupling_is_safe_at_rate_zero():
    weights = {"w": jnp.array([[1.0, -2.0]])}
    rate = lambda t: 0.1 * t
    for coupling in (couplings.schedule(0.1), couplings.corrected(rate, 0.1)):
        tx = optax_decay.adam_huber_decay(rate, weight_decay=0.5, coupling=coupling)
        np.testing.assert_array_equal(shrink(tx, weights)["w"], weights["w"])


def test_convert_weight_decay():
    convert = optax_decay.convert_weight_decay
    assert convert(0.1, "learning_rate", "schedule", peak_learning_rate=3e-4) == 3e-5
    there = convert(0.25, "independent", "corrected", peak_learning_rate=2e-3)
    assert there == 125
    assert convert(there, "corrected", "independent", peak_learning_rate=2e-3) == 0.25
    with pytest.raises(ValueError, match="did you mean 'schedule'"):
        convert(0.1, "learning_rate", "schedul", peak_learning_rate=1e-3)


def test_multipliers_multiply_and_schedules_compose():
    weights = {"a": jnp.array([[2.0, -1.0]]), "b": jnp.array([[4.0, 0.5]])}
    halve = multipliers.constant(0.5)
    grow = multipliers.constant(lambda t: 1.0 + t)
    tx = optax.chain(
        optax_decay.decay(
            lambda t: 0.1 * (t + 1), multiplier=(halve, grow), mask=(("a", 1.0), ("b", 0.25))
        ),
        optax.scale(-1.0),
    )
    got = shrink(tx, weights, 3)
    per_step = np.array([0.1 * (t + 1) * 0.5 * (1 + t) for t in range(3)])
    np.testing.assert_allclose(got["a"], weights["a"] * np.prod(1 - per_step), rtol=1e-6)
    np.testing.assert_allclose(got["b"], weights["b"] * np.prod(1 - per_step / 4), rtol=1e-6)


def test_cautious_gate_before_and_after_the_rate():
    w = {"w": jnp.array([[1.0, -1.0, 2.0, -2.0, 3.0]])}
    u = {"w": jnp.array([[0.5, 0.5, -0.5, -0.5, 0.0]])}
    agree = np.array([[1, 0, 0, 1, 1]])
    before = optax_decay.decay(0.1, cautious=True)
    got = before.update(u, before.init(w), w)[0]["w"]
    np.testing.assert_allclose(got, u["w"] + 0.1 * agree * w["w"], rtol=1e-6)
    after = optax_decay.decay(0.1, cautious=True, coupling=couplings.independent())
    downhill = jax.tree.map(lambda x: -0.01 * x, u)
    got = after.update(downhill, after.init(w), w)[0]["w"]
    np.testing.assert_allclose(got, downhill["w"] - 0.1 * agree * w["w"], rtol=1e-6)


def test_updates_of_none_are_left_out():
    tx = optax_decay.huber_decay(0.1, thresholds.running_mean_size())
    weights = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    updates, state = tx.update({"a": None, "b": jnp.zeros((3, 2))}, tx.init(weights), weights)
    assert updates["a"] is None
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(weights))


def test_a_mask_function_sees_shapes_only():
    """A rule on values would change between gradients and weights (F16); ours cannot be written."""
    with pytest.raises(ValueError, match=r"mask function failed .*has no attribute 'mean'"):
        tx = optax_decay.decay(0.1, mask=lambda tree: jax.tree.map(lambda x: x.mean() > 0, tree))
        tx.init(toy.params())


def test_a_callable_parameter_tree_as_mask_is_a_tree():
    """Whether a mask is a function is decided by structure, not by ``callable`` (F15)."""

    @jax.tree_util.register_pytree_node_class
    class Module:
        def __init__(self, a, b):
            self.a, self.b = a, b

        def __call__(self):
            raise AssertionError("a module given as a mask must not be called")

        def tree_flatten(self):
            return (self.a, self.b), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    weights = Module(jnp.ones((2, 2)), jnp.ones((2, 3)))
    tx = optax_decay.decay(0.5, mask=Module(True, False))
    got = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)[0]
    assert float(got.a[0, 0]) == 0.5
    assert float(got.b[0, 0]) == 0.0


@pytest.mark.parametrize(
    "mask, message",
    [
        ("hiden", r"did you mean 'hidden'"),
        (((r"norm", True), (r".*", True)), r"mask rule 'norm' matches no parameter"),
        (((r"head/kernel", True),), r"no mask rule matches"),
        (((r".*", -1.0),), r"a number >= 0"),
        ({"embed": True}, r"neither a prefix"),
    ],
)
def test_bad_masks_say_what_is_wrong(mask, message):
    with pytest.raises(ValueError, match=message):
        optax_decay.decay(0.1, mask=mask, axes=toy.AXES).init(toy.params())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optax_decay.decay(float("nan")), "weight_decay=nan"),
        (lambda: optax_decay.decay("0.1"), "'0.1' is not a number"),
        (lambda: optax_decay.decay(0.1, pull="hubre"), r"did you mean optax_decay.pulls.huber\(\)"),
        (
            lambda: optax_decay.decay(0.1, pull=pulls.fair),
            r"did you mean optax_decay.pulls.fair\(\)",
        ),
        (
            lambda: optax_decay.decay(0.1, multiplier=2.0),
            r"multiplier=2.0 is a number.*constant\(2.0\)",
        ),
        (lambda: optax_decay.decay(0.1, multiplier="constant"), "multiplier='constant' is not"),
        (lambda: optax_decay.decay(0.1, coupling="schedul"), r"couplings.schedule\(\)"),
        (lambda: optax_decay.decay(0.1, coupling=couplings.schedule), r"couplings.schedule\(\)"),
        (lambda: couplings.corrected(lambda t: 0.1), "pass peak_learning_rate"),
        (lambda: couplings.schedule(0.0), "peak_learning_rate=0.0 .*above 0"),
        (
            lambda: optax_decay.proximal_decay(0.1, learning_rate=0.1, pull=pulls.pseudo_huber()),
            "no closed-form proximal map",
        ),
        (
            lambda: optax_decay.proximal_decay(
                0.1, learning_rate=0.1, coupling=couplings.independent()
            ),
            "pass learning_rate=1.0",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_metrics_are_what_happened():
    weights, grad = toy.params(), toy.gradients(1)[0]
    tx = optax_decay.huber_decay(
        lambda t: 0.2, 0.3, metrics=True, axes=toy.AXES, mask="hidden", cautious=True
    )
    updates, state = tx.update(grad, tx.init(weights), weights)
    added = jax.tree.map(lambda u, g: np.asarray(u - g), updates, grad)["blocks"]["up"]["kernel"]
    w = np.asarray(weights["blocks"]["up"]["kernel"])
    numbers = diagnostics.metrics({"any": (state, ())})
    for i in range(2):
        name = f"blocks/up/kernel/{i}"
        # u + term - u loses the last bits of term: 2^-24 of numbers up to 1 against terms of 0.06.
        assert numbers[f"decay_rms/{name}"] == pytest.approx(
            np.sqrt((added[i] ** 2).mean()), rel=1e-5
        )
        assert numbers[f"weight_rms/{name}"] == pytest.approx(np.sqrt((w[i] ** 2).mean()), rel=1e-6)
        assert numbers[f"beyond/{name}"] == pytest.approx((np.abs(w[i]) > 0.3).mean(), abs=1e-6)
        assert numbers[f"rate/{name}"] == pytest.approx(0.2)
    assert not any(name.endswith("head/kernel") for name in numbers)


def test_ema_threshold_is_found_by_diagnostics():
    tx = optax_decay.adam_huber_decay(0.1, threshold=thresholds.running_mean_size(), axes=toy.AXES)
    _, state = toy.train(tx, toy.params(), toy.gradients(1))
    numbers = diagnostics.metrics(state)
    w = toy.flat_params()["mix/kernel"]
    assert numbers["threshold/mix/kernel"] == pytest.approx(np.abs(w).mean(), rel=1e-5)


def test_table_agrees_with_what_the_optimizer_does():
    """The table is computed from arguments, the shrink from a step with zero gradients."""
    masks = ["hidden", ("hidden", "head"), None, ((r".*kernel", 0.5), (r".*", False))]
    for mask in masks:
        tx = optax.chain(
            optax.scale_by_adam(),
            optax_decay.decay(0.4, mask=mask, axes=toy.AXES),
            optax.scale_by_learning_rate(RATE),
        )
        before, after = toy.params(), shrink(tx, toy.params())
        table = optax_decay.decay_table(
            before, 0.4, mask=mask, axes=toy.AXES, learning_rate=RATE, tokens_per_step=512
        )
        old, new = toy.unnest(before), toy.unnest(after)
        for row in table.rows:
            measured = 1 - np.linalg.norm(new[row.path]) / np.linalg.norm(old[row.path])
            # 1 - ratio of norms: rounding of weights near 1 in 2^-24 steps, averaged over the leaf.
            assert row.shrink == pytest.approx(measured, abs=2.0**-22)
            assert row.tokens == (row.steps * 512)


def test_table_as_text():
    table = optax_decay.decay_table(
        toy.params(),
        0.1,
        mask=("hidden", "head"),
        axes=toy.AXES,
        learning_rate=3e-4,
        tokens_per_step=4096,
    )
    text = str(table)
    assert "blocks/up/kernel" in text and "2×8×12" in text and "3.00e-05" in text
    assert "33.3k" in text and "137M" in text
    guessed = str(optax_decay.decay_table({"mystery": jnp.zeros((2, 3))}, 0.1))
    assert "some roles guessed" in guessed
    named = str(optax_decay.decay_table({"w": jnp.zeros((2, 3))}, 0.1))
    assert "roles read from names" in named


def test_decay_disappears_in_bfloat16_and_says_so():
    """The measurement of needs.md F21: below 2^-9 per step no bfloat16 weight moves."""
    rng = np.random.default_rng(0)
    w32 = {"w": jnp.asarray(rng.standard_normal((100, 1000)), jnp.float32)}
    w16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), w32)
    tx = optax.chain(optax_decay.decay(0.1), optax.scale_by_learning_rate(1e-3))
    with pytest.warns(optax_decay.LowPrecisionDecayWarning, match="stored in 16 bits"):
        tx.init(w16)
    moved32 = shrink(tx, w32)["w"] != w32["w"]
    assert float(moved32.mean()) > 0.99
    with pytest.warns(optax_decay.LowPrecisionDecayWarning):
        moved16 = shrink(tx, w16)["w"] != w16["w"]
    assert float(moved16.mean()) == 0.0


def test_hyperparameters_stay_in_float32_for_bfloat16_weights():
    """λ = 0.1 is not rounded to bfloat16's 0.10009765625 (F17)."""
    w = {"w": jnp.full((1, 4), 256.0, jnp.bfloat16)}
    u = {"w": jnp.zeros((1, 4), jnp.float32)}
    tx = optax_decay.decay(jnp.float32(0.1))
    with pytest.warns(optax_decay.LowPrecisionDecayWarning):
        state = tx.init(w)
    got = tx.update(u, state, w)[0]["w"]
    np.testing.assert_allclose(got, 25.6, rtol=1e-6)


def test_matches_torch_style_adamw():
    """λ pasted from a torch run gives its trajectory: p *= 1 - ηλ, then the Adam step (F2)."""
    flat, grads, lam = toy.flat_params(), toy.flat_gradients(10), 0.3
    direction = references.adam_directions(0.9, 0.999, 1e-8)
    w = {path: x.copy() for path, x in flat.items()}
    for g in grads:
        for path in w:
            w[path] = w[path] * (1 - RATE * lam) - RATE * direction(path, g[path])
    with jax.enable_x64(True):
        tx = optax.chain(
            optax.scale_by_adam(), optax_decay.decay(lam), optax.scale_by_learning_rate(RATE)
        )
        got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(10, jnp.float64))
    for path, x in toy.unnest(got).items():
        np.testing.assert_allclose(x, w[path], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["huber", "pseudo_huber", "log_cosh", "fair"])
def test_bounded_pulls_do_not_divide_zero_by_zero(name):
    """A matrix of zeros has the threshold 0; other matrices keep theirs, and a NaN stays visible."""
    pull = getattr(optax_decay.pulls, name)()
    params = {
        "a": jnp.zeros((2, 3)),
        "b": jnp.array([[0.5, -2.0]]),
        "c": jnp.array([[jnp.nan, 1.0]]),
    }
    links = [optax_decay.decay(0.1, pull=pull)]
    if pull.prox:
        links.append(optax_decay.proximal_decay(0.1, learning_rate=0.5, pull=pull))
    for tx in links:
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        assert not updates["a"].any() and jnp.abs(updates["b"]).min() > 0
        assert jnp.isnan(updates["c"]).any()
        del params["c"]
        with jax.debug_nans(True):
            zeros = jax.tree.map(jnp.zeros_like, params)
            jax.jit(lambda g, tx=tx: tx.update(g, tx.init(params), params)[0])(zeros)
        params["c"] = jnp.array([[jnp.nan, 1.0]])


STACKED = {"norm": {"scale": (2, 4)}, "attn": {"kernel": (2, 4, 4)}, "q_norm": (2, 4)}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda path: "kernel" in path, "returned False for the whole tree"),
        (lambda path: "bias" not in path, "returned True for the whole tree"),
        (lambda path: 1.0 * ("kernel" not in path), "returned 1.0 for the whole tree"),
        (lambda path: None, "returned None for the whole tree"),
        (lambda path, leaf: leaf.ndim > 1, "failed on the tree of parameters"),
        (lambda path: path.endswith("kernel"), "failed on the tree of parameters"),
        ({"norm": "no", "attn": "yes", "q_norm": "no"}, "'attn/kernel' is 'yes'"),
        ({"norm": False, "attn": [True], "q_norm": False}, "neither a prefix"),
        (
            {"norm": False, "attn": jnp.ones((2, 4, 4)), "q_norm": 0},
            r"an array of shape \(2, 4, 4\)",
        ),
    ],
)
def test_masks_that_cannot_be_meant_are_rejected(mask, message):
    params = jax.tree.map(jnp.ones, STACKED, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match=message):
        optax_decay.decay(0.1, mask=mask).init(params)


@pytest.mark.parametrize("mask", ["hidden", "vector", ("hidden", "head"), {"hidden", "head"}])
def test_a_guess_against_the_name_of_a_kernel_is_not_made(mask):
    params = {"mixer": {"kernel": jnp.ones((2, 16, 16))}, "z": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"'mixer/kernel' has; .*'kernel' in its name contradicts"):
        optax_decay.decay(0.1, mask=mask).init(params)
    with pytest.warns(optax_decay.GuessedRolesWarning):
        optax_decay.decay(0.1, mask="hidden").init({"z": params["z"]})


def test_a_guess_against_the_name_of_a_norm_is_not_made():
    params = {"up": {"kernel": jnp.ones((4, 6))}, "q_norm": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match=r"'q_norm' has; .*'norm' in its name contradicts"):
        optax_decay.decay(0.1, mask="hidden").init(params)
    axes = (("up/kernel", "D -> F"), ("q_norm", "L | D"))
    optax_decay.decay(0.1, mask="hidden", axes=axes).init(params)
    optax_decay.decay(0.1, mask="hidden").init({"up": params["up"]})


@pytest.mark.parametrize(
    "link",
    [
        optax_decay.decay,
        optax_decay.adadecay,
        optax_decay.toward_initial_decay,
        lambda *_, **more: optax_decay.cpr_decay(**({"mask": None} | more)),
    ],
)
def test_leaves_that_cannot_decay_are_named_unless_they_are_masked(link):
    params = {"w": jnp.ones((2, 3)), "step": jnp.zeros(3, jnp.int32), "none": jnp.zeros((0, 3))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match=r"'none' of shape \(0, 3\) has no elements"):
        link(0.1).init({"w": params["w"], "none": params["none"]})
    with pytest.raises(ValueError, match=r"'step' holds integers \(int32\)"):
        link(0.1).init({"w": params["w"], "step": params["step"]})
    tx = link(0.1, mask={"w": True, "step": False, "none": False})
    tx.update(zeros, tx.init(params), params)
    with pytest.warns(optax_decay.NothingDecaysWarning):
        link(0.1, mask=False).init(params)
    with pytest.raises(ValueError, match=r"hold 0\.5, which is not an array"):
        link(0.1).init({"w": params["w"], "scalar": 0.5})


def test_metrics_tell_the_share_of_the_update_along_the_weights():
    """What a sphere behind the decay would take away; per slice, and 0 where there is no direction."""
    rng = np.random.default_rng(0)
    w, u = rng.standard_normal((2, 3, 4, 5))
    w[1], u[2] = 3 * u[1], 0
    tx = optax_decay.decay(0.1, metrics=True, axes=(("w", "L | D -> F"),))
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = tx.update({"w": jnp.asarray(u, jnp.float32)}, tx.init(params), params)[1]
    share = np.sum(u[0] * w[0]) / np.linalg.norm(u[0]) / np.linalg.norm(w[0])
    np.testing.assert_allclose(state.metrics["w"].radial, [share, 1, 0], rtol=1e-5, atol=1e-6)
    assert abs(share) > 0.01
    assert optax_decay.metrics(state)["radial/w/1"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "text"),
    [(999_999.7, "1M"), (999.6, "1k"), (998.2, "998"), (58_140_000, "58.1M"), (1.2e15, "1.2e+03T")],
)
def test_counts_in_tables_round_before_they_choose_a_letter(count, text):
    assert diagnostics.quantity_text(count) == text
