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
# # Tune at a small width, train at four times the width
#
# Learning rate η and weight decay λ are searched for on a model of width 32. A model of width 128 then takes them as
# they are: `mup_adamw` gives its matrices η/m and λ√m (m = 4), and the model, told its `base_width`, the matching
# initial weights and read-out. Nothing is tuned at width 128. At the end a report looks at the largest singular values
# of both: the claim behind the transfer of λ is that they agree.

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
steps, seeds = 300, 2
widths = (32, 128)
rates, decays = (0.005, 0.01, 0.02), (0.25, 0.5, 1.0)

# %%
import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_decay
from models import llama
from train.data import batches as text
from train.step import update as step

base, wide = widths
data = text.load_text(
    "stdlib", "bytes", length=64, batch_size=8, seed=0, cache=root / ".cache/data"
)


def config(width, mup):
    return llama.Config(
        vocab_size=data.vocab_size,
        width=width,
        mlp_width=3 * width,
        layers=2,
        heads=width // 16,
        init_std=0.1,
        base_width=base if mup else None,
    )


AXES = llama.axes(config(base, True))

# %% [markdown]
# One call makes the optimizer, for any tree of parameters whose axes are described. At the base width it is AdamW.
# This is what it means at the large width, parameter by parameter; σ is the predicted largest singular value over the
# proxy's:

# %%
shapes = jax.eval_shape(lambda: llama.init(config(wide, True), jax.random.key(0)))
print(optax_decay.width_table(shapes, 0.01, 0.5, base_width=base, axes=AXES))

# %%


@functools.cache
def trainer(width, mup):
    """A compiled function (η, λ, seed) -> (held-out loss, weights), over `steps` steps."""
    model = config(width, mup)
    loss = functools.partial(step.loss, functools.partial(llama.forward, model))
    held_out = jnp.asarray(np.stack(data.held_out(16)))

    @jax.jit
    def train(eta, lam, key, batches):
        def rate(count):  # a climb, then a line to zero
            return eta * jnp.minimum((count + 1) / (0.1 * steps), (steps - count) / (0.9 * steps))

        if mup:
            adamw = optax_decay.mup_adamw(rate, base, b2=0.95, weight_decay=lam, axes=AXES)
        else:
            decay = optax_decay.decay(lam, mask=("hidden", "head"), axes=AXES)
            adamw = optax.chain(
                optax.scale_by_adam(b2=0.95), decay, optax.scale_by_learning_rate(rate)
            )
        tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

        def update(carry, tokens):
            params, state = carry
            change, state = tx.update(jax.grad(loss)(params, tokens), state, params)
            return (optax.apply_updates(params, change), state), None

        params = llama.init(model, key)
        (params, _), _ = jax.lax.scan(update, (params, tx.init(params)), batches)
        return jnp.mean(jax.lax.map(lambda tokens: loss(params, tokens), held_out)), params

    return train


@functools.cache
def run(width, mup, eta, lam, seed):
    source = dataclasses.replace(data, seed=seed)
    batches = jnp.asarray(np.stack([source.batch(i) for i in range(steps)]))
    loss, params = trainer(width, mup)(eta, lam, jax.random.key(seed), batches)
    return float(loss), params


def every_loss(width, mup, eta, lam):
    return [run(width, mup, eta, lam, seed)[0] for seed in range(seeds)]


def mean_loss(*point):
    return np.mean(every_loss(*point))


# %% [markdown]
# ## The search, at the small width

# %%
print("η \\ λ  " + "".join(f"{lam:>8g}" for lam in decays))
for eta in rates:
    print(f"{eta:<7g}" + "".join(f"{mean_loss(base, True, eta, lam):8.3f}" for lam in decays))
eta, lam = min(
    ((e, k) for e in rates for k in decays), key=lambda point: mean_loss(base, True, *point)
)
print(f"\nbest at width {base}: η = {eta:g}, λ = {lam:g}")

# %% [markdown]
# ## The same numbers at the large width
# Beside the transferred point stand, for the picture only, runs at other η: under μP with the default rule, and with
# plain AdamW, which has one η and one λ for everything and the model as it is.

# %%
around = [eta / 4, eta / 2, eta, 2 * eta]
figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
for width, style in ((base, "o:"), (wide, "s-")):
    for mup, color in ((True, "#10305a"), (False, "#b4521e")):
        each = np.array([every_loss(width, mup, e, lam) for e in around])
        losses = each.mean(axis=1)
        name = "mup_adamw" if mup else "plain AdamW"
        panel.semilogx(
            *(around, losses, style),
            color=color,
            markerfacecolor=color if mup else "white",
            label=f"{name}, width {width}",
            base=2,
        )
        panel.vlines(around, each.min(axis=1), each.max(axis=1), color=color)
        print(f"{name:12s} width {width:4d}  " + "  ".join(f"{x:.3f}" for x in losses))
panel.axvline(eta, color="#a0a0a0", linewidth=1)
panel.set(xlabel="η of the proxy (grey: taken over)", ylabel="held-out loss [nats per byte]")
panel.set_title("lines up and down: from seed to seed", fontsize=9)
panel.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Was it justified?
# Largest singular values, matrix by matrix and layer by layer, after the same number of steps. `a` is the exponent of
# σ ∝ sqrt(η/λ)·width^a that the two runs show and `s = 2a - 1` the exponent of λ that would have held σ; the default
# rule is s = ½. A failed row says that for this matrix it was another one.

# %%
target, proxy = (run(width, True, eta, lam, 0)[1] for width in (wide, base))
report = optax_decay.spectral_gain_report(
    target, proxy, axes=AXES, sublayers={"mlp": ("mlp/up/kernel", "mlp/down/kernel")}
)
print(report)
