# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # In your own code: plain JAX, Flax NNX, Flax Linen, Equinox
#
# The library is one link of an `optax.chain` and knows no framework. What it asks of you is one thing: a tree of
# arrays, and, if roles or spectra matter, one line per kind of parameter that says what its axes mean. Paths are the
# keys of the tree joined by `/`; a trailing `/value` is ignored, so that NNX states work as they are.

# %% tags=["setup"]
# Finds the checkout, and installs what is missing. In Colab, first: !git clone REPOSITORY optax_decay
# On a TPU machine, first: !pip install 'optax_decay[train,tpu] @ file:///PATH/OF/CHECKOUT'
import importlib.util
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
places = (here, *here.parents, here / "optax_decay")
root = next((p for p in places if (p / "optax_decay" / "__init__.py").is_file()), None)
if root is None:
    raise FileNotFoundError(f"There is no checkout in {here}, above it, or in {places[-1]}.")
needed = ("optax", "flax", "orbax", "tyro", "tokenizers", "rich", "matplotlib")
if "google.colab" in sys.modules or not all(map(importlib.util.find_spec, needed)):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{root}[train]"], check=True)
sys.path.insert(0, str(root))

# %% tags=["parameters"]
steps, width = 200, 64

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay

rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
y = jnp.sin(x[:, :2] * x[:, 2:4])
eta = 3e-3


def chain(axes):
    """Adam with Huber decay on matrices between hidden layers, twice as strong where the spectrum asks for it."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        optax_decay.huber_decay(
            0.1,
            multiplier=optax_decay.spectral_alpha(refresh_every=50, min_eigenvalues=8),
            mask=("hidden", "head"),
            axes=axes,
        ),
        optax.scale_by_learning_rate(eta),
    )


def squares(prediction):
    return jnp.mean((prediction - y) ** 2)


def show(name, before, after, params, axes):
    print(f"{name}: {before:.3f} -> {after:.3f}")
    print(
        optax_decay.decay_table(params, 0.1, mask=("hidden", "head"), axes=axes, learning_rate=eta),
        "\n",
    )


# %% [markdown]
# ## Plain JAX
# `P` and `C` are the data's sizes, which do not grow with the model; `D` and `F` are widths. A matrix between two
# widths is hidden, one from a width to a fixed size is a head, the rest is vector-like.

# %%
AXES = (("in/w", "P -> D"), ("mid/w", "D -> F"), ("out/w", "F -> C"), (".*/b", "D"))


def plain_init(key):
    k = jax.random.split(key, 3)
    return {
        "in": {"w": jax.random.normal(k[0], (8, width)) / 8**0.5, "b": jnp.zeros(width)},
        "mid": {"w": jax.random.normal(k[1], (width, 2 * width)) / width**0.5},
        "out": {"w": jax.random.normal(k[2], (2 * width, 2)) / (2 * width) ** 0.5},
    }


def plain_predict(p):
    h = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"])
    return jnp.tanh(h @ p["mid"]["w"]) @ p["out"]["w"]


def train(predict, params, axes):
    """Any tree of arrays: returns the trained tree and the first and last loss."""
    tx = chain(axes)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: squares(predict(p)))(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps), donate_argnums=0
    )(jax.tree.map(jnp.copy, params))
    return params, values[0], values[-1]


params, before, after = train(plain_predict, plain_init(jax.random.key(0)), AXES)
show("plain JAX", before, after, params, AXES)

# %% [markdown]
# ## Flax NNX
# Split the module once; the state's pure dictionary is the tree, and `nnx.merge` takes it back in the loss.

# %%
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inward = nnx.Linear(8, width, rngs=rngs)
        self.middle = nnx.Linear(width, 2 * width, rngs=rngs)
        self.outward = nnx.Linear(2 * width, 2, rngs=rngs)

    def __call__(self, x):
        return self.outward(jnp.tanh(self.middle(jnp.tanh(self.inward(x)))))


NNX_AXES = (
    ("inward/kernel", "P -> D"),
    ("middle/kernel", "D -> F"),
    ("outward/kernel", "F -> C"),
    (".*/bias", "D"),
)
graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
params, before, after = train(lambda p: nnx.merge(graph, p)(x), nnx.to_pure_dict(state), NNX_AXES)
show("Flax NNX", before, after, params, NNX_AXES)

# %% [markdown]
# ## Flax Linen
# The variables' `params` are the tree as they come.

# %%
import flax.linen as linen


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(width, name="inward")(x))
        x = jnp.tanh(linen.Dense(2 * width, name="middle")(x))
        return linen.Dense(2, name="outward")(x)


net = LinenNet()
variables = net.init(jax.random.key(0), x)
params, before, after = train(lambda p: net.apply({"params": p}, x), variables["params"], NNX_AXES)
show("Flax Linen", before, after, params, NNX_AXES)

# %% [markdown]
# ## Equinox
# Modules are trees. `eqx.partition` keeps the arrays; where something is not trained there is `None`, which every
# transformation passes by. Its paths are numbers of layers and its kernels have outputs first, so here a tree of
# optax's `MuonDimensionNumbers` describes them (inputs, outputs). Such numbers know no widths: every matrix counts
# as hidden.

# %%
try:
    import equinox as eqx
except ImportError:
    print("Equinox is not installed: pip install equinox")
else:
    key = jax.random.split(jax.random.key(0), 3)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Linear(8, width, key=key[0]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(width, 2 * width, key=key[1]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(2 * width, 2, key=key[2]),
        ]
    )
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    numbers = jax.tree.map(
        lambda a: optax.contrib.MuonDimensionNumbers((1,), (0,)) if a.ndim == 2 else None, arrays
    )
    arrays, before, after = train(lambda p: jax.vmap(eqx.combine(p, static))(x), arrays, numbers)
    show("Equinox", before, after, arrays, numbers)
