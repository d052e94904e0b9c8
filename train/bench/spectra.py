"""Cost of measuring spectra on a CPU, compared with the released AlphaDecay, which calls ``svdvals`` on every matrix.

The comparison covers the ``svdvals`` of torch, if it is installed, of NumPy (LAPACK), and of JAX. For a comparison with
one thread each, run ``taskset -c 0 python -m train bench spectra``.
"""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import optax_decay
from optax_decay import axes, spectra
from train.bench.table import Options, Table, best_times
from train.display import say
from train.step import families
from train.step.update import loss


def blocks(preset: str) -> tuple[Any, list[np.ndarray]]:
    """Random weights of a model's blocks, as a tree and as a list of matrices ``[m, n]``."""
    config = families.PRESETS[preset]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: families.of(config).init(config, jax.random.key(0)))["blocks"]
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.02)
    tree = {"blocks": jax.tree.map(draw, shapes)}
    return tree, matrices(config, tree)


def block_axes(config: Any) -> tuple[tuple[str, str], ...]:
    """The axes rules for a model's blocks."""
    rules = families.of(config).axes(config)
    return tuple(rule for rule in rules if rule[0].startswith("blocks/"))


def matrices(config: Any, tree: Any) -> list[np.ndarray]:
    """The hidden matrices of a model's blocks, ``[m, n]`` each."""
    stacks = []
    signatures = axes.signatures(block_axes(config), tree)
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    for path, leaf in leaves.items():
        if signatures[path].role == "hidden":
            stacks.extend(np.asarray(axes.as_matrix(leaf, signatures[path])))
    return stacks


def hill(values: np.ndarray) -> float:
    """Hill's estimate of the tail exponent from singular values, in float64."""
    lam = np.sort(np.asarray(values, np.float64)) ** 2
    tail = lam[len(lam) // 2 :]
    return 1 + len(tail) / np.sum(np.log(tail / tail[0]))


def methods() -> dict[str, Callable[[Any], Any]]:
    """Functions from a matrix to its tail exponent, by name. The first one is the baseline."""
    known: dict[str, Callable] = {}
    try:
        # torch is not a dependency of the project; only benchmarks import it, if it is installed.
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        known["torch svdvals"] = lambda w: hill(torch.linalg.svdvals(torch.from_numpy(w)).numpy())
    except ImportError:
        say("torch is not installed, so numpy svdvals is the baseline.")
    known["numpy svdvals"] = lambda w: hill(np.linalg.svd(w, compute_uv=False))
    for name, method in (("jax svd", "svd"), ("jax eigh", "eigh"), ("ours", "exact")):
        score = spectra.hill(method=method)
        known[name] = jax.jit(functools.partial(spectra.measure, score=score))
    return known


def exact_table(options: Options) -> Table:
    """Time of one matrix of each shape, and of all block matrices."""
    tree, every = blocks(options.preset)
    known = methods()
    first = next(iter(known))
    rows: list[dict[str, Any]] = []
    for shape in sorted({w.shape for w in every}):
        w = next(w for w in every if w.shape == shape)
        here = jnp.asarray(w)
        runs = {
            name: functools.partial(method, w if "svdvals" in name else here)
            for name, method in known.items()
        }
        cpu, _ = best_times(options.rounds, runs)
        truth = hill(np.linalg.svd(np.float64(w), compute_uv=False))
        rows.append(
            {"matrices": f"{shape[0]}x{shape[1]}"}
            | {f"{name} ms": 1e3 * t for name, t in cpu.items()}
            | {
                f"{first} / ours": cpu[first] / cpu["ours"],
                "alpha error": abs(float(known["ours"](here).value) - truth),
            }
        )
    link = optax_decay.spectral_alpha_decay(
        0.1, axes=block_axes(families.PRESETS[options.preset]), score=spectra.hill(method="exact")
    )
    state, zero = link.init(tree), jax.tree.map(jnp.zeros_like, tree)
    sweep = jax.jit(lambda p, s: link.update(zero, s, p, refresh=True)[1])
    cpu, _ = best_times(
        options.rounds,
        {
            first: lambda: [known[first](w) for w in every],
            "ours": lambda: sweep(tree, state),
        },
    )
    rows.append(
        {"matrices": f"all {len(every)}"}
        | {f"{name} ms": 1e3 * cpu[name] if name in cpu else None for name in known}
        | {f"{first} / ours": cpu[first] / cpu["ours"], "alpha error": None}
    )
    return Table(
        f"Exact spectra of the block matrices of {options.preset}, CPU time",
        rows,
        "alpha error: against singular values in float64. The last row of ours is a refresh inside the optimizer.",
    )


def steps_table(options: Options) -> Table:
    """Cost of AlphaDecay in a training step: in the slowest step, and on average."""
    config = families.PRESETS[options.preset]
    family = families.of(config)
    forward = functools.partial(family.forward, config)
    link = optax_decay.spectral_alpha_decay(0.1, axes=families.of(config).axes(config))
    tx = optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(1e-4))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        g = jax.grad(functools.partial(loss, forward))(params, tokens)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = families.of(config).init(config, jax.random.key(0))
    carry: Any = (params, tx.init(params))
    rng = np.random.default_rng(0)
    length = min(256, options.tokens)
    tokens = jnp.asarray(
        rng.integers(0, config.vocab_size, (max(1, options.tokens // length), length + 1), np.int32)
    )
    count = 7 * config.layers

    def run(at: int) -> float:
        """CPU time of a step when the state has counted `at` updates [s]."""
        nonlocal carry
        params, (adam, decay, rate) = carry
        carry = (params, (adam, decay._replace(count=jnp.asarray(at, jnp.int32)), rate))
        start = time.process_time()
        carry = jax.block_until_ready(step(*carry, tokens))
        return time.process_time() - start

    run(1)
    # Matrix j of T is measured at step floor(j · 500 / T); nothing is due in the step before.
    due = (count - 1) * 500 // count - 1
    best: dict[str, list[float]] = {"nothing due": [], "one matrix due": [], "all due": []}
    for _ in range(options.rounds):
        for name, at in zip(best, (due - 1, due, 0)):
            best[name].append(run(at))
    plain, one, every = (min(times) for times in best.values())
    row = {
        "tokens": tokens.shape[0] * length,
        "nothing due s": plain,
        "one matrix due s": one,
        "slowest step / median": one / plain,
        f"all {count} due s": every,
        "amortised at 500, %": 100 * (every - plain) / 500 / plain,
    }
    return Table(f"A training step of {options.preset} with AlphaDecay, CPU time", [row])


def memory_table(options: Options) -> Table:
    """Temporary memory of one update, from the compiled program."""
    config = families.PRESETS[options.preset]
    params = jax.eval_shape(lambda: families.of(config).init(config, jax.random.key(0)))
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    rows = [
        {
            "method": method,
            "plain update": workspace(config, params, method, False) / total,
            "measuring update": workspace(config, params, method, True) / total,
        }
        for method in ("exact", "svd", "matrix products")
    ]
    return Table(f"Workspace of AlphaDecay, {options.preset}: float32 numbers per weight", rows)


def workspace(config: Any, params: Any, method: str, refresh: bool) -> float:
    """Temporary memory of one update [float32 numbers]."""
    known: dict[str, Any] = {"matrix products": spectra.matrix_products()}
    score = spectra.hill(method=known.get(method, method))
    axes = families.of(config).axes(config)
    link = optax_decay.spectral_alpha_decay(0.1, axes=axes, score=score)
    state = jax.eval_shape(link.init, params)
    update: Any = lambda u, s, p: link.update(u, s, p, refresh=refresh)
    compiled: Any = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 4


def model_table(options: Options) -> Table:
    """Operations of a sweep by formula: Gram matrix 2n²m, inverse 7/3 n³, 14 products of 2n³ each.

    Training takes 6 operations per weight and token.
    """
    rows = []
    for preset in ("60M", "130M", "350M", "1B", "3B", "7B"):
        config = families.PRESETS[preset]
        d, f, layers = config.width, config.mlp_width, config.layers
        gram = layers * (4 * 2 * d**3 + 3 * 2 * d * d * f)
        inverse, products = 7 * layers * 7 / 3 * d**3, 7 * layers * 14 * 2 * d**3
        weights = layers * (4 * d * d + 3 * d * f) + 2 * config.vocab_size * d
        training = 6 * weights * 65536
        sweep = gram + inverse + products
        rows.append(
            {
                "model": preset,
                "sweep Tflop": sweep / 1e12,
                "of it Gram %": 100 * gram / sweep,
                "inverse %": 100 * inverse / sweep,
                "products %": 100 * products / sweep,
                "step of 64k tokens Tflop": training / 1e12,
                "sweep per 500 steps %": 100 * sweep / 500 / training,
            }
        )
    return Table("Operations of a sweep with matrix products (calculated, not measured)", rows)
