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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# AlphaDecay decays each matrix according to the tail exponent alpha of its spectrum. Eigenvalue solvers are slow on
# accelerators, so the library can compute the exponent from about 16 matrix products instead. This notebook explains
# the method and compares its results with exact ones.

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
rows, columns = 384, 1024
draws = 4

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from optax_decay import spectra

# %% [markdown]
# ## What alpha is
#
# Let λ be the eigenvalues of the Gram matrix `W Wᵀ`, which are the squared singular values of W. Alpha is the Hill
# exponent of their upper half, `alpha = 1 + 1 / mean ln(λ_j / λ_median)`. A heavy tail gives a small alpha. A random
# matrix has an alpha too, which depends on the ratio of its sides:


# %%
def alpha(w):
    """Hill exponent of the upper half of the spectrum, from singular values in float64."""
    values = np.sort(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2)
    tail = values[len(values) // 2 :]
    return 1 + 1 / np.mean(np.log(tail / tail[0]))


for ratio in (1, 2.7, 4):
    w = np.random.default_rng(0).standard_normal((rows, round(ratio * rows)))
    expected = spectra.random_matrix_alpha(*w.shape)
    print(f"{w.shape}: alpha of this random matrix {alpha(w):.2f}, of large ones {expected:.2f}")

# %% [markdown]
# ## Step 1: one inverse gives a logarithmic scale
#
# Alpha is a mean of logarithms, but matrix products give polynomials. With the Gram matrix G and a number θ, the Cayley
# map `Y = (G-θ)(G+θ)⁻¹` sends each eigenvalue λ to `tanh(ln(λ/θ)/2)`, which lies in (-1, 1). Polynomials of Y therefore
# resolve ln λ evenly around θ. The left panel shows the alternative, the linear map that polynomials of G itself would
# use: a few large eigenvalues push nearly all others against its lower end.


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
# ## Step 2: exact moments give the exponent
#
# The Chebyshev moments of Y are traces of matrix products. They are exact: no random vectors are used.
# `spectra.measure` does all of this when the score is `hill(method=matrix_products())`; a decay takes the same score.
# The `error` of the result is the resolution that the estimator reports: how far alpha moves when a third of the
# moments is left out. The remaining difference at this size is the statistic's own dependence on the single eigenvalue
# at the median, which falls with the size of the matrix.

# %%
score = spectra.hill(method=spectra.matrix_products())
measure = jax.jit(lambda w: spectra.measure(w, score))


def compare(kind):
    exact, estimate, resolution = [], [], []
    for seed in range(draws):
        w = draw(kind, seed)
        found = measure(w)
        exact.append(alpha(w))
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
# ## The weak case
#
# The hardest spectrum ends in a cliff just below the median, such as a pure power law of large alpha. With K moments
# the resolution in ln λ is `2π/K` at the centre θ. The estimator notices the problem, moves the centre to the median
# that it found, and takes more moments. If that is not enough, it says so: `resolved` is False.

# %%
rng = np.random.default_rng(1)
u, _, vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
cliff = jnp.asarray((u * np.sqrt((rng.pareto(5.0, rows) + 1))) @ vt, jnp.float32)
print(f"exact {alpha(cliff):.3f}")
for giant in (2, 8):
    found = spectra.tail_exponent(spectra.gram(cliff)[None], tail=rows - rows // 2, giant=giant)
    print(
        f"K = {8 * (giant + 1):3d}: alpha {float(found.alpha):.3f} after {int(found.passes)} passes; without a third"
        f" of the moments it moves by {float(found.error):.3f}; resolved: {bool(found.resolved)}"
    )
