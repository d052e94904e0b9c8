"""The vision transformer: sizes as published, the exact function, stochastic depth, AXES."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import vit
from optax_decay.parameters import axes
from tests.references import vit as reference_vit

TOY = dataclasses.replace(
    vit.PRESETS["vit-toy"], norm_eps=0.02, init_std=0.2, base_width=18, drop_path=0.6
)


@pytest.fixture(scope="module")
def params():
    """Random weights, scales and biases included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), jnp.float32),
        jax.jit(lambda: vit.init(TOY, jax.random.key(0)))(),
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=(5, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "weights"),
    # As released (arXiv 2012.12877, table 1: 5M, 22M, 86M).
    [("deit-tiny", 5_717_416), ("deit-small", 22_050_664), ("deit-base", 86_567_656)],
)
def test_presets_have_the_papers_number_of_weights(name, weights):
    assert vit.count(vit.PRESETS[name]) == weights


def test_forward_is_the_reference(params, images):
    exact = reference_vit.forward(TOY, params, images)
    logits = jax.jit(lambda p, x: vit.forward(TOY, p, x))(params, images)
    assert logits.dtype == jnp.float32 and logits.shape == (5, 7)
    # Logits of order 1 after some 20 sums of up to 48 products: sqrt(20 * 48) roundings, five sigma.
    scale = np.abs(exact).max()
    assert scale > 0.5
    np.testing.assert_allclose(logits, exact, rtol=0, atol=5 * np.sqrt(960) * 2.0**-24 * scale)
    small = dataclasses.replace(TOY, dtype="bfloat16")
    low = jax.jit(lambda p, x: vit.forward(small, p, x))(params, images)
    assert low.dtype == jnp.float32
    error = np.abs(np.asarray(low) - exact).max()
    assert 2.0**-16 * scale < error < 5 * np.sqrt(960) * 2.0**-9 * scale


def test_patches_are_read_row_by_row(images):
    found = np.asarray(vit.patches(images, 4))
    assert found.shape == (5, 9, 48)
    np.testing.assert_array_equal(found[3, 5], images[3, 4:8, 8:12].ravel())


def test_dropped_paths_are_those_of_the_key(params, images):
    key = jax.random.key(7)
    kept = np.asarray(vit.kept_paths(TOY, 5, key))
    exact = reference_vit.forward(TOY, params, images, kept)
    logits, plain = jax.jit(
        lambda p, x, key: (vit.forward(TOY, p, x, key=key), vit.forward(TOY, p, x))
    )(params, images, key)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(logits, exact, rtol=0, atol=5 * np.sqrt(960) * 2.0**-24 * scale)
    assert np.abs(logits - plain).max() > 0.01 * scale


def test_stochastic_depth_keeps_the_mean():
    kept = np.asarray(vit.kept_paths(TOY, 4000, jax.random.key(1)))
    chances = np.array([0, 0.3, 0.6])
    for layer, chance in enumerate(chances):
        values = [0, 1 / (1 - chance)] if chance else [1]
        np.testing.assert_allclose(np.unique(kept[layer]), values, rtol=1e-6)
        # Standard errors of a share of 8000 draws, five of them.
        error = 5 * np.sqrt(chance * (1 - chance) / 8000)
        assert abs((kept[layer] == 0).mean() - chance) <= error
    assert not np.array_equal(kept[2, 0], kept[2, 1])
    np.testing.assert_array_equal(vit.kept_paths(TOY, 3, None), 1)


def test_gradients_reach_every_weight(params, images):
    def loss(p):
        return -jnp.mean(jax.nn.log_softmax(vit.forward(TOY, p, images))[:, 2])

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        # The softmax of attention does not see a bias of the keys.
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            assert float(jnp.abs(leaf).max()) > 0, path


def test_axes_describe_every_weight():
    described = axes.signatures(
        vit.axes(TOY), jax.eval_shape(lambda: vit.init(TOY, jax.random.key(0)))
    )
    sizes = dict(P=48, D=24, T=10, L=3, H=4, E=6, F=40, C=7)
    roles = {}
    for signature in described.values():
        assert signature.shape == tuple(sizes[name] for name in signature.names)
        roles.setdefault(signature.role, set()).add(signature.path)
    assert roles["embedding"] == {"embed/kernel", "position/embedding"}
    assert roles["head"] == {"head/kernel"}
    assert len(roles["hidden"]) == 6 and len(roles["vector"]) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 15}, "patch_size=15 must divide image_size=224; nearest: patch_size=14"),
        ({"heads": 5}, "heads=5 must divide width=192; nearest: heads=4"),
        ({"drop_path": 1.0}, "drop_path=1.0 must be at least 0 and below 1"),
        ({"classes": 0}, "classes=0 must be at least 1"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit.Config(**change)


def test_images_of_another_size_are_refused(params):
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\) where \[images, 12, 12, 3\]"):
        vit.forward(TOY, params, np.zeros((2, 16, 16, 3), np.float32))
