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
# Four decays, side by side, on the same small LLaMA, text, learning rate and λ: none, l2 (AdamW), Huber (AdamHD) and
# AlphaDecay. Through training we follow the tail exponent alpha of every matrix; at the end we look at the sizes of the
# weights and at the spectra. The text is the source of Python's standard library, so nothing is downloaded.

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
steps, looks = 400, 8
width, layers = 96, 3
length, batch_size = 64, 16

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_decay
from models import llama
from optax_decay.parameters.axes import as_matrix, signatures
from optax_decay.spectral import spectra
from train.data import batches as data_lib
from train.step.update import loss

data = data_lib.load_text(
    "stdlib", "bytes", length=length, batch_size=batch_size, seed=0, cache=root / ".cache/data"
)
model = llama.Config(
    vocab_size=data.vocab_size, width=width, mlp_width=2 * width, layers=layers, heads=4
)
axes = llama.axes(model)
forward = functools.partial(llama.forward, model)
params = llama.init(model, jax.random.key(0))
described = signatures(axes, params)
hidden = [path for path, signature in described.items() if signature.role == "hidden"]

# %% [markdown]
# ## Four links, one λ
# Each stands in the same chain. AlphaDecay measures every matrix each `steps/looks` steps and maps the exponents to
# multipliers between 2/3 and 3: matrices with a heavy tail (small alpha) decay less.

# %%
eta = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps, 4e-4)
weight_decay, shared = 0.5, {"mask": ("hidden", "head"), "axes": axes}
every = steps // looks
links = {
    "none": optax.identity(),
    "l2 (AdamW)": optax_decay.decay(weight_decay, **shared),
    "Huber (AdamHD)": optax_decay.huber_decay(weight_decay, "mean", **shared),
    "AlphaDecay": optax_decay.spectral_alpha_decay(
        weight_decay, refresh_every=every, min_eigenvalues=8, schedule="all", **shared
    ),
}


def leaf_at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


@jax.jit
def exponents(params):
    """Tail exponent of every hidden matrix, [layers] each."""
    found = {path: as_matrix(leaf_at(params, path), described[path]) for path in hidden}
    return {path: spectra.measure(w).value for path, w in found.items()}


def train(link):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        link,
        optax.scale_by_learning_rate(eta),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(functools.partial(loss, forward))(params, tokens)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    weights = jax.tree.map(jnp.copy, params)
    state, losses, alphas = tx.init(weights), [], []
    for index in range(steps):
        weights, state, value = step(weights, state, data.batch(index))
        losses.append(value)
        if (index + 1) % every == 0:
            alphas.append(jax.device_get(exponents(weights)))
    return weights, np.asarray(losses), alphas


results = {name: train(link) for name, link in links.items()}
held = [jnp.asarray(tokens) for tokens in data.held_out(8)]
measure = jax.jit(functools.partial(loss, forward))
for name, (weights, _, _) in results.items():
    print(f"{name:16s} held-out loss {np.mean([measure(weights, t) for t in held]):.4f} nats/byte")
print("One seed: differences below about 0.03 say nothing.")

# %% [markdown]
# ## Weights
# The share of weights of each size, all hidden matrices together. Decay pulls in the shoulders; the Huber pull, bounded
# at 1.5 times the mean size, leaves more of the largest weights than l2 does.

# %%
styles = {name: style for name, style in zip(links, ["-", "--", "-.", ":"])}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
edges = np.linspace(0, 0.3, 61)
for name, (weights, losses, _) in results.items():
    sizes = np.concatenate([np.abs(np.ravel(leaf_at(weights, path))) for path in hidden])
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
# Eigenvalues of `W Wᵀ`, divided by their median, of one matrix. The upper half is what alpha is fitted to.

# %%
figure, axs = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, part in zip(axs, ("query", "down")):
    path = next(p for p in hidden if part in p)
    for name, (weights, _, _) in results.items():
        w = np.asarray(as_matrix(leaf_at(weights, path), described[path]))[-1]
        values = np.sort(np.linalg.svd(w, compute_uv=False) ** 2)[::-1]
        axis.plot(
            np.arange(1, values.size + 1), values / np.median(values), styles[name], label=name
        )
    axis.set(xlabel="rank", ylabel="eigenvalue / median", yscale="log", title=f"{path}, last layer")
axs[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Alpha through training
# Per kind of matrix, the mean over layers. AlphaDecay presses the large exponents down harder than the small ones.

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
