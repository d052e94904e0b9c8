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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# Every weight decay of this library is one formula, `u ← u + λ(t) · m(matrix) · ψ(w)`: a rate λ, a multiplier m per
# matrix, and a pull ψ on each weight. This notebook puts four decays into the same `optax.chain`, trains a small
# network in plain JAX with each, prints which parameters decay and how fast, and compares the weights that result.

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
steps, seeds = 1500, 3
width = 96

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_decay

# %% [markdown]
# A network with four hidden layers, whose matrices are stacked into one array. `AXES` describes every parameter
# once, as `batch | inputs -> outputs`, with one name per dimension. `L` counts layers; `D` and `E` are widths. A
# number is a size of the data, which does not grow when the model gets wider. So the four `hidden` matrices have
# the role *hidden*, `inward` is an *embedding* and `outward` is a *head*.

# %%
AXES = (
    ("inward/kernel", "16 -> D"),
    ("hidden/kernel", "L | D -> E"),
    ("outward/kernel", "E -> 4"),
    ("bias", "D"),
)


def init(key):
    k = jax.random.split(key, 3)
    return {
        "inward": {"kernel": jax.random.normal(k[0], (16, width)) / 4},
        "bias": jnp.zeros(width),
        "hidden": {"kernel": jax.random.normal(k[1], (4, width, width)) / np.sqrt(width)},
        "outward": {"kernel": jax.random.normal(k[2], (width, 4)) / np.sqrt(width)},
    }


def predict(params, x):
    x = jnp.tanh(x @ params["inward"]["kernel"] + params["bias"])
    for kernel in params["hidden"]["kernel"]:
        x = x + jnp.tanh(x @ kernel)
    return x @ params["outward"]["kernel"]


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
params = jax.eval_shape(init, jax.random.key(0))  # shapes are enough for a table
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
    """Weights, optimizer state and error of every step, for each seed."""
    rate = optax.cosine_decay_schedule(eta, steps)
    tx = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))

    def step(carry, key):
        params, state = carry
        inputs, targets, noise = draw(key)
        grads = jax.grad(error)(params, inputs, targets + 0.3 * noise)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), error(params, inputs, targets)

    @jax.jit
    def run(seed):
        params = init(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(1000 + seed), steps)
        (params, state), errors = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, state, errors

    return [run(seed) for seed in range(seeds)]


results = {name: train(decay) for name, decay in decays.items()}

print("mean squared error of the last tenth: mean over the seeds (lowest to highest)")
for name, runs in results.items():
    last = [float(errors[-steps // 10 :].mean()) for _, _, errors in runs]
    print(f"{name:28s} {np.mean(last):.4f} ({min(last):.4f} to {max(last):.4f})")

# %% [markdown]
# ## What each leaves behind
# Left: the error of the first seed; the numbers above are of three seeds. Every step sees fresh examples, so there
# is nothing to overfit: l2 and Huber decay gain nothing here, and l2 costs a few per cent. The last arm ends a few
# per cent *below* the run without decay. With one λ for all and three seeds this is a hint, not a comparison:
# RESULTS.md says how methods are compared, and finds no such difference for language models.
#
# Right: the weights of the four hidden matrices, sorted by size. These do change. l2 pulls every weight in
# proportion to its size, so the largest ones shrink most. The Huber pull is bounded at 1.5 times the mean size: it
# leaves the largest weights about as large as they are without decay, and shrinks those in the middle. With
# spectral multipliers the layers decay at different rates.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, runs), style in zip(results.items(), ["-", "--", "-.", ":"]):
    trained, _, errors = runs[0]
    smooth = np.convolve(errors, np.ones(steps // 30) / (steps // 30), "valid")
    left.plot(np.arange(smooth.size) + steps // 30, smooth, style, label=name)
    sizes = np.sort(np.abs(np.asarray(trained["hidden"]["kernel"]).ravel()))[::-1]
    right.plot(np.arange(1, sizes.size + 1), sizes, style, label=name)
left.set(xlabel="step", ylabel="mean squared error, running mean", yscale="log")
right.set(xlabel="rank of the weight", ylabel="|weight|", xscale="log")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Numbers from the state
# A decay built with `metrics=True` keeps in its state what it did in the last step, and multipliers keep what they
# measured. `optax_decay.metrics` finds both in the state of any chain. *beyond* is the share of weights at which the
# Huber pull is bounded. *score* is the tail exponent of a layer's spectrum: the layer with the largest one (the
# lightest tail) decays at 3 times λ, and the layer with the smallest one at 2/3 of λ.

# %%
wanted = {
    "Huber (AdamHD)": ("rate", "beyond"),
    "Huber × spectral × cautious": ("score", "multiplier"),
}
for name, kinds in wanted.items():
    print(name)
    for key, value in optax_decay.metrics(results[name][0][1]).items():
        if key.split("/")[0] in kinds:
            print(f"  {key:40s} {value:.4g}")
