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
# # One link of a chain
#
# Weight decay as one formula, `u ← u + λ(t) · m(matrix) · ψ(w)`: a rate, a multiplier per matrix, a pull per weight.
# This notebook puts four decays into the same `optax.chain` on a small regression problem with plain JAX, prints what
# decays and how fast, and draws what each decay leaves behind.

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
steps = 1500
width = 96

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_decay
from optax_decay.product import diagnostics

# %% [markdown]
# A two-layer network. `AXES` says once what every axis is: inputs `->` outputs, with letters of your own.
# (`P` and `C` are sizes that do not grow with the model: the data's.)

# %%
AXES = (
    ("inward/kernel", "P -> D"),
    ("middle/kernel", "D -> F"),
    ("outward/kernel", "F -> C"),
    ("bias", "D"),
)


def init(key):
    k = jax.random.split(key, 3)
    return {
        "inward": {"kernel": jax.random.normal(k[0], (16, width)) / 4},
        "bias": jnp.zeros(width),
        "middle": {"kernel": jax.random.normal(k[1], (width, 2 * width)) / np.sqrt(width)},
        "outward": {"kernel": jax.random.normal(k[2], (2 * width, 4)) / np.sqrt(2 * width)},
    }


def predict(params, x):
    x = jnp.tanh(x @ params["inward"]["kernel"] + params["bias"])
    return jnp.tanh(x @ params["middle"]["kernel"]) @ params["outward"]["kernel"]


rng = np.random.default_rng(0)
inputs = jnp.asarray(rng.standard_normal((512, 16)), jnp.float32)
targets = jnp.sin(inputs[:, :4] * inputs[:, 4:8]) + 0.3 * rng.standard_normal((512, 4))

# %% [markdown]
# The table of what decays is computed from the same arguments as the decay itself. λ = 0.3 with AdamW's coupling means:
# one step shrinks a weight by η·λ.

# %%
params = init(jax.random.key(0))
eta, weight_decay = 3e-3, 0.3
print(optax_decay.decay_table(params, weight_decay, mask="hidden", axes=AXES, learning_rate=eta))

# %%
shared = {"mask": "hidden", "axes": AXES}
decays = {
    "none": optax.identity(),
    "l2 (AdamW)": optax_decay.decay(weight_decay, **shared),
    "Huber (AdamHD)": optax_decay.huber_decay(weight_decay, "mean", metrics=True, **shared),
    "Huber × spectral × cautious": optax_decay.huber_decay(
        weight_decay,
        "mean",
        multiplier=optax_decay.spectral_alpha(
            refresh_every=100, select=lambda name, signature: True
        ),
        cautious=True,
        **shared,
    ),
}


def train(decay):
    rate = optax.cosine_decay_schedule(eta, steps)
    tx = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, inputs) - targets) ** 2))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params_, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(
        (params, tx.init(params))
    )
    return params_, state, losses


results = {name: train(decay) for name, decay in decays.items()}

# %% [markdown]
# ## What each leaves behind
# Left: the loss. Right: the weights of the middle matrix, sorted by size. l2 shrinks all weights by the same factor;
# the Huber pull is bounded, so that large weights feel less of it.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, (trained, _, losses)), style in zip(results.items(), ["-", "--", "-.", ":"]):
    left.plot(losses, style, label=name)
    sizes = np.sort(np.abs(np.asarray(trained["middle"]["kernel"]).ravel()))[::-1]
    right.plot(np.arange(1, sizes.size + 1), sizes, style, label=name)
left.set(xlabel="step", ylabel="mean squared error", yscale="log")
right.set(xlabel="rank of the weight", ylabel="|weight|", xscale="log")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Numbers from the state
# A decay built with `metrics=True` keeps what it did in its last step; multipliers keep what they measured.
# `diagnostics.metrics` finds both in any chain.

# %%
for name in ("Huber (AdamHD)", "Huber × spectral × cautious"):
    print(name)
    for key, value in diagnostics.metrics(results[name][1]).items():
        print(f"  {key:40s} {value:.4g}")
