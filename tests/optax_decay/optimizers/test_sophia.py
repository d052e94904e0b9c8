"""Sophia against the authors' loop and optax, its refresh phases, and the documented ways to feed it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.optimizers.curvature import (
    gnb_from_gradients,
    gnb_hessian,
    hutchinson,
    refresh_is_due,
)
from optax_decay.optimizers.sophia import (
    ScaleBySophiaState,
    scale_by_sophia,
    sophia_g,
    sophia_h,
)
from optax_decay.parameters import meshes
from tests.references import sophia as reference_sophia

P = jax.P
STEPS = 12
SHAPE = (7, 3)
RNG = np.random.default_rng(0)
# Per-step, per-weight slopes and offsets: gradients that depend on the weights and on the batch.
SLOPE, OFFSET = RNG.uniform(0.2, 1.0, (STEPS + 1, *SHAPE)), RNG.normal(size=(STEPS + 1, *SHAPE))
LABEL_SLOPE = RNG.uniform(0.5, 2.0, (STEPS + 1, *SHAPE))
WEIGHTS = RNG.normal(size=SHAPE)


def gradient(w, t):
    return SLOPE[t] * w - OFFSET[t]


def label_gradient(w, t):
    return 0.1 * (LABEL_SLOPE[t] * w + OFFSET[t])


def diagonal(w, t):
    """Of either sign, as Hutchinson's estimates are."""
    return LABEL_SLOPE[t] * (w + 0.3)


def run(tx, estimate, dtype, steps=STEPS, state=None, w=None, start=0):
    """Weights, win rates and h per step; `estimate(w, t)` is what hessian_fn returns on batch t."""
    w = {"w": jnp.asarray(WEIGHTS, dtype)} if w is None else w
    arrays = [jnp.asarray(x, dtype) for x in (SLOPE, OFFSET, LABEL_SLOPE)]

    @jax.jit
    def step(w, state, slope, offset, label_slope):
        grads = {"w": slope * w["w"] - offset}
        hessian_fn = lambda params, key: {"w": estimate(params["w"], offset, label_slope)}
        updates, state = tx.update(grads, state, w, hessian_fn=hessian_fn)
        return optax.apply_updates(w, updates), state

    state = tx.init(w) if state is None else state
    history = []
    for t in range(start, start + steps):
        w, state = step(w, state, *(x[t] for x in arrays))
        inner = optax.tree.get(state, "ScaleBySophiaState")
        history.append((w["w"], inner.win_rate, inner.nu["w"]))
    return history, state, w


OFFICIAL = {
    "125M": {"b1": 0.965, "b2": 0.99, "rho": 0.05, "bs": 480 * 1024, "k": 10, "weight_decay": 0.2},
    "short": {"b1": 0.9, "b2": 0.6, "rho": 0.04, "bs": 320, "k": 3, "weight_decay": 0.0},
    "every step": {"b1": 0.8, "b2": 0.9, "rho": 0.3, "bs": 64, "k": 1, "weight_decay": 0.1},
}


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("settings", OFFICIAL.values(), ids=OFFICIAL)
def test_trajectory_of_the_authors_loop(settings, double):
    want = reference_sophia.official(
        WEIGHTS, gradient, label_gradient, STEPS, learning_rate=0.02, **settings
    )
    # A step is at most the rate 0.02: float32 rounds w (up to 4) by 2.4e-7 per step.
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if double else {"rtol": 2e-6, "atol": 2e-6}
    with jax.enable_x64(double):
        tx = sophia_g(
            0.02,
            b1=settings["b1"],
            b2=settings["b2"],
            gamma=settings["rho"],
            refresh_every=settings["k"],
            weight_decay=settings["weight_decay"],
            mask=None,
        )

        def estimate(w, offset, label_slope):
            return gnb_from_gradients(0.1 * (label_slope * w + offset), settings["bs"])

        history, state, _ = run(tx, estimate, np.float64 if double else np.float32)
        for t, (w, win_rate, h) in enumerate(history):
            w_ref, _, h_ref = want[t]
            np.testing.assert_allclose(w, w_ref, **tolerance)
            np.testing.assert_allclose(win_rate, want[t - t % settings["k"]][1], rtol=1e-6)
            np.testing.assert_allclose(h, settings["bs"] * h_ref, rtol=tolerance["rtol"] * 5)
    refreshes = (STEPS - 1) // settings["k"]
    assert state[0].hessian_count == refreshes
    rates = [win for _, win, _ in want]
    assert rates[0] == 0.0 and max(rates) > 0.3  # the reference itself refreshes and clips


GENERAL = {
    "optax": dict(after_update=True, bias_correction=True, k=4, gamma=0.5, eps=1e-8, clip=1.0),
    "official, negative h": dict(after_update=False, bias_correction=False, k=3, gamma=0.7, eps=1e-3, clip=1.0),
    "first version of the paper": dict(after_update=False, bias_correction=False, k=2, gamma=1.0, eps=1e-12, clip=0.4),
    "every step": dict(after_update=True, bias_correction=True, k=1, gamma=0.2, eps=1e-6, clip=0.5),
}  # fmt: skip


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("settings", GENERAL.values(), ids=GENERAL)
def test_trajectory_with_estimates_of_either_sign(settings, double):
    shared = {"b1": 0.9, "b2": 0.7, "weight_decay": 0.3}
    want = reference_sophia.general(
        WEIGHTS, gradient, diagonal, STEPS, learning_rate=0.02, **shared, **settings
    )
    names = {
        "clip": "clip_threshold",
        "k": "refresh_every",
        "after_update": "refresh_after_update",
    }
    options = {names.get(name, name): value for name, value in settings.items()}
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if double else {"rtol": 2e-6, "atol": 2e-6}
    with jax.enable_x64(double):
        tx = sophia_h(0.02, mask=None, **shared, **options)
        estimate = lambda w, offset, label_slope: label_slope * (w + 0.3)
        history, _, _ = run(tx, estimate, np.float64 if double else np.float32)
        for t, (w, win_rate, h) in enumerate(history):
            w_ref, _, h_ref = want[t]
            np.testing.assert_allclose(w, w_ref, **tolerance)
            np.testing.assert_allclose(win_rate, want[t - t % settings["k"]][1], rtol=1e-6)
            np.testing.assert_allclose(
                h, h_ref, rtol=10 * tolerance["rtol"], atol=1e-6 if not double else 1e-13
            )
    assert (want[-1][2] < 0).any() and (want[-1][2] > 0).any()
    assert 0 < want[-1][1] < 1


def test_optax_settings_give_optax_contrib_sophia():
    def estimate_link():
        def update(updates, state, params, offset=None, **extra):
            return {"w": jnp.abs(params["w"]) + offset**2}, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    theirs = optax.contrib.sophia(
        0.02, b1=0.9, b2=0.7, eps=1e-12, gamma=0.3, update_interval=4, weight_decay=0.1,
        hessian_diagonal_fn=estimate_link(),
    )  # fmt: skip
    ours = sophia_h(
        0.02, b1=0.9, b2=0.7, eps=1e-12, gamma=0.3, refresh_every=4, weight_decay=0.1,
        refresh_after_update=True, bias_correction=True, mask=None,
    )  # fmt: skip
    estimate = lambda w, offset, _: jnp.abs(w) + offset**2
    history, _, _ = run(ours, estimate, np.float32)
    w = {"w": jnp.asarray(WEIGHTS, jnp.float32)}
    state = theirs.init(w)
    for t in range(STEPS):
        g = {"w": jnp.asarray(gradient(np.asarray(w["w"], "f8"), t), jnp.float32)}
        offset = jnp.asarray(OFFSET[t], jnp.float32)
        updates, state = theirs.update(g, state, w, offset=offset)
        w = optax.apply_updates(w, updates)
        # optax's 1 - 0.9**t in float32 is off by 1.2e-7 relative to 0.1; the rest are roundings of w.
        np.testing.assert_allclose(history[t][0], w["w"], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize(("after_update", "due"), [(False, [5, 10]), (True, [0, 5, 10])])
def test_hessian_fn_runs_only_when_due_and_the_predicate_says_when(after_update, due):
    seen = []
    tx = scale_by_sophia(refresh_every=5, refresh_after_update=after_update)
    w = jnp.ones(4)
    state = tx.init(w)

    @jax.jit
    def step(w, state, t):
        def hessian_fn(params, key):
            jax.debug.callback(lambda t: seen.append(int(t)), t)
            return params**2

        return tx.update(w, state, w, hessian_fn=hessian_fn)[1]

    predicted = []
    for t in range(12):
        if refresh_is_due(t, 5, after_update):
            predicted.append(t)
        assert bool(refresh_is_due(state, 5, after_update)) == (t in due)
        before = int(state.hessian_count)
        state = step(w, state, t)
        assert int(state.hessian_count) - before == (t in due)
    jax.effects_barrier()
    assert predicted == seen == due


def test_two_compiled_steps_equal_the_conditional():
    options = {"gamma": 0.5, "refresh_every": 3, "b2": 0.8, "mask": None}
    estimate = lambda w, offset, label_slope: label_slope * (w + 0.3)
    conditional, _, _ = run(sophia_g(0.02, **options), estimate, np.float32)
    tx = sophia_g(0.02, **options)
    w = {"w": jnp.asarray(WEIGHTS, jnp.float32)}
    state = tx.init(w)
    plain = jax.jit(lambda g, s, w: tx.update(g, s, w, hessian=None))
    refresh = jax.jit(lambda g, s, w, h: tx.update(g, s, w, hessian=h))
    refreshes = 0
    for t in range(STEPS):
        g = jax.tree.map(lambda x, t=t: jnp.float32(SLOPE[t]) * x - jnp.float32(OFFSET[t]), w)
        if refresh_is_due(t, 3):
            h = {"w": estimate(w["w"], None, jnp.float32(LABEL_SLOPE[t]))}
            updates, state = refresh(g, state, w, h)
            refreshes += 1
        else:
            updates, state = plain(g, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w["w"], conditional[t][0], rtol=2e-6, atol=2e-6)
    assert refreshes == 3
    # Only the win rate is conditional in the plain step.
    assert str(jax.make_jaxpr(plain)(g, state, w)).count("cond[") == 1


def test_missing_or_double_curvature_is_an_error():
    tx = sophia_g(0.1)
    w = {"w": jnp.ones((2, 3))}
    state = tx.init(w)
    with pytest.raises(ValueError, match=r"sophia needs curvature.*hessian=None"):
        tx.update(w, state, w)
    with pytest.raises(ValueError, match="two sources"):
        tx.update(w, state, w, hessian=w, hessian_fn=lambda params, key: params)
    with pytest.raises(ValueError, match="needs the weights"):
        scale_by_sophia().update(w, state[0], hessian_fn=lambda params, key: params)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0 .*above 0"),
        ({"eps": 0}, r"eps=0 .*above 0"),
        ({"clip_threshold": -1}, r"clip_threshold=-1 .*above 0"),
        ({"b1": 1.0}, r"b1=1.0 .*below 1"),
        ({"refresh_every": 0}, r"refresh_every=0 .*nearest allowed value is 1"),
        ({"refresh_every": 2.4}, r"refresh_every=2.4 is not a whole number.*nearest is 2"),
        (
            {"weight_decay": optax_decay.decay(0.1), "axes": (("w", "D -> F"),)},
            "axes would be ignored",
        ),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        sophia_g(0.1, **bad)


def test_resume_is_bitwise_across_a_refresh():
    """Hutchinson's keys come from the state: two runs of 4 + 6 steps and one of 10 agree to the last bit."""
    loss = lambda params, c: jnp.sum(jnp.cos(params["w"] @ c) ** 2)
    batches = jnp.asarray(np.random.default_rng(1).normal(size=(10, 3, 5)), jnp.float32)
    tx = sophia_h(0.02, refresh_every=3, gamma=0.1, key=7)
    start = {"w": jnp.asarray(WEIGHTS, jnp.float32)}

    @jax.jit
    def step(w, state, batch):
        grads = jax.grad(loss)(w, batch)
        updates, state = tx.update(grads, state, w, hessian_fn=hutchinson(loss, batch))
        return optax.apply_updates(w, updates), state

    w, state = start, tx.init(start)
    for t in range(10):
        w, state = step(w, state, batches[t])
        if t == 3:
            saved = jax.tree.map(lambda x: np.array(x), (w, state))
    treedef = jax.tree.structure((start, tx.init(start)))
    w2, state2 = jax.tree.unflatten(treedef, [jnp.asarray(x) for x in jax.tree.leaves(saved)])
    for t in range(4, 10):
        w2, state2 = step(w2, state2, batches[t])
    assert state[0].hessian_count == 3 and int(saved[1][0].hessian_count) == 1
    for a, b in zip(jax.tree.leaves((w, state)), jax.tree.leaves((w2, state2)), strict=True):
        np.testing.assert_array_equal(a, b)
    other, _ = step(
        start, sophia_h(0.02, refresh_every=3, gamma=0.1, key=8).init(start), batches[0]
    )
    del other
    assert not np.array_equal(state[0].key, sophia_h(0.02, key=8).init(start)[0].key)


def test_each_refresh_gets_another_key():
    keys = []
    tx = scale_by_sophia(refresh_every=2, key=3)
    w = jnp.ones(2)
    state = tx.init(w)
    for _ in range(7):

        def hessian_fn(params, key):
            jax.debug.callback(lambda k: keys.append(tuple(np.asarray(k).tolist())), key)
            return params

        _, state = tx.update(w, state, w, hessian_fn=hessian_fn)
    jax.effects_barrier()
    assert len(keys) == 3 == len(set(keys))
    for key in (3, jnp.int32(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(scale_by_sophia(key=key).init(w).key, state.key)
    assert scale_by_sophia(key=jax.random.key(3)).init(w).key.dtype == jax.random.key(3).dtype


def test_state_types_and_win_rate_of_16_bit_weights():
    w = {"w": jnp.ones((300, 70), jnp.bfloat16), "hole": jnp.ones(2), "scalar": jnp.ones([])}
    tx = scale_by_sophia(mu_dtype=jnp.bfloat16, gamma=1.0)
    state = tx.init(w)
    assert (state.mu["w"].dtype, state.nu["w"].dtype) == (jnp.bfloat16, jnp.float32)
    g = {**jax.tree.map(lambda x: x.astype(jnp.float32), w), "hole": None}
    half = {
        "w": jnp.zeros((300, 70)).at[:150].set(1e3),
        "hole": jnp.ones(2),
        "scalar": jnp.ones([]),
    }
    updates, new = tx.update(g, state, w, hessian=half, unknown=0)
    assert updates["hole"] is None and updates["w"].dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    # h = (1 - b2) 1e3 = 10 on half of the matrix, 0.01 on the scalar, against m = 0.035.
    np.testing.assert_allclose(new.win_rate, 150 * 70 / (300 * 70 + 1), rtol=1e-6)


def test_runs_inside_masked_and_partition():
    w = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    full = jax.tree.map(lambda x: 5 * x, w)
    tx = optax.partition(
        {"sophia": sophia_g(0.1, mask=None), "sgd": optax.sgd(0.1)}, {"a": "sophia", "b": "sgd"}
    )
    hessian_fn = lambda holes, key: full
    state = tx.init(w)
    for _ in range(11):
        _, state = tx.update(w, state, w, hessian_fn=hessian_fn)
    inner = optax.tree.get(state, "ScaleBySophiaState")
    assert inner.hessian_count == 1
    np.testing.assert_allclose(inner.nu["a"], 0.05, rtol=1e-5)


AXES = (("embed", "V -> D"), ("kernel", "L | D -> H"), ("head", "D -> V"), ("scale", "D"))


def test_default_mask_spares_embeddings_and_decay_may_be_a_transformation():
    shapes = {"embed": (5, 3), "kernel": (2, 3, 4), "head": (3, 5), "scale": (3,)}
    w = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    zero = jax.tree.map(jnp.zeros_like, w)
    tx = sophia_g(0.1, weight_decay=0.5, axes=AXES)
    updates, _ = tx.update(zero, tx.init(w), w, hessian=None)
    decayed = {name for name in w if updates[name].any()}
    assert decayed == {"kernel", "head"}
    np.testing.assert_allclose(updates["head"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    tx = sophia_h(0.1, weight_decay=optax_decay.huber_decay(0.5, threshold=0.25))
    updates, _ = tx.update(zero, tx.init(w), w, hessian=None)
    np.testing.assert_allclose(updates["embed"], -0.1 * 0.5 * 0.25, rtol=1e-6)


def language(seed=0, batch=16, length=6, vocabulary=11):
    """A tiny next-token problem: tokens of a fixed random chain, and masks of different sizes."""
    rng = np.random.default_rng(seed)
    chain = rng.permutation(vocabulary)
    tokens = [rng.integers(vocabulary, size=batch)]
    for _ in range(length):
        tokens.append(np.where(rng.random(batch) < 0.9, chain[tokens[-1]], tokens[-1]))
    tokens = np.stack(tokens, 1)
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "labels": jnp.asarray(tokens[:, 1:]),
        "mask": jnp.asarray(rng.random((batch, length)) < 0.8),
    }


def weights(vocabulary=11, width=8):
    rng = np.random.default_rng(2)
    return {
        "embed": jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32),
        "head": jnp.asarray(0.3 * rng.normal(size=(width, vocabulary)), jnp.float32),
    }


def logits_fn(params, batch):
    return jnp.tanh(params["embed"][batch["inputs"]]) @ params["head"]


def loss_sum(params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_fn(params, batch), batch["labels"]
    )
    return jnp.sum(losses * batch["mask"])


def train_step(tx, batch_axis=None):
    """The documented training step; inside shard_map if `batch_axis` names the axis of the batch."""

    def step(params, opt_state, batch):
        count = jnp.sum(batch["mask"])
        local = params
        if batch_axis:
            count = jax.lax.psum(count, batch_axis)
            local = jax.tree.map(lambda w: meshes.mark_varying(w, (batch_axis,)), params)
        loss, grads = jax.value_and_grad(lambda p: loss_sum(p, batch) / count)(local)
        if batch_axis:
            loss, grads = jax.lax.psum((loss, grads), batch_axis)
        hessian_fn = gnb_hessian(logits_fn, batch, batch["mask"], axis_name=batch_axis)
        updates, opt_state = tx.update(grads, opt_state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


LM_AXES = (("embed", "V -> D"), ("head", "D -> V"))


def documented_optimizer():
    return sophia_g(0.03, refresh_every=2, gamma=0.2, b2=0.9, axes=LM_AXES)


def test_documented_training_step_learns():
    tx = documented_optimizer()
    params, batch = weights(), language()
    state = tx.init(params)
    step = jax.jit(train_step(tx))
    losses = []
    for _ in range(60):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert losses[0] > 2.0 and losses[-1] < 0.7
    assert 0.05 < float(optax.tree.get(state, "win_rate")) < 1.0
    assert state[0].hessian_count == 29


def spread_labels(key, z):
    """Labels that depend on a position's logits only, so that any split of the batch sees the same ones."""
    return jnp.argmax(jnp.sin(7.0 * z), axis=-1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_training_step_in_shard_map_equals_one_device(monkeypatch, check_vma):
    monkeypatch.setattr(jax.random, "categorical", spread_labels)
    tx = documented_optimizer()
    params, batch = weights(), language()
    counts = np.asarray(batch["mask"]).reshape(8, -1).sum(1)
    assert len(set(counts)) > 1  # devices have different numbers of tokens
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            train_step(tx, "data"),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=(P(), P(), P()),
            check_vma=check_vma,
        )
    )
    single = jax.jit(train_step(tx))
    a, b = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(5):
        *a, _ = single(*a, batch)
        *b, _ = sharded(*b, batch)
    assert a[1][0].hessian_count == 2
    # Sums of 77 tokens in another order, and clipped steps of 0.03.
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_win_rate_counts_all_shards_of_split_weights():
    w = {"w": jnp.ones((8, 5)), "b": jnp.ones(3)}
    h = {"w": jnp.zeros((8, 5)).at[:3].set(1e3), "b": jnp.full(3, 1e3)}
    tx = scale_by_sophia(gamma=1.0)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": P("fsdp"), "b": P()}

    def step(w, h):
        return tx.update(w, tx.init(w), w, hessian=h)[1].win_rate

    got = jax.shard_map(step, mesh=mesh, in_specs=(specs, specs), out_specs=P())(w, h)
    np.testing.assert_allclose(got, (15 + 3) / 43, rtol=1e-6)
    np.testing.assert_allclose(step(w, h), (15 + 3) / 43, rtol=1e-6)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_training_step_on_a_mesh_equals_one_device(mode):
    axis_type = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    tx = sophia_g(0.03, refresh_every=2, gamma=0.2, b2=0.9, mask=None)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 5, 6)), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(6, 10)), jnp.float32)}
    model = lambda params, x: jnp.einsum("btd,dv->btv", x, params["w"])

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean(jax.nn.logsumexp(model(p, x), -1)))(params)
        updates, state = tx.update(grads, state, params, hessian_fn=gnb_hessian(model, x))
        return optax.apply_updates(params, updates), state

    want = (params, tx.init(params))
    for _ in range(4):
        want = step(*want, x)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, P(None, "tensor")))
        x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = (params, jax.jit(tx.init)(params))
        for _ in range(4):
            got = step(*got, x)
        assert got[1][0].nu["w"].sharding.spec[1] == "tensor"
    assert got[1][0].hessian_count == 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert isinstance(got[1][0], ScaleBySophiaState)
