"""Matrices of odd sides are padded on accelerators, and the results are the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.matrices import orthogonal
from optax_decay.matrices.alignment import MULTIPLE, aligned, with_aligned
from optax_decay.spectral import chebyshev, spectra


def accelerator(monkeypatch):
    """The branch of an accelerator, on this CPU."""
    choose = jax.lax.platform_dependent
    # Other choices by platform stay what they are.
    instead = lambda *x, **by: (
        by["default"](*x) if set(by) == {"cpu", "default"} else choose(*x, **by)
    )
    monkeypatch.setattr(jax.lax, "platform_dependent", instead)


def both(monkeypatch, function, *arguments):
    """Results and lowered programs, on a CPU and as on an accelerator."""
    found = [(jax.jit(function)(*arguments), jax.jit(function).lower(*arguments).as_text())]
    with monkeypatch.context() as patch:
        accelerator(patch)
        again = jax.jit(lambda *x: function(*x))
        found.append((again(*arguments), again.lower(*arguments).as_text()))
    return zip(*found)


def sides(text):
    """The sides of all matrices that are multiplied by a matrix."""
    found = set()
    for factors in re.findall(r"stablehlo\.dot_general .* : \((.*)\) -> ", text):
        shapes = [
            [int(n) for n in re.findall(r"(\d+)x", name) if n != "1"] for name in factors.split(",")
        ]
        if min(map(len, shapes)) > 1:
            found |= {n for shape in shapes for n in shape[-2:]}
    return found


@pytest.mark.parametrize("shape", [(3, 37, 61), (61, 37), (2, 41, 41), (33, 64)])
def test_orthogonal_factors(monkeypatch, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (plain, other), texts = both(monkeypatch, orthogonal.newton_schulz, x)
    np.testing.assert_allclose(other, plain, atol=2e-5)
    assert other.shape == shape
    cpu, accelerated = map(sides, texts)
    assert all(n % MULTIPLE == 0 for n in accelerated) and any(n % MULTIPLE for n in cpu)


@pytest.mark.parametrize("split", [False, True])
def test_halves_of_a_gram_matrix_are_aligned(monkeypatch, split):
    monkeypatch.setattr(orthogonal, "SPLIT", 16 if split else 1000)
    x = np.random.default_rng(0).standard_normal((35, 50)).astype(np.float32)
    (plain, other), (_, text) = both(monkeypatch, orthogonal.newton_schulz, x)
    np.testing.assert_allclose(other, plain, atol=2e-5)
    assert all(n % 8 == 0 for n in sides(text))


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (45, 45)])
def test_spectra(monkeypatch, shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (plain, other), texts = both(monkeypatch, spectra.gram, x)
    np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-4)
    assert all(n % MULTIPLE == 0 for n in sides(texts[1]))

    def exponent(gram):
        return chebyshev.tail_exponent(gram[None], tail=15, product_dtype=jnp.float32)

    (plain, other), texts = both(monkeypatch, exponent, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, other)
    size = min(shape)
    assert size in sides(texts[0]) and size not in sides(texts[1])


def test_aligned_matrices_are_left_alone(monkeypatch):
    x = jnp.ones((16, 32))
    monkeypatch.setattr(jax.lax, "platform_dependent", None)
    assert with_aligned(lambda x: x + 1, x).shape == (16, 32)
    assert [aligned(n) for n in (1, 16, 17, 5461)] == [16, 16, 32, 5472]
