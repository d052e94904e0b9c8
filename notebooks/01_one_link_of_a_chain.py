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
# Every weight decay of this library is one formula, `u ← u + λ(t) · m(matrix) · ψ(w)`: a rate λ, a multiplier m per
# matrix, and a pull ψ on each weight. This notebook puts four decays into the same `optax.chain`, trains a small
# network in plain JAX with each, prints which parameters decay and how fast, and compares the weights that result.

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

# %% [markdown]
# A network with two hidden matrices. `AXES` describes every parameter once, as `inputs -> outputs`, with one letter
# per dimension. You choose the letters. Only `P`, `C`, `V` and `T` have a meaning: they are sizes that do not grow
# when the model gets wider, here those of the data. So `middle` and `deep` have the role *hidden*, `inward` is an
# *embedding* and `outward` is a *head*.

# %%
AXES = (
    ("inward/kernel", "P -> D"),
    ("middle/kernel", "D -> F"),
    ("deep/kernel", "F -> G"),
    ("outward/kernel", "G -> C"),
    ("bias", "D"),
)


def init(key):
    k = jax.random.split(key, 4)
    return {
        "inward": {"kernel": jax.random.normal(k[0], (16, width)) / 4},
        "bias": jnp.zeros(width),
        "middle": {"kernel": jax.random.normal(k[1], (width, 2 * width)) / np.sqrt(width)},
        "deep": {"kernel": jax.random.normal(k[2], (2 * width, 2 * width)) / np.sqrt(2 * width)},
        "outward": {"kernel": jax.random.normal(k[3], (2 * width, 4)) / np.sqrt(2 * width)},
    }


def predict(params, x):
    x = jnp.tanh(x @ params["inward"]["kernel"] + params["bias"])
    x = jnp.tanh(x @ params["middle"]["kernel"])
    return jnp.tanh(x @ params["deep"]["kernel"]) @ params["outward"]["kernel"]


def draw(key):
    """512 fresh examples: every step sees new ones, so that nothing can be learned by heart."""
    key, noise_key = jax.random.split(key)
    inputs = jax.random.normal(key, (512, 16))
    return inputs, jnp.sin(inputs[:, :4] * inputs[:, 4:8]), jax.random.normal(noise_key, (512, 4))


def error(params, inputs, targets):
    return jnp.mean((predict(params, inputs) - targets) ** 2)


# %% [markdown]
# `decay_table` takes the same arguments as the decay and shows what they mean. With AdamW's coupling, which is the
# default, one step at learning rate η shrinks a weight by η·λ. Here λ = 0.3, and only hidden matrices decay.

# %%
params = init(jax.random.key(0))
eta, weight_decay = 3e-3, 0.3
table = optax_decay.decay_table(params, weight_decay, mask="hidden", axes=AXES, learning_rate=eta)
print(table)

# %%
shared = {"mask": "hidden", "axes": AXES}
decays = {
    "none": optax.identity(),
    "l2 (AdamW)": optax_decay.decay(weight_decay, **shared),
    "Huber (AdamHD)": optax_decay.huber_decay(weight_decay, metrics=True, **shared),
    "Huber × spectral × cautious": optax_decay.huber_decay(
        weight_decay,
        multiplier=optax_decay.multipliers.spectral_alpha(refresh=optax_decay.spectra.every(100)),
        cautious=True,
        **shared,
    ),
}

# A link cannot see its neighbours. `probe` measures the whole chain, and raises unless it does what the table says.
l2 = optax.chain(optax.scale_by_adam(), decays["l2 (AdamW)"], optax.scale_by_learning_rate(eta))
optax_decay.probe(l2, params, axes=AXES, expected=table)


def train(decay):
    rate = optax.cosine_decay_schedule(eta, steps)
    tx = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))

    def step(carry, key):
        params, state = carry
        inputs, targets, noise = draw(key)
        grads = jax.grad(error)(params, inputs, targets + 0.3 * noise)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), error(params, inputs, targets)

    keys = jax.random.split(jax.random.key(1), steps)
    (trained, state), errors = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (params, tx.init(params))
    )
    return trained, state, errors


results = {name: train(decay) for name, decay in decays.items()}

for name, (_, _, errors) in results.items():
    print(f"{name:28s} mean squared error of the last tenth: {errors[-steps // 10 :].mean():.4f}")

# %% [markdown]
# ## What each leaves behind
# Left: the error. Every step sees fresh examples, so there is nothing to overfit, and no decay improves on the error
# without decay here (one seed). Right: the weights of the middle matrix, sorted by size. These do change. l2 pulls
# every weight in proportion to its size, so the largest ones shrink most. The Huber pull is bounded at 1.5 times the
# mean size: it leaves the largest weights nearly as large as they are without decay and shrinks those in the middle.
# Spectral multipliers make one of the two hidden matrices decay more than the other.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, (trained, _, errors)), style in zip(results.items(), ["-", "--", "-.", ":"]):
    smooth = np.convolve(errors, np.ones(steps // 30) / (steps // 30), "valid")
    left.plot(np.arange(smooth.size) + steps // 30, smooth, style, label=name)
    sizes = np.sort(np.abs(np.asarray(trained["middle"]["kernel"]).ravel()))[::-1]
    right.plot(np.arange(1, sizes.size + 1), sizes, style, label=name)
left.set(xlabel="step", ylabel="mean squared error, running mean")
right.set(xlabel="rank of the weight", ylabel="|weight|", xscale="log")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Numbers from the state
# A decay built with `metrics=True` keeps in its state what it did in the last step, and multipliers keep what they
# measured. `optax_decay.metrics` finds both in the state of any chain.

# %%
for name in ("Huber (AdamHD)", "Huber × spectral × cautious"):
    print(name)
    for key, value in optax_decay.metrics(results[name][1]).items():
        print(f"  {key:40s} {value:.4g}")
