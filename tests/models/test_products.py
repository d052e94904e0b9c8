"""The fast ways of CPUs and GPUs through products, attention, layers and the loss are the plain ways to rounding."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import attention, embedding, gpt, layers, llama, loss, products
from train.step import families
from train.step import update as step

# One rounding to bfloat16 is at most 2^-8 of a value; sums here are of up to about 100 of those.
BF16 = 2.0**-8


def draws(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("batch", "narrow"), [((), "a"), ((2, 3), "both")])
def test_product_and_gradients_against_float64(batch, narrow):
    a, b, dy = draws((*batch, 5, 7), (*batch, 7, 11), (*batch, 5, 11))
    a16 = jnp.asarray(a, jnp.bfloat16)
    b16 = jnp.asarray(b, jnp.bfloat16 if narrow == "both" else jnp.float32)
    assert products.uses_cpu_kernel(a16) and not products.uses_cpu_kernel(jnp.asarray(a))
    y, back = jax.vjp(functools.partial(products.product, dtype=jnp.float32), a16, b16)
    da, db = back(jnp.asarray(dy))
    assert (y.dtype, da.dtype, db.dtype) == (jnp.float32, jnp.bfloat16, b16.dtype)
    a, b, dy = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (a, b, dy))
    np.testing.assert_allclose(y, a @ b, atol=1e-5)  # products of bfloat16 are exact in float32
    np.testing.assert_allclose(
        np.asarray(da, np.float64), dy @ b.swapaxes(-1, -2), rtol=BF16, atol=1e-5
    )
    rtol = BF16 if narrow == "both" else 0
    np.testing.assert_allclose(
        np.asarray(db, np.float64), a.swapaxes(-1, -2) @ dy, rtol=rtol, atol=1e-5
    )


def test_attention_in_blocks_is_attention(monkeypatch, as_for_users):
    query, key, value = draws((2, 8, 4, 6), (2, 8, 2, 6), (2, 8, 2, 6))

    def both(query, key, value):
        mixed = attention.attention(query, key, value, scale=0.4)
        return jnp.sum(jnp.sin(mixed)), mixed

    found = []
    for blocks in (1, attention.CPU_BLOCKS):
        monkeypatch.setattr(attention, "CPU_BLOCKS", blocks)
        graded = jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True)
        found.append(jax.jit(graded)(query, key, value))
        text = jax.jit(lambda *x: both(*x)[1]).lower(query, key, value).as_text()
        assert ("4x2x8" not in text) or blocks == 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), *found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_in_parts_is_the_loss(monkeypatch, dtype):
    x, w = draws((3, 4, 16), (16, 29))
    x = jnp.asarray(x, dtype)
    targets = np.random.default_rng(1).integers(0, 29, (3, 4))
    targets[1, 2:] = -1

    def mean(x, w):
        total, count = loss.nats(x, w, targets)
        return total / count

    found = []
    for limit in (4 * 29 * 12, 4 * 29 * 3):
        monkeypatch.setattr(loss, "CPU_BYTES", limit)
        assert loss.part_count(12, 29) == 4 * 29 * 12 // limit
        found.append(jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(x, w))
        assert float(jax.jit(mean)(x, w)) == pytest.approx(float(found[-1][0]), rel=1e-6)
    # What is rounded to bfloat16 in both is rounded before it is scaled by 1/count in one of them.
    atol = 2e-7 if dtype == "float32" else 4 * BF16 * np.abs(x).max() / 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=atol
        ),
        *found,
    )


def as_on(platform, monkeypatch):
    for module in (products, layers, loss, embedding):
        monkeypatch.setattr(module, "platform", lambda: platform)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [37, 40, 44])  # groups of 1, 8 and 4 logits
def test_rows_of_logits_are_read(monkeypatch, platform, dtype, tokens):
    (z,) = draws((5, tokens))
    z *= np.array([1, 30, 1e-3, 1e4, 1])[:, None].astype(np.float32)
    z[4] = -1e30  # a maximum that is no better than nothing
    z[0, 8:16] = -np.inf  # a whole group
    z = np.asarray(jnp.asarray(z, dtype), np.float32)
    targets = np.array([0, 36, 7, 20, 3])
    as_on(platform, monkeypatch)
    hit = np.arange(tokens) == targets[:, None]
    read = jax.jit(loss.logsumexp_and_target, static_argnums=3)
    top, target = read(jnp.asarray(z, dtype), targets, hit, tokens)
    assert top.dtype == target.dtype == jnp.float32
    wide = z.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    right = np.log(np.exp(wide - largest).sum(axis=1)) + largest[:, 0]
    np.testing.assert_allclose(top, right, rtol=1e-6)
    np.testing.assert_array_equal(target, z[np.arange(5), targets])


def test_loss_in_parts_on_gpus(monkeypatch):
    x, w = draws((3, 4, 16), (16, 29))
    targets = np.random.default_rng(1).integers(0, 29, (3, 4))
    targets[1, 2:] = -1
    whole = lambda x, w: loss.cross_entropy(loss.logits(x, w), targets)[0]
    as_on("gpu", monkeypatch)
    monkeypatch.setattr(loss, "BYTES", 4 * 29 * 3)
    assert loss.part_count(12, 29) == 4
    parted = jax.make_jaxpr(lambda x, w: loss.nats(x, w, targets)[0])
    assert "scan" in str(parted(x, w)) and "scan" not in str(jax.make_jaxpr(whole)(x, w))
    graded = [jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (parts_of(targets), whole)]
    found = [f(x, w) for f in graded]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), *found)


@pytest.mark.parametrize("tokens", [61, 64])  # with padding and without
def test_rounded_logits_on_gpus(monkeypatch, as_for_users, tokens):
    """The loss and its gradients against float64, from the same rounded factors."""
    x, w = draws((48, 16), (16, tokens))
    x, w = (np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64) for array in (x, w))
    targets = np.random.default_rng(1).integers(0, tokens, 48)
    targets[5:8] = -1
    as_on("gpu", monkeypatch)

    def graded(stored):
        monkeypatch.setattr(loss, "stored", lambda x: jnp.dtype(stored))
        # XLA for CPUs would skip the rounding.
        graded = jax.value_and_grad(lambda a: loss.nats(a[0][None], a[1], targets[None])[0])
        run = jax.jit(graded, compiler_options={"xla_allow_excess_precision": False})
        total, (dx, dw) = run((jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32)))
        return np.float64(total), np.asarray(dx, np.float64), np.asarray(dw, np.float64)

    z = x @ w
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    real = targets >= 0
    dz = np.where(real[:, None], p - (np.arange(tokens) == targets[:, None]), 0)
    total = -np.sum(np.log(p[np.arange(48), targets])[real])
    found, wide = graded("bfloat16"), graded("float32")
    # Logits and the logarithm of their sum move by at most r, and p by a factor of at most exp(2r). Then dz is rounded,
    # and dx once more.
    r = BF16 * np.abs(z).max(axis=1, keepdims=True)
    wrong = np.where(real[:, None], p * np.expm1(2 * r), 0) * (1 + BF16) + BF16 * np.abs(dz)
    assert abs(found[0] - total) <= 2 * np.sum(r[real]) and abs(wide[0] - total) < 1e-4 * total
    assert np.all(np.abs(found[1] - dz @ w.T) <= wrong @ np.abs(w).T + BF16 * np.abs(found[1]))
    assert np.all(np.abs(found[2] - x.T @ dz) <= np.abs(x).T @ wrong + 1e-4)
    # The bounds are for the worst case; these are the errors. Logits here are of deviation 4.
    error = lambda g: np.linalg.norm(g[2] - x.T @ dz) / np.linalg.norm(x.T @ dz)
    assert error(wide) < 0.002 < error(found) < 0.008


@pytest.mark.parametrize("tokens", [62, 64])  # groups of one logit, and of eight
def test_loss_of_split_logits_on_gpus(monkeypatch, as_for_users, tokens):
    """Rows over four devices, the vocabulary over two: one part, and nothing of the size of the logits travels."""
    x, w = draws((8, 16, 16), (16, tokens))
    targets = np.random.default_rng(1).integers(0, tokens, (8, 16))
    targets[1, 2:] = -1
    right = jax.value_and_grad(parts_of(targets), argnums=(0, 1))(x, w)
    as_on("gpu", monkeypatch)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in ((x, jax.P("fsdp")), (w, jax.P(None, "tensor")))
    ]
    with jax.set_mesh(mesh):
        graded = jax.jit(jax.value_and_grad(parts_of(targets), argnums=(0, 1)))
        text = graded.lower(*placed).compile().as_text()
        found = graded(*placed)
    sent = re.findall(r"f32\[([\d,]*)\]\S* (?:all-|collective|reduce-scatter)[\w-]*\(", text)
    sizes = [math.prod(int(side) for side in shape.split(",") if side) for shape in sent]
    # The two gradients, 32 x 16 and 16 x tokens/2 on a device; its logits are 32 x tokens/2.
    assert max(sizes) == 32 * 16
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), found, right)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_loss_in_parts_of_workers(monkeypatch, platform):
    """Inside of a shard_map, where each device has a sum of its own: in one part over two, in four on one."""
    x, w = draws((4, 6, 16), (16, 29))
    targets = np.random.default_rng(1).integers(0, 29, (4, 6))
    targets[1, 2:] = -1
    whole = lambda x, w: loss.cross_entropy(loss.logits(x, w), targets)[0]
    right = jax.value_and_grad(whole, argnums=(0, 1))(x, w)
    as_on(platform, monkeypatch)
    for name in ("BYTES", "CPU_BYTES"):
        monkeypatch.setattr(loss, name, 4 * 29 * 6)
    assert loss.part_count(24, 29) == 4
    for devices in (1, 2):

        def worker(x, w, targets):
            w = jax.lax.pcast(w, "replica", to="varying")
            total, gradients = jax.value_and_grad(parts_of(targets), argnums=(0, 1))(x, w)
            return jax.lax.psum((total, gradients[1]), "replica"), gradients[0]

        mesh = jax.make_mesh((devices,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, all_of_it = jax.P("replica"), jax.P()
        specs = {"in_specs": (rows, all_of_it, rows), "out_specs": (all_of_it, rows)}
        run = jax.jit(jax.shard_map(worker, mesh=mesh, **specs))
        (total, dw), dx = run(x, w, targets)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6),
            (total, (dx, dw)),
            right,
        )


def parts_of(targets):
    return lambda x, w: loss.nats(x, w, targets)[0]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_written_out_are_the_loop(monkeypatch, as_for_users, remat):
    """As on GPUs; what is recomputed stays recomputed though nothing but a barrier tells it from the first time."""
    # Heads of width 8 need no padding.
    config = dataclasses.replace(llama.PRESETS["toy"], width=48, remat=remat)
    params = llama.init(config, jax.random.key(0))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 9), np.int32)
    forward = families.Forward(config)
    found, text = {}, {}
    as_on("gpu", monkeypatch)
    for layers_at_most in (config.layers - 1, config.layers):
        monkeypatch.setattr(layers, "GPU_LAYERS", layers_at_most)
        graded = jax.jit(jax.value_and_grad(functools.partial(step.loss, forward)))
        text[layers_at_most] = graded.lower(params, tokens).compile().as_text()
        found[layers_at_most] = graded(params, tokens)
    loop, out = text.values()
    assert "while(" in loop and "while(" not in out
    # Products with weights in each of three layers (gate and up are one; so are queries, keys and values where nothing
    # is recomputed) and the head, forward and twice backward, and the six of attention; and the embedding's gradient.
    weights = 4 if remat == "none" else 6
    products_of_the_step = 3 * (weights * 3 + 1) + 6 * 3 + 1
    again = {"none": 0, "dots": 1, "full": 7}[remat] * 3
    assert len(re.findall(r" dot\(", out)) == products_of_the_step + again
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found.values()
    )


@pytest.mark.parametrize("width", [48, 24])  # heads of 8 features, and of 4 that are padded
def test_dots_recomputes_the_scores_of_attention_only(monkeypatch, width):
    """In the program before XLA; for CPUs, XLA may merge what is recomputed with the first computation."""
    config = dataclasses.replace(llama.PRESETS["toy"], width=width, remat="dots")
    as_on("gpu", monkeypatch)
    forward = families.Forward(config)
    tokens = np.zeros((2, 9), np.int32)
    params = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    graded = jax.jit(jax.value_and_grad(functools.partial(step.loss, forward)))
    text = graded.lower(params, tokens).as_text()
    backward = max(text.split("func.func"), key=lambda part: part.count("dot_general"))
    assert "optimization_barrier" in backward  # behind it stands what is computed again
    assert "stablehlo.pad" in backward or width == 48
    # The scores again, and two gradients of each of six matrices (gate and up are one) and two products of attention.
    assert len(re.findall(r"stablehlo\.dot_general", backward)) == 1 + 2 * (6 + 2)


def test_parts_are_equal_and_within_the_limit():
    assert loss.part_count(2048, 8192) == 8
    assert loss.part_count(7, loss.CPU_BYTES) == 7
    assert loss.part_count(8 * 100, loss.CPU_BYTES // 4 // 90) == 10


TIED = llama.Config(vocab_size=61, width=24, mlp_width=40, layers=2, heads=2, tied=True)


@pytest.mark.parametrize(
    ("family", "config", "split"),
    [
        (llama, llama.PRESETS["toy"], True),
        (llama, TIED, False),
        (gpt, gpt.PRESETS["gpt-toy"], True),
    ],
)
def test_models_in_bfloat16_are_near_those_in_float32(monkeypatch, family, config, split):
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (4, 17), np.int32)
    params = family.init(config, jax.random.key(0))
    if split:
        monkeypatch.setattr(loss, "CPU_BYTES", 4 * config.vocab_size * 16)
    found = {}
    for dtype in ("float32", "bfloat16"):
        forward = families.Forward(dataclasses.replace(config, dtype=dtype))
        graded = jax.value_and_grad(functools.partial(step.loss, forward))
        found[dtype] = jax.jit(graded)(params, tokens)
    # Runs side by side.
    many = jax.jit(jax.vmap(graded, in_axes=(None, 0)))(params, np.stack([tokens, tokens]))
    np.testing.assert_allclose(many[0][1], found["bfloat16"][0], rtol=1e-5)
    assert abs(found["float32"][0] - found["bfloat16"][0]) < 1e-3
    difference = jax.tree.map(jnp.subtract, *(found[dtype][1] for dtype in found))
    whole = optax.tree.norm(found["float32"][1])
    for wrong, right in zip(jax.tree.leaves(difference), jax.tree.leaves(found["float32"][1])):
        # Through the layers some ten roundings add up; keys' biases have no gradient but rounding.
        assert np.linalg.norm(wrong) <= 10 * BF16 * np.linalg.norm(right) + 1e-4 * whole


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_hessian_products_pass_through(monkeypatch, platform):
    """Sophia-H's estimate: a derivative of the gradient along a direction."""
    as_on(platform, monkeypatch)
    config = llama.Config(
        vocab_size=61, width=24, mlp_width=40, layers=2, heads=2, dtype="bfloat16"
    )
    forward = families.Forward(config)
    tokens = np.random.default_rng(3).integers(0, 61, (2, 9), np.int32)
    params = llama.init(config, jax.random.key(0))
    tangent = jax.tree.map(jnp.ones_like, params)
    gradient = jax.grad(lambda p: forward.nats(p, tokens[:, :-1], tokens[:, 1:])[0])
    product = jax.jit(lambda p: jax.jvp(gradient, (p,), (tangent,))[1])(params)
    if platform == "gpu":  # against the gradient of a loss that JAX differentiates twice
        whole = lambda x, w: loss.cross_entropy(loss.logits(x, w), tokens[:, 1:])[0]
        x, w, dx, dw = draws((2, 8, 24), (24, 61), (2, 8, 24), (24, 61))
        found = [
            jax.jvp(jax.grad(f, argnums=(0, 1)), (x, w), (dx, dw))[1]
            for f in (parts_of(tokens[:, 1:]), whole)
        ]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *found)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(product))
