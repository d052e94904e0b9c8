"""The measurements of `python -m train bench accelerator`; each part runs in a process of its own.

    python -m train.bench.accelerator_parts PART FILE [small]

A part is a generator of rows, which are appended to FILE as lines of JSON as they come. All times are wall times until
the result is ready.
"""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from train.bench import repeatability

Rows = Iterator[dict[str, Any]]
# Tokens in a step, in sequences of 1024.
TOKENS = {"60M": 65_536, "130M": 65_536, "350M": 32_768, "1B": 16_384, "gpt2-124M": 32_768}
SMALL_TOKENS, SMALL_LENGTH = 64, 16


def best(run: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest time of a call [s], after one to warm up."""
    from train.bench.table import best_times

    return best_times(rounds, {"run": run})[1]["run"]


def limits(small: bool) -> Rows:
    """Products by types and shapes, and a copy: the best of several shapes is the limit."""
    import jax
    import jax.numpy as jnp

    sides = [(64, 64, 64), (128, 64, 32)] if small else [
        (8192, 8192, 8192), (16384, 8192, 4096), (16384, 4096, 16384), (65536, 2048, 5504)
    ]  # fmt: skip
    kinds = (
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("float32", "float32", None),  # TF32 on NVIDIA's GPUs
        ("float32", "float32", jax.lax.Precision.HIGHEST),
    )
    for dtype, result, precision in kinds:
        speeds = {}
        for n, k, m in sides:
            a, b = (
                jax.random.normal(jax.random.key(i), shape, dtype)
                for i, shape in enumerate(((n, k), (k, m)))
            )
            run = jax.jit(
                functools.partial(jnp.matmul, precision=precision, preferred_element_type=result)
            )
            speeds[n, k, m] = 2 * n * k * m / best(lambda run=run, a=a, b=b: run(a, b))
        shape = max(speeds, key=lambda s: speeds[s])
        yield {
            "product": f"{dtype} to {result}" + (", full precision" if precision else ""),
            "Tflop/s": speeds[shape] / 1e12,
            "best of": " x ".join(map(str, shape)),
            "slowest Tflop/s": min(speeds.values()) / 1e12,
        }
    speeds = {}
    for dtype in ("float32", "bfloat16"):
        for elements in (2**14,) if small else (2**26, 2**28, 2**29):
            speeds[dtype, elements] = copy_speed(dtype, elements)
    dtype, elements = max(speeds, key=lambda s: speeds[s])
    yield {
        "copy": "read one array, write another",
        "GB/s": max(speeds.values()) / 1e9,
        "best of": f"{elements} of {dtype}",
        "slowest GB/s": min(speeds.values()) / 1e9,
    }


def copy_speed(dtype: str, elements: int) -> float:
    """Bytes read and written per second, from one array to another that already exists."""
    import jax
    import jax.numpy as jnp

    # The second array is donated, so that the result is written over it.
    negate = jax.jit(lambda x, y: -x, donate_argnums=1, keep_unused=True)
    x = jax.random.normal(jax.random.key(0), (elements,), dtype)
    carry = [jnp.zeros_like(x)]

    def run() -> Any:
        carry[0] = negate(x, carry[0])
        return carry[0]

    return 2 * x.nbytes / best(run, 10)


def sized(preset: str, small: bool) -> tuple[str, int, int]:
    """A preset, the tokens of a step and the length of a sequence."""
    if small:
        return ("gpt-toy" if preset.startswith("gpt") else "toy"), SMALL_TOKENS, SMALL_LENGTH
    return preset, TOKENS[preset], 1024


def step(preset: str, small: bool) -> Rows:
    """A training step: speed, memory, and the time of each kind of kernel."""
    import jax

    from train.bench import training
    from train.bench.device import data_sheet

    start = time.perf_counter()
    model, tokens = training.model_and_tokens(*sized(preset, small))
    run = training.ours(model, tokens)
    jax.block_until_ready(run())
    first = time.perf_counter() - start
    # Several steps in a row, so that the host runs ahead as it does in training.
    steps = 3 if small else 10
    seconds = best(lambda: [run() for _ in range(steps)], 2) / steps
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    work, promised = training.operations(model, batch, length), data_sheet()
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield {
        "step": preset,
        "tokens": batch * length,
        "ms": 1e3 * seconds,
        "tokens/s": batch * length / seconds,
        "Tflop/s": work / seconds / 1e12,
        "of the data sheet %": promised and 100 * work / seconds / promised,
        "peak memory GiB": peak and peak / 2**30,
        "compile and first step s": first,
    }
    from train.bench.kernel_times import kinds

    found = kinds(run, 1 if small else 3)
    for kind, each in sorted(found.items(), key=lambda pair: -pair[1]):
        yield {"kernels": kind, "ms a step": 1e3 * each, "of the step %": 100 * each / seconds}


def peer(preset: str, small: bool) -> Rows:
    """Hugging Face's LLaMA with autocast, eager and compiled; one that fails says why."""
    from train.bench import torch_peers
    from train.step import families

    model = families.PRESETS["toy" if small else preset]
    length = SMALL_LENGTH if small else 1024
    shape = ((SMALL_TOKENS if small else TOKENS[preset]) // length, length + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    sizes = {name: getattr(model, name) for name in ("width", "mlp_width", "layers", "heads")}
    for kind in ("eager", "torch.compile"):
        row: dict[str, Any] = {"peer": f"Hugging Face, {kind}", "ms": None, "tokens/s": None}
        try:
            run = torch_peers.hugging_face(
                tokens, sizes | {"vocabulary": model.vocab_size}, True, kind == "torch.compile"
            )
            seconds = best(run, 3)
            row |= {"ms": 1e3 * seconds, "tokens/s": shape[0] * length / seconds, "why": ""}
        except Exception as error:  # any failure of another program is a result
            row["why"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row


def optimizers(small: bool) -> Rows:
    """Optimizer steps beside those of optax."""
    from train.bench import optimizers as bench
    from train.bench.device import BYTES
    from train.bench.table import Options

    options = Options(preset="toy" if small else "350M", layout="stacked")
    shapes, axes = bench.shapes_and_axes(options)
    total = sum(int(np.prod(x.shape)) for x in shapes.values())
    grads = bench.random_weights(shapes, 0, 1e-3)
    first = None
    names = ("optax.adamw", "adam_huber_decay fixed", "adam_huber_decay", "optax.contrib.muon")
    for name in names[:2] if small else (*names, "root", "conda", "exadam"):
        taken = bench.compile_step(bench.OPTIMIZERS[name], shapes, axes, grads)
        seconds = best(functools.partial(taken, grads))
        first = first or seconds
        yield {
            "optimizer": name,
            "ms": 1e3 * seconds,
            "/ optax.adamw": seconds / first,
            "GB/s, as AdamW": BYTES * total / seconds / 1e9,
            "compile s": taken.compile_s,
        }
        del taken


def spectra(small: bool) -> Rows:
    """The measurement of all hidden matrices at once, by method."""
    import jax

    import optax_decay
    from train.bench import optimizers as bench
    from train.bench.table import Options

    ways = optax_decay.spectra
    methods: dict[str, Any] = {"matmul": ways.matrix_products(), "eigh": "eigh"}
    cases = [("60M", "matmul"), ("1B", "matmul"), ("60M", "eigh")]
    for preset, method in cases[:1] if small else cases:
        shapes, axes = bench.shapes_and_axes(
            Options(preset="toy" if small else preset, layout="stacked")
        )
        least = ways.hidden_matrices(min_eigenvalues=4 if small else 50)
        link = optax_decay.spectral_alpha_decay(
            0.1, axes=axes, score=ways.hill(method=methods[method]), select=least
        )
        params = bench.random_weights(shapes, 0, 0.02)
        state = link.init(params)
        measure = jax.jit(lambda s, p, link=link: link.update(p, s, p, refresh=True)[1])
        start = time.perf_counter()
        compiled = measure.lower(state, params).compile()
        took = time.perf_counter() - start
        seconds = best(lambda c=compiled, s=state, p=params: c(s, p), 3)
        yield {"spectra": f"{preset}, {method}", "ms": 1e3 * seconds, "compile s": took}


def population(small: bool) -> Rows:
    """Tokens per second of many small runs in one program."""
    from train.bench import population as bench
    from train.bench.table import Options
    from train.study.small_runs import SmallTask

    if small:
        bench.TASKS["cpu"] = SmallTask(
            width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=2, chunk=2
        )
        bench.COUNTS["cpu"] = (1, 2, 3)
    yield from bench.population_table(Options(rounds=1 if small else 3)).rows


def contract(small: bool) -> Rows:
    """Six updates of each row of the contract table here and on the CPU: difference over change of the weights."""
    import jax
    import optax

    from train.bench import optimizers as bench
    from train.bench.table import Options

    shapes, axes = bench.shapes_and_axes(Options(preset="toy", layout="stacked"))
    places = {"here": jax.devices()[0], "cpu": jax.devices("cpu")[0]}
    with jax.default_device(places["cpu"]):
        drawn = bench.random_weights(shapes, 1, 0.02), bench.random_weights(shapes, 0, 1e-3)
    table = bench.contract_rows()
    # Those that compute with whole matrices are most likely to differ.
    names = sorted(table, key=lambda n: not any(w in n for w in ("conda", "root", "muon", "alpha")))
    for name in names[:3] if small else names:
        row, ends = table[name], {}
        tx = optax.with_extra_args_support(row.build(axes, shapes))

        def update(params: Any, state: Any, grads: Any, tx: Any = tx, row: Any = row) -> Any:
            extra = row.extra(params, grads) if row.extra else {}
            change, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, change), state

        for place, device in places.items():
            with jax.default_device(device):
                params, grads = jax.device_put(drawn, device)
                state, run = tx.init(params), jax.jit(update)
                for _ in range(6):
                    params, state = run(params, state, grads)
                ends[place] = jax.tree.map(np.asarray, params)
        change = squares(ends["cpu"], drawn[0])
        yield {
            "row": name,
            "difference / change": (squares(ends["here"], ends["cpu"]) / max(change, 1e-300))
            ** 0.5,
        }


def squares(a: Any, b: Any) -> float:
    import jax

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return float(sum(np.sum((np.asarray(x, np.float64) - np.asarray(y)) ** 2) for x, y in pairs))


PARTS: dict[str, Callable[[bool], Rows]] = {
    "limits": limits,
    **{f"step-{name}": functools.partial(step, name) for name in TOKENS},
    "repeatable": repeatability.rows,
    **{f"peer-{name}": functools.partial(peer, name) for name in ("60M", "130M", "350M", "1B")},
    "optimizers": optimizers,
    "spectra": spectra,
    "population": population,
    "contract": contract,
}


def main(words: list[str]) -> None:
    name, file, *rest = words
    small = "small" in rest
    with pathlib.Path(file).open("a") as lines:
        for row in PARTS[name](small):
            lines.write(json.dumps(row, default=float) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
