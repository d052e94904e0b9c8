"""On accelerators products are padded to whole multiples of 16 bytes, and nobody notices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, embedding, gpt, layers, llama, loss, products, vit
from train.step import families
from train.step import update as step

MODELS = {
    "llama": llama.Config(vocab_size=61, width=30, mlp_width=43, layers=2, heads=3),
    "tied": llama.Config(vocab_size=59, width=24, mlp_width=41, layers=1, heads=2, tied=True),
    "gpt": gpt.Config(vocab_size=53, positions=16, width=27, mlp_width=37, layers=2, heads=3),
}
VIT = vit.Config(
    image_size=9, patch_size=3, classes=7, width=27, mlp_width=37, layers=2, heads=3, drop_path=0.0
)


def on(platform, monkeypatch):
    for module in (products, layers, loss, embedding):
        monkeypatch.setattr(module, "platform", lambda: platform)


def test_sizes_that_are_padded(monkeypatch):
    assert products.aligned(5461) == 5461  # this is a CPU
    on("gpu", monkeypatch)
    sizes = {5461: 5504, 50257: 50304, 1376: 1376, 641: 648, 8191: 8192, 3: 8, 240: 240, 1: 8}
    assert {size: products.aligned(size) for size in sizes} == sizes
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        # 5462 and 50260 may be split over two or four devices; 5461 cannot be.
        assert [products.aligned(n) for n in (5461, 5462, 50260)] == [5504, 5462, 50260]


@pytest.mark.parametrize("shape", [(5, 7, 11), (4, 16, 13), (3, 9, 24)])
def test_a_padded_product_is_the_product(monkeypatch, shape):
    n, k, m = shape
    rng = np.random.default_rng(0)
    a, b, dy = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, n, k), (2, k, m), (2, n, m))
    )

    def both(a, b, dy):
        y, back = jax.vjp(products.product, a, b)
        return y, back(dy), products.gradients(a, b, dy)

    on("gpu", monkeypatch)
    text = jax.jit(both).lower(a, b, dy).as_text()
    assert "stablehlo.pad" in text
    found = jax.jit(both)(a, b, dy)
    right = a @ b, (dy @ b.mT, a.mT @ dy), (dy @ b.mT, a.mT @ dy)
    # Sums of at most 24 products of about 1, in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, right)


def products_in(text):
    """The shapes of the factors and of the result of every product in a lowered program."""
    types = re.findall(
        r"stablehlo\.dot_general .* : \((.*?), (.*?)\) -> (.*?) loc|"
        r"stablehlo\.dot_general .* : \((.*?), (.*?)\) -> (.*)",
        text,
    )
    for found in types:
        names = [name for name in found if name]
        yield [[int(n) for n in re.findall(r"(\d+)x", name)] for name in names]


def graded(name):
    rng = np.random.default_rng(1)
    if name == "vit":
        images = rng.standard_normal((8, 9, 9, 3)).astype(np.float32)
        params = vit.init(VIT, jax.random.key(0))
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(vit.forward(VIT, p, images)))), params
    config = MODELS[name]
    tokens = rng.integers(0, config.vocab_size, (2, 9), np.int32)
    params = families.of(config).init(config, jax.random.key(0))
    forward = families.Forward(config)
    return jax.value_and_grad(lambda p: step.loss(forward, p, tokens)), params


@pytest.mark.parametrize("name", [*MODELS, "vit"])
def test_a_model_on_a_gpu_has_aligned_products_and_the_same_gradients(monkeypatch, name):
    function, params = graded(name)
    found, text = {}, {}
    for platform in ("cpu", "gpu"):
        on(platform, monkeypatch)
        function, params = graded(name)
        text[platform] = jax.jit(function).lower(params).as_text()
        found[platform] = jax.jit(function)(params)
    shapes = {p: list(products_in(t)) for p, t in text.items()}
    rows = {p: {shape[-1] for one in shapes[p] for shape in one} for p in shapes}
    assert len(shapes["gpu"]) > 20 and all(size % 8 == 0 for size in rows["gpu"])
    assert any(size % 8 for size in rows["cpu"]) and 'pad"' not in text["cpu"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *found.values()
    )
    assert jax.tree.map(jnp.shape, found["gpu"][1]) == jax.tree.map(jnp.shape, params)


def test_heads_of_any_width_for_cudnn(monkeypatch):
    """cuDNN takes multiples of 8. Here JAX's own attention stands in for it and sees the padded arrays."""
    plain, widths = jax.nn.dot_product_attention, []

    def kernel(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        widths.append(query.shape[-1])
        return plain(query, key, value, **options)

    rng = np.random.default_rng(2)
    shapes = (2, 6, 4, 10), (2, 6, 2, 10), (2, 6, 2, 10)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    right = attention.attention(*arrays, scale=0.3)
    on("gpu", monkeypatch)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    found = attention.attention(*arrays, scale=0.3, implementation="cudnn")
    assert widths == [16] and found.shape == shapes[0]
    np.testing.assert_allclose(found, right, atol=2e-6)
