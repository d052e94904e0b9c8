"""Accuracy of the tail exponent from matrix products (Chebyshev moments), against float64 singular values.

The section ``accuracy`` measures synthetic spectra with known difficulties. The hardest is a power law of exponent 6,
whose density ends 0.14 below its median. The section ``accuracy-trained`` measures the weights of a small LLaMA, which
is trained here on the source of Python's standard library, and the resulting error of AlphaDecay's decay, with a linear
map to 2/3 .. 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import llama
from optax_decay import spectra
from train.bench.spectra import hill, matrices
from train.bench.table import Options, Table, best_times
from train.data import corpus
from train.step.update import loss

ROWS, COLUMNS, LAYERS = 512, 1376, 3  # shape of the matrices; layers of the trained model


def synthetic_matrices(n: int, m: int) -> dict[str, np.ndarray]:
    """Matrices [n, m] with various spectra, float64, by name."""
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal((n, m))
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    r = np.linalg.qr(rng.standard_normal((m, n)))[0]
    ranks = 1 - (np.arange(n) + 0.5) / n
    made = {"Gaussian": gauss, "rows scaled": gauss * np.exp(rng.standard_normal((n, 1)))}
    made["Student t 3"] = rng.standard_t(3, (n, m))
    made["spiked"] = gauss + 3 * np.sqrt(m) * (q[:, :8] * np.arange(1, 9) / 2) @ r[:, :8].T
    made["log-normal"] = (q * np.exp(0.75 * rng.standard_normal(n))) @ r.T
    for alpha in (1.5, 2.5, 3.5, 6.0):
        made[f"power law {alpha}"] = (q * ranks ** (-0.5 / (alpha - 1))) @ r.T
    return made


def synthetic_table(options: Options) -> Table:
    """The exponents of synthetic spectra, from 72 moments."""
    tail = ROWS - ROWS // 2
    one = jax.jit(
        functools.partial(spectra.tail_exponent, tail=tail), static_argnames="product_dtype"
    )
    rows = []
    for name, w in synthetic_matrices(ROWS, COLUMNS).items():
        alpha = hill(np.linalg.svd(w, compute_uv=False))
        gram = jnp.asarray((w @ w.T / COLUMNS)[None], jnp.float32)
        full, low = (one(gram, product_dtype=d) for d in (jnp.float32, jnp.bfloat16))
        again = one(gram, low.centre, product_dtype=jnp.bfloat16)
        rows.append(
            {
                "spectrum": name,
                "alpha": alpha,
                "error float32": float(full.alpha) - alpha,
                "error bfloat16": float(low.alpha) - alpha,
                "estimated error": float(low.error),
                "passes": int(low.passes),
                "passes again": int(again.passes),
            }
        )
    return Table(
        f"Tail exponent from matrix products, {ROWS}x{COLUMNS}, against float64 singular values",
        rows,
        "estimated error: by the method itself, in bfloat16. passes: number of series until the centre has converged;"
        " again: when it starts from the previous centre.",
    )


def time_table(options: Options) -> Table:
    """Time of the exact method and of matrix products. On CPUs the exact method is faster, and the default."""
    w = jnp.asarray(synthetic_matrices(ROWS, COLUMNS)["Gaussian"], jnp.float32)
    scores = {
        "exact": spectra.hill(method="exact"),
        "matrix products": spectra.hill(method=spectra.matrix_products()),
    }
    runs = {
        name: functools.partial(jax.jit(functools.partial(spectra.measure, score=score)), w)
        for name, score in scores.items()
    }
    cpu, _ = best_times(options.rounds, runs)
    row = {"matrix": f"{ROWS}x{COLUMNS}"} | {f"{name} ms": 1e3 * t for name, t in cpu.items()}
    return Table("Tail exponent, exact and from matrix products, CPU time", [row])


def trained_weights(options: Options) -> tuple[llama.Config, Any, float]:
    """Trains a byte-level LLaMA on the standard library; returns its Config, its block weights and the last loss."""
    config = llama.Config(
        vocab_size=256,
        width=ROWS,
        mlp_width=COLUMNS,
        layers=LAYERS,
        heads=ROWS // 64,
    )
    text = b"".join(t.encode() for t in list(corpus.read_corpus("stdlib").train.values())[:400])
    data = np.frombuffer(text, np.uint8)
    steps = options.training_steps
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(50, steps // 2), steps))
    forward = functools.partial(llama.forward, config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, g = jax.value_and_grad(functools.partial(loss, forward))(params, tokens)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, value

    params: Any = llama.init(config, jax.random.key(0))
    state: Any = tx.init(params)
    value: Any = None
    rng = np.random.default_rng(0)
    for _ in range(steps):
        starts = rng.integers(0, len(data) - 129, 16)
        tokens = np.stack([data[i : i + 129] for i in starts]).astype(np.int32)
        params, state, value = step(params, state, jnp.asarray(tokens))
    return config, {"blocks": params["blocks"]}, float(value)


def trained_table(options: Options) -> Table:
    """The exponents of trained weights, and the resulting errors of the decay."""
    model, tree, last = trained_weights(options)
    every = matrices(model, tree)
    exact = np.array([hill(np.linalg.svd(np.float64(w), compute_uv=False)) for w in every])

    def decays(alpha: np.ndarray) -> np.ndarray:
        return np.interp(alpha, [alpha.min(), alpha.max()], [2 / 3, 3.0])

    rows = []
    methods: dict[str, Any] = {
        "exact": "exact",
        "products, float32": spectra.matrix_products(jnp.float32),
        "products, bfloat16": spectra.matrix_products(jnp.bfloat16),
    }
    for name, method in methods.items():
        one = jax.jit(functools.partial(spectra.measure, score=spectra.hill(method=method)))
        measured = [one(jnp.asarray(w)) for w in every]
        alpha = np.array([float(m.value) for m in measured])
        error = np.abs(alpha - exact)
        share = np.abs(decays(alpha) / decays(exact) - 1) * 100
        rows.append(
            {
                "method": name,
                "alpha error max": float(error.max()),
                "alpha error mean": float(error.mean()),
                "decay error max %": float(share.max()),
                "decay error mean %": float(share.mean()),
                "not resolved": sum(not bool(m.resolved) for m in measured),
            }
        )
    return Table(
        f"{len(every)} matrices of a LLaMA of width {ROWS} after {options.training_steps} steps (loss {last:.3f}),"
        f" alpha {exact.min():.2f} to {exact.max():.2f}",
        rows,
        "not resolved: number of matrices whose result the method itself reports as uncertain.",
    )
