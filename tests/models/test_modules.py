"""The models as ordinary Flax modules: called with tokens or images, put into `nnx.Optimizer` and `nnx.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_decay
from models import gpt, llama, vit
from optax_decay import axes

MODELS = [
    (llama, llama.Llama, llama.PRESETS["toy"]),
    (gpt, gpt.GPT, gpt.PRESETS["gpt-toy"]),
    (vit, vit.ViT, vit.PRESETS["vit-toy"]),
]


def some_input(config):
    rng = np.random.default_rng(0)
    if isinstance(config, vit.Config):
        return jnp.asarray(
            rng.normal(size=(2, config.image_size, config.image_size, 3)), jnp.float32
        )
    return jnp.asarray(rng.integers(0, config.vocab_size, (2, 7)), jnp.int32)


@pytest.mark.parametrize(("family", "kind", "config"), MODELS)
def test_a_module_computes_what_the_pure_functions_do_and_trains(family, kind, config):
    batch = some_input(config)
    model = kind(config, nnx.Rngs(jax.random.key(3)))
    params = family.init(config, jax.random.key(3))
    assert max(map(jnp.std, jax.tree.leaves(params))) > 0
    np.testing.assert_array_equal(model(batch), family.forward(config, params, batch))

    # Three lines of a user.
    tx = optax.chain(
        optax.scale_by_adam(), optax_decay.huber_decay(0.1), optax.scale_by_learning_rate(0.01)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(
            lambda model: -jax.nn.log_softmax(model(batch))[..., 0].mean()
        )(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, batch)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    np.testing.assert_allclose(
        model(batch), family.forward(config, trained, batch), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("family", "kind", "config"), MODELS)
def test_the_axes_that_are_found_are_those_of_the_file(family, kind, config):
    model = kind(config, nnx.Rngs(0))
    params = family.init(config, jax.random.key(0))
    written = axes.signatures(family.axes(config), params)
    for found in (axes.infer(model), axes.infer(params)):
        read = axes.signatures(found, params)
        assert {p: s.role for p, s in read.items()} == {p: s.role for p, s in written.items()}
        assert {p: s.matrix_shape for p, s in read.items() if s.is_matrix} == {
            p: s.matrix_shape for p, s in written.items() if s.is_matrix
        }


@pytest.mark.parametrize(
    ("kind", "config", "wrong", "says"),
    [
        (
            llama.Llama,
            llama.PRESETS["toy"],
            jnp.zeros(7, int),
            r"shape \(7,\) where .*tokens\[None\]",
        ),
        (llama.Llama, llama.PRESETS["toy"], jnp.zeros((2, 7)), "dtype float32 where integers"),
        (
            gpt.GPT,
            gpt.PRESETS["gpt-toy"],
            jnp.zeros((1, 600), int),
            "600 tokens is longer than positions=512",
        ),
        (
            vit.ViT,
            vit.PRESETS["vit-toy"],
            jnp.zeros((12, 12, 3)),
            r"\(12, 12, 3\) where \[images, 12, 12, 3\]",
        ),
        (vit.ViT, vit.PRESETS["vit-toy"], jnp.zeros((2, 16, 16, 3)), r"\(2, 16, 16, 3\) where"),
    ],
)
def test_inputs_of_another_shape_are_named(kind, config, wrong, says):
    with pytest.raises(ValueError, match=says):
        kind(config, nnx.Rngs(0))(wrong)
