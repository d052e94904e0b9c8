"""Estimates of curvature: exact expectations, averaging over devices and micro-batches, and the signs of Rademacher."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.optimizers.curvature import gnb_from_gradients, gnb_hessian, hutchinson
from tests.references import sophia as reference_sophia

P = jax.P


def regression(seed=0, n=4, d=3, classes=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d, classes)), rng.normal(size=(n, d))


def logits_fn(params, x):
    return x @ params["w"]


def force_labels(monkeypatch, rule):
    """Labels by `rule(logits)` in place of sampled ones."""
    monkeypatch.setattr(jax.random, "categorical", lambda key, z: rule(z))


def spread_labels(z):
    """Labels that depend on the position's own logits only, and differ between positions."""
    return jnp.argmax(jnp.sin(7.0 * z), axis=-1)


@pytest.mark.parametrize("mask", [None, [1, 1, 0, 1], [0, 0, 1, 0]])
def test_gnb_expectation_is_the_hessian_of_softmax_regression(monkeypatch, mask):
    with jax.enable_x64(True):
        w, x = regression()
        kept = np.ones(len(x)) if mask is None else np.array(mask, float)
        given = None if mask is None else jnp.asarray(mask, bool)
        total = 0.0
        for labels, probability in reference_sophia.all_labels(x @ w):
            force_labels(monkeypatch, lambda z, labels=labels: jnp.asarray(labels))
            estimate = gnb_hessian(logits_fn, jnp.asarray(x), given)
            total = total + probability * estimate({"w": jnp.asarray(w)}, jax.random.key(0))["w"]
        want = reference_sophia.softmax_regression_hessian_diagonal(w, x, kept)
        # 81 terms of order 1 in float64.
        np.testing.assert_allclose(total, want, rtol=1e-12, atol=1e-15)
        loss = lambda w: reference_loss(w, x, kept)
        hessian = jax.hessian(loss)(jnp.asarray(w)).reshape(w.size, w.size)
        np.testing.assert_allclose(jnp.diag(hessian).reshape(w.shape), want, rtol=1e-12)


def reference_loss(w, x, kept):
    labels = jnp.zeros(len(x), int)  # the Hessian of softmax regression does not depend on them
    z = x @ w
    losses = jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[:, None], -1)[:, 0]
    return jnp.sum(losses * kept) / kept.sum()


def test_gnb_expectation_is_the_gauss_newton_diagonal_of_a_network(monkeypatch):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        w1, w2 = rng.normal(size=(3, 2)), rng.normal(size=(2, 3))
        x, mask = rng.normal(size=(4, 3)), np.array([1.0, 0.0, 1.0, 1.0])

        def network(params, x):
            return jnp.tanh(x @ params["w1"]) @ params["w2"]

        params = {"w1": jnp.asarray(w1), "w2": jnp.asarray(w2)}
        logits = np.asarray(network(params, x))
        total = {"w1": 0.0, "w2": 0.0}
        for labels, probability in reference_sophia.all_labels(logits):
            force_labels(monkeypatch, lambda z, labels=labels: jnp.asarray(labels))
            estimate = gnb_hessian(network, jnp.asarray(x), jnp.asarray(mask))
            h = estimate(params, jax.random.key(0))
            total = {name: total[name] + probability * h[name] for name in total}
        jacobians = jax.jacobian(network)(params, x)
        for name in total:
            j = np.asarray(jacobians[name]).reshape(4, 3, -1)
            want = reference_sophia.gauss_newton_diagonal(j, logits, mask)
            np.testing.assert_allclose(np.ravel(total[name]), want, rtol=1e-12, atol=1e-15)


def test_labels_follow_the_model():
    w, x = regression(n=5)
    estimate = jax.jit(
        jax.vmap(gnb_hessian(logits_fn, jnp.asarray(x, jnp.float32)), in_axes=(None, 0))
    )
    draws = estimate({"w": jnp.asarray(w, jnp.float32)}, jax.random.split(jax.random.key(3), 4000))
    want = reference_sophia.softmax_regression_hessian_diagonal(w, x, np.ones(5))
    error = np.asarray(draws["w"]).std(0) / np.sqrt(4000)
    assert (error < 0.1 * want).all()
    assert (np.abs(np.asarray(draws["w"]).mean(0) - want) < 5 * error).all()


def test_micro_batches_are_summed_before_squaring(monkeypatch):
    force_labels(monkeypatch, spread_labels)
    w, x = regression(n=12)
    mask = np.arange(12) % 5 != 0
    params, x, mask = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32), mask
    key = jax.random.key(0)
    whole = gnb_hessian(logits_fn, x, mask)(params, key)["w"]
    parts = gnb_hessian(
        logits_fn, x.reshape(3, 4, 3), jnp.asarray(mask.reshape(3, 4)), micro_batches=True
    )(params, key)["w"]
    squares = [
        gnb_hessian(logits_fn, x[i : i + 4], mask[i : i + 4])(params, key)["w"] for i in (0, 4, 8)
    ]
    # 12 positions summed in two orders.
    np.testing.assert_allclose(parts, whole, rtol=12 * 2.0**-23, atol=1e-7)
    assert np.abs(whole - sum(squares) / 3).max() > 0.1 * np.abs(whole).max()
    with pytest.raises(ValueError, match="micro_batches=True needs one leading axis"):
        gnb_hessian(logits_fn, x.reshape(3, 4, 3), mask.reshape(4, 3), micro_batches=True)(
            params, key
        )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("micro_batches", [False, True])
def test_devices_are_summed_before_squaring(monkeypatch, check_vma, micro_batches):
    force_labels(monkeypatch, spread_labels)
    w, x = regression(n=32)
    mask = jnp.asarray(np.arange(32) % 5 != 0)  # 3 or 4 positions per device
    params, x = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    whole = gnb_hessian(logits_fn, x, mask)(params, jax.random.key(0))["w"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, x, mask):
        if micro_batches:
            x, mask = x.reshape(2, 2, 3), mask.reshape(2, 2)
        estimate = gnb_hessian(logits_fn, x, mask, axis_name="data", micro_batches=micro_batches)
        return estimate(params, jax.random.key(0))["w"]

    specs = (P(), P("data"), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    np.testing.assert_allclose(jax.jit(sharded)(params, x, mask), whole, rtol=4e-6, atol=1e-7)


def test_devices_draw_different_labels():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": jnp.zeros((1, 2))}, jnp.ones((8, 1))

    def local(params, x, key):
        return gnb_hessian(logits_fn, x, axis_name="data")(params, key)["w"]

    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    )
    draws = np.array([sharded(params, x, jax.random.key(i)) for i in range(16)])[:, 0, 0]
    # The sum of eight ±1/2, squared, over 8: the same label everywhere gives 2, and has probability 1/128.
    assert (draws < 2).sum() >= 14
    assert set(draws) <= {0.0, 0.125, 0.5, 1.125, 2.0}


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_gnb_under_jit_on_a_mesh(mode):
    axis_type = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 10)).astype("f4"), rng.normal(size=(8, 5, 6)).astype("f4")
    mask = jnp.asarray(rng.random((8, 5)) < 0.7)
    key = jax.random.key(1)

    def model(params, x):
        return jnp.einsum("btd,dv->btv", x, params["w"])

    want = jax.jit(lambda p, x, m: gnb_hessian(model, x, m)(p, key))({"w": w}, x, mask)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, P(*spec)))
        args = ({"w": put(w, None, "tensor")}, put(x, "data"), put(mask, "data"))

        def sharded(p, x, m):
            return gnb_hessian(model, x, m)(p, key)

        got = jax.jit(sharded)(*args)
        assert got["w"].sharding.spec[1] == "tensor"
    np.testing.assert_allclose(got["w"], want["w"], rtol=40 * 2.0**-23, atol=1e-7)


def test_clipping_before_squaring_is_the_authors():
    rng = np.random.default_rng(0)
    g = {"a": rng.normal(size=(3, 2)).astype("f4"), "b": rng.normal(size=5).astype("f4")}
    norm = np.sqrt(sum((x.astype("f8") ** 2).sum() for x in g.values()))
    assert norm > 1.5
    clipped = gnb_from_gradients(g, 640, max_norm=1.0)
    plain = gnb_from_gradients(g, 640)
    for name in g:
        np.testing.assert_allclose(plain[name], 640 * g[name].astype("f8") ** 2, rtol=1e-6)
        want = 640 * (g[name].astype("f8") / (norm + 1e-6)) ** 2
        np.testing.assert_allclose(clipped[name], want, rtol=1e-6)
    short = jax.tree.map(lambda x: 0.1 * x, g)
    for name in g:
        np.testing.assert_array_equal(
            gnb_from_gradients(short, 640, max_norm=1.0)[name],
            gnb_from_gradients(short, 640)[name],
        )


def test_gnb_refuses_a_mask_of_another_shape_and_survives_an_empty_one():
    w, x = regression()
    params = {"w": jnp.asarray(w, jnp.float32)}
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit"):
        gnb_hessian(logits_fn, x, jnp.ones(3))(params, jax.random.key(0))
    h = gnb_hessian(logits_fn, jnp.asarray(x, jnp.float32), jnp.zeros(4))(params, jax.random.key(0))
    assert not h["w"].any()
    with pytest.raises(ValueError, match=r"max_norm=0.*nearest allowed"):
        gnb_hessian(logits_fn, x, max_norm=0.0)


def test_gnb_of_16_bit_weights_is_float32():
    w, x = regression()
    h = gnb_hessian(logits_fn, jnp.asarray(x, jnp.bfloat16))(
        {"w": jnp.asarray(w, jnp.bfloat16)}, jax.random.key(0)
    )
    assert h["w"].dtype == jnp.float32


MATRIX = np.array(
    [[2.0, 0.5, -1.0, 0.3], [0.5, -1.0, 0.2, 0.0], [-1.0, 0.2, 3.0, 0.7], [0.3, 0.0, 0.7, 0.5]]
)


def quadratic(params, scale):
    w = jnp.concatenate([params["a"], params["b"].ravel()])
    return scale * 0.5 * w @ jnp.asarray(MATRIX) @ w


def parameters():
    return {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0, 0.5]])}


def flat(h):
    return np.concatenate([np.ravel(h["a"]), np.ravel(h["b"])])


def test_rademacher_expectation_is_the_hessian_diagonal(monkeypatch):
    """The mean over all 16 sign vectors, exactly."""
    with jax.enable_x64(True):
        total = np.zeros(4)
        for signs in itertools.product([-1.0, 1.0], repeat=4):
            queue = [np.array(signs[:2]), np.array(signs[2:]).reshape(1, 2)]
            parts = {q.shape: q for q in queue}
            monkeypatch.setattr(
                jax.random,
                "rademacher",
                lambda k, shape, dtype, parts=parts: jnp.asarray(parts[shape]),
            )
            estimate = hutchinson(quadratic, 1.5, distribution="rademacher")
            total += flat(estimate(parameters(), jax.random.key(0))) / 16
        np.testing.assert_allclose(total, 1.5 * np.diag(MATRIX), rtol=1e-12)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_hutchinson_is_unbiased(distribution):
    estimate = hutchinson(quadratic, 2.0, distribution=distribution, num_samples=3)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.jit(jax.vmap(lambda k: estimate(parameters(), k)))(keys)
    draws = np.concatenate([draws["a"], draws["b"][:, 0]], axis=1)
    error = draws.std(0) / np.sqrt(4000)
    assert (error < 0.1).all()
    assert (np.abs(draws.mean(0) - 2 * np.diag(MATRIX)) < 5 * error).all()


def test_rademacher_draws_both_signs_and_normal_draws_neither():
    total = lambda params, batch: 0.5 * jnp.sum(params["w"]) ** 2  # Hessian of ones: ĥ_i = u_i Σu
    params = {"w": jnp.zeros(64)}
    h = np.asarray(hutchinson(total, distribution="rademacher")(params, jax.random.key(0))["w"])
    size = np.abs(h[0])
    assert size > 0
    np.testing.assert_array_equal(np.abs(h), size)
    assert 16 < (h > 0).sum() < 48  # of 64 fair coins, six standard deviations
    h = np.asarray(hutchinson(total, distribution="normal")(params, jax.random.key(0))["w"])
    assert len(np.unique(np.abs(h))) == 64


def test_hutchinson_averages_over_samples_micro_batches_and_devices():
    """A diagonal Hessian makes Rademacher exact, so that every average has a known result."""
    curvatures = np.random.default_rng(0).uniform(1.0, 2.0, (16, 5)).astype("f4")
    loss = lambda params, c: 0.5 * jnp.mean(jnp.sum(c * params["w"] ** 2, axis=-1))
    params, key = {"w": jnp.full(5, 0.3)}, jax.random.key(0)
    want = curvatures.mean(0)
    settings = {"distribution": "rademacher", "num_samples": 2}
    got = hutchinson(loss, curvatures, **settings)(params, key)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    got = hutchinson(loss, curvatures.reshape(4, 4, 5), micro_batches=True, **settings)(params, key)
    np.testing.assert_allclose(got["w"], want, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for check_vma in (True, False):

        def local(params, c):
            return hutchinson(loss, c, axis_name="data", **settings)(params, key)["w"]

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        np.testing.assert_allclose(jax.jit(sharded)(params, curvatures), want, rtol=1e-6)

    def split(params, c):
        return hutchinson(loss, c, axis_name="data")(params, key)["w"]

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"whole parameters; these vary over \['fsdp'\]"):
        jax.shard_map(split, mesh=mesh, in_specs=(P("fsdp"), P("data")), out_specs=P("fsdp"))(
            {"w": jnp.ones(10)}, curvatures
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"distribution": "rademacer"}, "did you mean 'rademacher'"),
        ({"num_samples": 0}, "num_samples=0.*nearest allowed value is 1"),
    ],
)
def test_hutchinson_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        hutchinson(quadratic, 1.0, **bad)
