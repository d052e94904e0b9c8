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
# # The tail of a spectrum from matrix products alone
#
# AlphaDecay decays a matrix by the tail exponent of its spectrum. Eigenvalue solvers are slow on accelerators;
# `optax_decay.chebyshev` gets the exponent from about 16 matrix products. This notebook shows how, and how well.

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
rows, columns = 384, 1024
draws = 4

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from optax_decay.spectral import chebyshev, spectra
from optax_decay.spectral import tails as tail_exponents

# %% [markdown]
# ## What alpha is
#
# With λ the eigenvalues of the Gram matrix (squared singular values), the Hill exponent of the upper half is
# `alpha = 1 + 1 / mean ln(λ_j / λ_median)`. A random matrix has an alpha too, which depends on its shape alone:

# %%
for shape in ((512, 512), (512, 1376), (512, 2048)):
    print(f"{shape}: alpha of a random matrix {tail_exponents.random_matrix_alpha(*shape):.3f}")

# %% [markdown]
# ## Step 1: a logarithmic scale by one inverse
#
# The Cayley map `Y = (G-θ)(G+θ)⁻¹` sends λ to `tanh(ln(λ/θ)/2)`, inside (-1, 1): polynomials of Y resolve ln λ evenly
# around θ. For comparison, the linear map that polynomials of G itself would use: with one strong spike nearly
# all eigenvalues are squeezed against its lower end.


# %%
def draw(kind, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns))
    if kind == "spiked":
        left, right = rng.standard_normal((rows, 8)), rng.standard_normal((8, columns))
        w += left @ right
    if kind == "power law":
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        values = rng.pareto(1.5, rows) + 1
        w = (u * np.sqrt(np.sort(values)[::-1])) @ vt
    return jnp.asarray(w / np.sqrt(columns), jnp.float32)


w = draw("spiked", 0)
values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2
theta = np.median(values)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
axes[0].hist(2 * values / values.max() - 1, bins=80, color="0.4")
axes[0].set(xlabel="2λ/λmax - 1", ylabel="eigenvalues", title="linear map")
axes[1].hist((values - theta) / (values + theta), bins=80, color="0.4")
axes[1].set(xlabel="(λ-θ)/(λ+θ)", ylabel="eigenvalues", title="Cayley map")
for axis in axes:
    axis.set_xlim(-1, 1)
plt.show()

# %% [markdown]
# ## Step 2: exact moments, and the exponent
#
# Chebyshev moments of Y are traces of matrix products, so they are exact; no random vectors. `spectra.measure` does
# all of it: `method="matmul"` against `method="svd"`. `error` is the resolution that the estimator reports: how far
# alpha moves when a third of the moments is left out. At this size the rest is the statistic's own dependence on the
# one eigenvalue at the median, which falls with the size of the matrix.


# %%
def compare(kind):
    exact, estimate, resolution = [], [], []
    for seed in range(draws):
        w = draw(kind, seed)
        exact.append(float(spectra.measure(w, "alpha", method="svd").value))
        found = spectra.measure(w, "alpha", method="matmul")
        estimate.append(float(found.value))
        resolution.append(float(found.error))
    return np.array(exact), np.array(estimate), np.array(resolution)


table = {kind: compare(kind) for kind in ("random", "spiked", "power law")}
for kind, (exact, estimate, resolution) in table.items():
    worst = np.abs(exact - estimate).max()
    print(
        f"{kind:10s} alpha {exact.mean():.3f}   largest error {worst:.4f}   resolution {resolution.max():.4f}"
    )

# %%
figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
for (kind, (exact, estimate, _)), marker in zip(table.items(), "os^"):
    axis.plot(exact, estimate, marker, label=kind, markerfacecolor="none", color="0.2")
ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
axis.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
axis.set(xlabel="alpha, exact (singular values)", ylabel="alpha, matrix products only")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Its weak case
#
# A spectrum that ends in a cliff just below the median: a pure power law of large alpha. The resolution in ln λ is
# `2π/K` at the centre; the estimator notices, moves the centre to the median it found, and takes more moments.

# %%
rng = np.random.default_rng(1)
u, _, vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
cliff = jnp.asarray((u * np.sqrt((rng.pareto(5.0, rows) + 1))) @ vt, jnp.float32)
exact = float(spectra.measure(cliff, "alpha", method="svd").value)
print(f"exact {exact:.3f}")
for giant in (2, 8):
    found = chebyshev.tail_exponent(spectra.gram(cliff)[None], tail=rows - rows // 2, giant=giant)
    print(
        f"K = {8 * (giant + 1):3d}: alpha {float(found.alpha):.3f} after {int(found.passes)} passes; without a third"
        f" of the moments it moves by {float(found.error):.3f}; resolved: {bool(found.resolved)}"
    )
