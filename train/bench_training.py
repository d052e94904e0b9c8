"""The training step beside Hugging Face's LLaMA in PyTorch, and against what the machine's matrix products reach.

One configuration, the reference of this project's CPU figures: width 256, 4 layers, 4 heads, 8 sequences of 256 tokens,
8192 tokens in the vocabulary; AdamW included. torch and transformers are looked for, not required.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import llama
from train import families, sharding
from train import step as step_lib
from train.bench_table import Options, Table, best_times
from train.config import Mesh

WIDTH, LAYERS, HEADS, VOCABULARY, LENGTH, BATCH = 256, 4, 4, 8192, 256, 8


def config(**changes: Any) -> llama.Config:
    """Of the compared model; the MLP has Hugging Face's and LLaMA's usual 8/3 of the width, in 32s."""
    return llama.Config(
        vocab_size=VOCABULARY, width=WIDTH, mlp_width=704, layers=LAYERS, heads=HEADS, **changes
    )


def ours(tokens: np.ndarray, **changes: Any) -> Callable[[], Any]:
    """One update of this project's step."""
    model = config(**changes)
    forward = families.Forward(model)
    tx = optax.with_extra_args_support(optax.adamw(1e-3, weight_decay=0.1))
    mesh = sharding.make_mesh(Mesh(), BATCH, jax.devices()[:1])
    state = step_lib.init(functools.partial(llama.init, model), tx, jax.random.key(0))
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = step_lib.compile_update(forward, tx, lambda step: 1e-3, 1, shardings)
    batch = jnp.asarray(tokens)
    carry = [state]

    def run() -> Any:
        carry[0], noted = update(carry[0], batch)
        return noted["loss"]

    return run


def hugging_face(tokens: np.ndarray, autocast: bool) -> Callable[[], Any]:
    """The same update by transformers' LlamaForCausalLM and torch's AdamW, eagerly."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    batch = torch.from_numpy(tokens[:, :-1].astype(np.int64))

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = model(input_ids=batch, labels=batch).loss
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def matmul_peak(rounds: int) -> float:
    """Float32 operations per second of the best square product here, by wall time."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    _, wall = best_times(rounds, {"product": lambda: product(x)})
    return 2 * 2048**3 / wall["product"]


def training_table(options: Options) -> Table:
    """Tokens per second, beside Hugging Face's, and the share of the machine's float32 products."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), np.int32)
    runs: dict[str, Callable[[], Any]] = {}
    note = ""
    try:
        runs["Hugging Face float32"] = hugging_face(tokens, autocast=False)
        runs["Hugging Face autocast bfloat16"] = hugging_face(tokens, autocast=True)
    except ImportError as error:
        note = f"Without Hugging Face: {error}. "
    runs["ours float32"] = ours(tokens)
    runs["ours bfloat16"] = ours(tokens, dtype="bfloat16")
    _, wall = best_times(options.rounds, runs)
    peak = matmul_peak(options.rounds)
    model = config()
    products = llama.count(model) - VOCABULARY * WIDTH  # the embedding is looked up
    operations = 6 * products * BATCH * LENGTH + 6 * LAYERS * BATCH * LENGTH**2 * WIDTH
    first = next(iter(wall))
    rows = [
        {
            "step": name,
            "tokens/s": BATCH * LENGTH / seconds,
            f"/ {first}": wall[first] / seconds,
            "of float32 products %": 100 * operations / seconds / peak,
        }
        for name, seconds in wall.items()
    ]
    return Table(
        f"A training step: width {WIDTH}, {LAYERS} layers, {BATCH} x {LENGTH} tokens, {VOCABULARY} tokens known;"
        f" wall time",
        rows,
        f"{note}Products here reach {peak / 1e9:.0f} Gflop/s; causal attention counted as half of the square.",
    )
