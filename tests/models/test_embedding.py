"""The gradient of an embedding on GPUs: the sum by token, without a scatter that adds to a row twice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import embedding


def right(V, tokens, dx):
    sums = np.zeros((V, dx.shape[1]))
    np.add.at(sums, tokens, dx.astype(np.float64))
    return sums


@pytest.mark.parametrize(
    ("V", "N"), [(37, 200), (1500, 1), (1500, 128), (1500, 129), (2000, 3000), (1100, 70_000)]
)
@pytest.mark.parametrize("drawn", ["uniform", "zipf", "one", "runs"])
def test_sums_by_token(V, N, drawn):
    rng = np.random.default_rng(N)
    tokens = {
        "uniform": lambda: rng.integers(0, V, N),
        "zipf": lambda: np.minimum(rng.zipf(1.2, N) - 1, V - 1),
        "one": lambda: np.full(N, V - 1),
        "runs": lambda: np.arange(N) // 127 % V,  # tokens that begin and end at the edges of blocks
    }[drawn]().astype(np.int32)
    dx = rng.standard_normal((N, 3)).astype(np.float32)
    found = jax.jit(embedding.gradient, static_argnums=0)(V, tokens, dx)
    # Sums of up to N numbers of size 1 in float32.
    np.testing.assert_allclose(found, right(V, tokens, dx), rtol=1e-5, atol=2e-6 * N**0.5)


def test_the_gradient_of_a_table_on_a_gpu(monkeypatch):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((1300, 5)).astype(np.float32)
    tokens = rng.integers(0, 1300, (3, 4, 50)).astype(np.int32)
    tokens[0, 0, :3] = -1, -1300, 1299  # from the end, as in indexing
    weights = rng.standard_normal((3, 4, 50, 5)).astype(np.float32)
    both = jax.value_and_grad(lambda table: jnp.sum(weights * embedding.rows(table, tokens)))
    plain, text = both(table), {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(embedding, "platform", lambda name=platform: name)
        text[platform] = jax.jit(lambda table: both(table)).lower(table).as_text()
    found = both(table)
    np.testing.assert_allclose(found[1], plain[1], rtol=1e-5, atol=1e-5)
    assert found[0] == plain[0]
    scatters = re.findall(r"stablehlo\.scatter.*?unique_indices = (\w+)", text["gpu"], re.DOTALL)
    assert scatters and set(scatters) == {"true"} and "stablehlo.sort" in text["gpu"]
    assert "unique_indices = false" in text["cpu"] and "stablehlo.sort" not in text["cpu"]
    # Members side by side, each with a table of its own.
    many = jax.vmap(lambda t: both(t)[1])(np.stack([table, 2 * table]))
    np.testing.assert_allclose(many, np.stack([plain[1]] * 2), rtol=1e-5, atol=1e-5)


def test_tokens_outside_of_the_table_are_dropped():
    dx = np.ones((4, 2), np.float32)
    for V in (7, 2000):
        found = embedding.gradient(V, np.array([0, V, V + 3, V]), dx)
        assert np.sum(found) == 2 and found[0, 0] == 1
