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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# A decay of this library is one link of an `optax.chain` and depends on no neural-network framework. It needs a tree
# of arrays. If a decay uses roles or spectra, it also needs one line per kind of parameter that describes the axes.
# The path of a parameter consists of its keys in the tree, joined by `/`. A trailing `/value` is ignored, so NNX
# states work too.

# %% tags=["setup"]
# Finds the library, and installs what is missing. In a checkout there is nothing to do. Elsewhere, as in Colab, either
# upload the two wheels that `pip wheel --no-deps . ./train` makes in a checkout, or write its git address here:
REPOSITORY = ""
import importlib.util
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
places = (here, *here.parents, here / "optax_decay")
root = next((p for p in places if (p / "optax_decay" / "__init__.py").is_file()), None)
needed = ("optax", "flax", "orbax", "tyro", "tokenizers", "rich", "matplotlib")
install = []
if root is not None:
    sys.path.insert(0, str(root))
    if not all(map(importlib.util.find_spec, needed)):
        install = [str(root), str(root / "train")]
elif not importlib.util.find_spec("optax_decay"):
    install = [str(wheel) for wheel in here.glob("optax_decay*.whl")]
    if not install and REPOSITORY:
        install = [f"git+{REPOSITORY}", f"git+{REPOSITORY}#subdirectory=train"]
    if not install:
        raise FileNotFoundError(
            f"There is no checkout in {here}, above it, or in {places[-1]}, no wheel optax_decay*.whl in {here},"
            " and REPOSITORY, in this cell, is empty. One of the three is needed."
        )
if install:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *install], check=True)

# %% tags=["parameters"]
steps, width = 400, 64

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from optax_decay import spectra

rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
y = jnp.sin(x[:, :2] * x[:, 2:4])
eta = 3e-3


def chain(axes):
    """Adam with Huber decay of matrices, stronger where the spectrum has a light tail."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        optax_decay.huber_decay(
            0.1,
            multiplier=optax_decay.multipliers.spectral_alpha(refresh=spectra.every(50)),
            mask=("hidden", "head"),
            axes=axes,
        ),
        optax.scale_by_learning_rate(eta),
    )


def squares(prediction):
    return jnp.mean((prediction - y) ** 2)


def train(predict, params, axes):
    """Trains any tree of arrays; returns it with the optimizer state and the first and last loss."""
    tx = chain(axes)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: squares(predict(p)))(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), values = jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps), donate_argnums=0
    )(jax.tree.map(jnp.copy, params))
    return params, state, values[0], values[-1]


def show(name, predict, params, axes):
    """Trains, then prints the losses, what decays, and the multipliers that the spectra gave."""
    params, state, before, after = train(predict, params, axes)
    print(f"{name}: loss {before:.3f} -> {after:.3f}")
    mask = ("hidden", "head")
    print(optax_decay.decay_table(params, 0.1, mask=mask, axes=axes, learning_rate=eta))
    for key, value in optax_decay.metrics(state).items():
        if key.startswith("multiplier/"):
            print(f"{key}: {value:.3f}")


# %% [markdown]
# ## Plain JAX
# Numbers are sizes of the data, which do not grow with the model; letters are widths. A matrix from width to width has
# the role *hidden*, from a fixed size to a width it is an *embedding*, and from a width to a fixed size it is a *head*.
# The multipliers compare the spectra of hidden matrices with each other. This network has two of one shape: between
# other shapes a part of the difference would come from the shape. The matrix with the heavier tail, which AlphaDecay
# takes as a sign of structure that was learned, decays at 2/3 of λ, and the other one at 3 times λ. Matrices with fewer
# than 50 eigenvalues are not measured.

# %%
AXES = (
    ("in/w", "8 -> D"),
    ("mid/w", "D -> E"),
    ("deep/w", "E -> F"),
    ("out/w", "F -> 2"),
    (".*/b", "D"),
)


def plain_init(key):
    k = jax.random.split(key, 4)
    return {
        "in": {"w": jax.random.normal(k[0], (8, width)) / 8**0.5, "b": jnp.zeros(width)},
        "mid": {"w": jax.random.normal(k[1], (width, width)) / width**0.5},
        "deep": {"w": jax.random.normal(k[2], (width, width)) / width**0.5},
        "out": {"w": jax.random.normal(k[3], (width, 2)) / width**0.5},
    }


def plain_predict(p):
    h = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"])
    h = jnp.tanh(h @ p["mid"]["w"])
    return jnp.tanh(h @ p["deep"]["w"]) @ p["out"]["w"]


show("plain JAX", plain_predict, plain_init(jax.random.key(0)), AXES)

# %% [markdown]
# ## Flax NNX
# Split the module once. The pure dictionary of its state is the tree, and `nnx.merge` makes a module of it in the loss.

# %%
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inward = nnx.Linear(8, width, rngs=rngs)
        self.middle = nnx.Linear(width, width, rngs=rngs)
        self.deep = nnx.Linear(width, width, rngs=rngs)
        self.outward = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.middle(jnp.tanh(self.inward(x))))
        return self.outward(jnp.tanh(self.deep(x)))


NNX_AXES = (
    ("inward/kernel", "8 -> D"),
    ("middle/kernel", "D -> E"),
    ("deep/kernel", "E -> F"),
    ("outward/kernel", "F -> 2"),
    (".*/bias", "D"),
)
graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
show("Flax NNX", lambda p: nnx.merge(graph, p)(x), nnx.to_pure_dict(state), NNX_AXES)

# %% [markdown]
# ## Flax Linen
# The `params` of the variables are the tree.

# %%
import flax.linen as linen


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(width, name="inward")(x))
        x = jnp.tanh(linen.Dense(width, name="middle")(x))
        x = jnp.tanh(linen.Dense(width, name="deep")(x))
        return linen.Dense(2, name="outward")(x)


net = LinenNet()
variables = net.init(jax.random.key(0), x)
show("Flax Linen", lambda p: net.apply({"params": p}, x), variables["params"], NNX_AXES)

# %% [markdown]
# ## Equinox
# Modules are trees. `eqx.partition` keeps the arrays and puts `None` where something is not trained; every
# transformation ignores `None`. Paths contain the numbers of the layers, and kernels have their outputs first, so here
# a tree of optax's `MuonDimensionNumbers` (input axes, output axes) is the simplest description. It does not say which
# sizes are widths, so every matrix counts as hidden.

# %%
try:
    import equinox as eqx
except ImportError:
    print("Equinox is not installed: pip install equinox")
else:
    key = jax.random.split(jax.random.key(0), 4)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Linear(8, width, key=key[0]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(width, width, key=key[1]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(width, width, key=key[2]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(width, 2, key=key[3]),
        ]
    )
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    numbers = jax.tree.map(
        lambda a: optax.contrib.MuonDimensionNumbers((1,), (0,)) if a.ndim == 2 else None, arrays
    )
    show("Equinox", lambda p: jax.vmap(eqx.combine(p, static))(x), arrays, numbers)
