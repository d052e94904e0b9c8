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
# # What decay does to the weights
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# This notebook trains the same small LLaMA with four decays: none, l2 (AdamW), Huber (AdamHD) and AlphaDecay. Text,
# learning rate and λ are the same. During training it records the tail exponent alpha of every matrix, and at the end
# it compares the sizes of the weights and their spectra. The text is the source of Python's standard library, so
# nothing has to be downloaded.

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
steps, looks = 400, 8
width, layers = 96, 3
length, batch_size = 64, 16

# %%
import functools
import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_decay
from models import llama
from optax_decay import spectra

library = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = np.concatenate([np.fromfile(path, np.uint8) for path in library])  # one byte per token
training_text, held_out_text = np.split(text, [len(text) * 9 // 10])


def batches(source, number):
    """Random pieces of a text: int32 [number, batch_size, length + 1]."""
    size = (number, batch_size)
    starts = np.random.default_rng(0).integers(len(source) - length - 1, size=size)
    return jnp.asarray(source[starts[..., None] + np.arange(length + 1)], jnp.int32)


model = llama.Config(vocab_size=256, width=width, mlp_width=2 * width, layers=layers, heads=4)
axes = llama.axes(model)
params = llama.init(model, jax.random.key(0))
described = optax_decay.axes.signatures(axes, params)
hidden = [path for path, signature in described.items() if signature.role == "hidden"]


def loss(params, tokens):
    """Mean cross-entropy of every next byte, in nats."""
    logits = llama.forward(model, params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# %% [markdown]
# ## Four links, one λ
# Each decay takes the same place in the same chain. AlphaDecay measures all matrices every `steps/looks` steps and maps
# their exponents linearly to multipliers between 2/3 and 3: matrices with a heavy tail (a small alpha) decay less.

# %%
eta = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps, 4e-4)
weight_decay, shared = 0.5, {"mask": ("hidden", "head"), "axes": axes}
every = steps // looks
links = {
    "none": optax.identity(),
    "l2 (AdamW)": optax_decay.decay(weight_decay, **shared),
    "Huber (AdamHD)": optax_decay.huber_decay(weight_decay, **shared),
    "AlphaDecay": optax_decay.spectral_alpha_decay(
        weight_decay,
        refresh=spectra.all_at_once(every),
        select=spectra.hidden_matrices(min_eigenvalues=8),
        **shared,
    ),
}


def matrices(params, path):
    """One parameter as float64 matrices [layers, inputs, outputs]."""
    leaf = functools.reduce(lambda tree, key: tree[key], path.split("/"), params)
    return np.asarray(optax_decay.axes.as_matrix(leaf, described[path]), np.float64)


def eigenvalues(params, path):
    """Eigenvalues of W Wᵀ, the largest first, [layers, N]."""
    return np.linalg.svd(matrices(params, path), compute_uv=False) ** 2


def exponents(params):
    """Hill exponent of the upper half of the spectrum of every hidden matrix, [layers] each."""
    found = {}
    for path in hidden:
        values = eigenvalues(params, path)
        tail = values[:, : -(-values.shape[1] // 2)]
        found[path] = 1 + 1 / np.mean(np.log(tail / tail[:, -1:]), axis=1)
    return found


def train(link):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        link,
        optax.scale_by_learning_rate(eta),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    weights = jax.tree.map(jnp.copy, params)
    state, losses, alphas = tx.init(weights), [], []
    tokens = batches(training_text, steps)
    for index in range(steps):
        weights, state, value = step(weights, state, tokens[index])
        losses.append(value)
        if (index + 1) % every == 0:
            alphas.append(exponents(weights))
    return weights, np.asarray(losses), alphas


results = {name: train(link) for name, link in links.items()}
held_out = batches(held_out_text, 8)
measure = jax.jit(loss)
for name, (weights, _, _) in results.items():
    held = np.mean([measure(weights, tokens) for tokens in held_out])
    print(f"{name:16s} held-out loss {held:.4f} nats/byte")
print("One seed: differences below about 0.03 are noise.")

# %% [markdown]
# ## Weights
# Left: the share of weights of each size, over all hidden matrices. Decay makes large weights rarer. The Huber pull is
# bounded at 1.5 times the mean size, so it leaves more of the largest weights than l2 does. Right: the training loss.

# %%
styles = {name: style for name, style in zip(links, ["-", "--", "-.", ":"])}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
edges = np.linspace(0, 0.3, 61)
for name, (weights, losses, _) in results.items():
    sizes = np.concatenate([np.abs(matrices(weights, path)).ravel() for path in hidden])
    share, _ = np.histogram(sizes, edges)
    left.step(edges[:-1], share / sizes.size, styles[name], where="post", label=name)
    smooth = np.convolve(losses, np.ones(max(1, steps // 20)) / max(1, steps // 20), "valid")
    right.plot(np.arange(smooth.size) + steps - smooth.size, smooth, styles[name], label=name)
left.set(xlabel="|weight|", ylabel="share of the weights", yscale="log")
right.set(xlabel="step", ylabel="training loss [nats per byte], running mean")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Spectra
# The eigenvalues of `W Wᵀ` of two matrices, divided by their median. Alpha is fitted to the upper half.

# %%
figure, axs = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, part in zip(axs, ("query", "down")):
    path = next(p for p in hidden if part in p)
    for name, (weights, _, _) in results.items():
        values = eigenvalues(weights, path)[-1]
        axis.plot(
            np.arange(1, values.size + 1), values / np.median(values), styles[name], label=name
        )
    axis.set(xlabel="rank", ylabel="eigenvalue / median", yscale="log", title=f"{path}, last layer")
axs[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Alpha during training
# Each line is one kind of matrix, averaged over the layers. AlphaDecay decays matrices with a large exponent more,
# which pushes large exponents down more than small ones.

# %%
figure, axs = plt.subplots(1, len(links), figsize=(12, 3.4), layout="constrained", sharey=True)
marks = ["o", "s", "^", "v", "D", "P", "X"]
for axis, (name, (_, _, alphas)) in zip(axs, results.items()):
    for path, mark in zip(hidden, marks):
        line = [np.mean(found[path]) for found in alphas]
        axis.plot(
            every * np.arange(1, len(line) + 1),
            line,
            "-",
            marker=mark,
            markersize=4,
            label="/".join(path.split("/")[1:-1]),
        )
    axis.set(xlabel="step", title=name)
axs[0].set(ylabel="tail exponent alpha")
axs[-1].legend(frameon=False, fontsize=7)
plt.show()
for name, (_, _, alphas) in results.items():
    last = np.concatenate([np.ravel(value) for value in alphas[-1].values()])
    print(f"{name:16s} alpha: mean {last.mean():.2f}, spread over matrices {last.std():.2f}")
