"""The training step beside LLaMA and GPT in PyTorch, and against what the machine's matrix products reach.

One configuration, the reference of this project's CPU figures: width 256, 4 layers, 4 heads, 8 sequences of 256 tokens,
8192 tokens in the vocabulary; AdamW included. torch and transformers are looked for, not required (`bench_torch.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import gpt, llama
from train.bench import torch_peers as bench_torch
from train.bench.table import Options, Table, best_times
from train.config.fields import Mesh
from train.step import families, sharding
from train.step import update as step_lib

WIDTH, LAYERS, HEADS, VOCABULARY, LENGTH, BATCH = 256, 4, 4, 8192, 256, 8


SIZES: dict[str, Any] = {"width": WIDTH, "layers": LAYERS, "heads": HEADS}


def llama_like(**changes: Any) -> llama.Config:
    """The MLP has Hugging Face's and LLaMA's usual 8/3 of the width, in 32s."""
    return llama.Config(vocab_size=VOCABULARY, mlp_width=704, **SIZES, **changes)


def gpt_like(**changes: Any) -> gpt.Config:
    """As `bench_torch.plain_gpt`."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "positions": LENGTH,
        "mlp_width": 4 * WIDTH,
    } | SIZES
    return gpt.Config(**sizes, bias=False, tied=True, **changes)


def ours(model: Any, tokens: np.ndarray) -> Callable[[], Any]:
    """One update of this project's step."""
    init = functools.partial(families.of(model).init, model)
    tx = optax.with_extra_args_support(optax.adamw(1e-3, weight_decay=0.1))
    mesh = sharding.make_mesh(Mesh(), BATCH, jax.devices()[:1])
    state = step_lib.first_state(init(jax.random.key(0)), tx)
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    forward = families.Forward(model)
    update = step_lib.compile_update(forward, tx, lambda step: 1e-3, 1, shardings)
    batch = jnp.asarray(tokens)
    carry = [state]

    def run() -> Any:
        carry[0], noted = update(carry[0], batch)
        return noted["loss"]

    return run


def operations(model: Any, batch: int, length: int) -> float:
    """Floating-point operations of a step's products, forward and backward; causal attention as half of the square."""
    used = families.of(model).count(model)
    if not model.tied:
        used -= model.vocab_size * model.width  # the embedding is looked up
    used -= getattr(model, "positions", 0) * model.width
    return 6 * used * batch * length + 6 * model.layers * batch * length**2 * model.width


def matmul_peak(rounds: int, side: int = 2048, dtype: str = "float32") -> float:
    """Operations per second of a square product here, by wall time."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    _, wall = best_times(rounds, {"product": lambda: product(x)})
    return 2 * side**3 / wall["product"]


def training_table(options: Options) -> Table:
    """Tokens per second, beside PyTorch's, and the share of the machine's float32 products."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), np.int32)
    runs: dict[str, tuple[Any, Callable[[], Any]]] = {}
    note = ""
    shape = SIZES | {"vocabulary": VOCABULARY}
    for title, make, model in (
        ("LLaMA, Hugging Face", bench_torch.hugging_face, llama_like()),
        ("GPT, PyTorch", bench_torch.plain_gpt, gpt_like()),
    ):
        try:
            for kind, autocast in (("float32", False), ("autocast bfloat16", True)):
                run = make(tokens, shape | {"mlp_width": model.mlp_width}, autocast)
                runs[f"{title}, eager {kind}"] = model, run
        except ImportError as error:
            note = f"Without PyTorch: {error}. "
        for dtype in ("float32", "bfloat16"):
            own = dataclasses.replace(model, dtype=dtype)
            runs[f"{title.split(',')[0]}, ours {dtype}"] = model, ours(own, tokens)
    _, wall = best_times(options.rounds, {name: run for name, (_, run) in runs.items()})
    peak = matmul_peak(options.rounds)
    rows, first = [], {}
    for name, (model, _) in runs.items():
        beside = first.setdefault(type(model), wall[name])
        rows.append(
            {
                "step": name,
                "tokens/s": BATCH * LENGTH / wall[name],
                "/ first of the kind": beside / wall[name],
                "of float32 products %": 100 * operations(model, BATCH, LENGTH) / wall[name] / peak,
            }
        )
    return Table(
        f"A training step: width {WIDTH}, {LAYERS} layers, {BATCH} x {LENGTH} tokens, {VOCABULARY} tokens known;"
        f" wall time",
        rows,
        f"{note}Products here reach {peak / 1e9:.0f} Gflop/s; causal attention counted as half of the square.",
    )
