"""Benchmarks the training step against LLaMA and GPT in PyTorch, and against the speed of matrix products.

The configuration is fixed, as a reference for CPUs: width 256, 4 layers, 4 heads, 8 sequences of 256 tokens, and a
vocabulary of 8192 tokens; AdamW is included. PyTorch and transformers are optional (`torch_peers.py`).
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
from train.bench import torch_peers
from train.bench.table import Options, Table, best_times
from train.config.fields import Mesh
from train.step import families, sharding, update


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the models and of a batch."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 8192
    length: int = 256  # of a sequence [tokens]
    batch: int = 8  # sequences


SIZES = Sizes()


def llama_like(sizes: Sizes) -> llama.Config:
    """A LLaMA whose MLP has the usual 8/3 of the width, rounded up to a multiple of 32."""
    mlp_width = 32 * -(-sizes.width * 8 // 96)
    return llama.Config(
        vocab_size=sizes.vocabulary,
        width=sizes.width,
        mlp_width=mlp_width,
        layers=sizes.layers,
        heads=sizes.heads,
    )


def gpt_like(sizes: Sizes) -> gpt.Config:
    """The same model as `torch_peers.plain_gpt`."""
    return gpt.Config(
        vocab_size=sizes.vocabulary,
        positions=sizes.length,
        width=sizes.width,
        mlp_width=4 * sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        bias=False,
        tied=True,
    )


class Step:
    """A training step with its own state; a call performs one update and returns the loss.

    Attributes:
        text: the compiled program.
    """

    def __init__(self, compiled: Any, state: Any, batch: jax.Array):
        self.text: str = compiled.as_text()
        self._compiled, self._state, self._batch = compiled, state, batch

    def __call__(self) -> jax.Array:
        self._state, numbers = self._compiled(self._state, self._batch)
        return numbers["loss"]


def ours(model: Any, tokens: np.ndarray) -> Step:
    """This project's training step with AdamW."""
    init = functools.partial(families.of(model).init, model)
    tx = optax.with_extra_args_support(optax.adamw(1e-3, weight_decay=0.1))
    mesh = sharding.make_mesh(Mesh(), len(tokens), jax.devices()[:1])
    state = update.first_state(init(jax.random.key(0)), tx)
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    forward = families.Forward(model)
    batch = jax.device_put(jnp.asarray(tokens), jax.NamedSharding(mesh, jax.P()))
    step = update.compile_update(forward, tx, lambda step: 1e-3, 1, shardings)
    return Step(step.lower(state, batch).compile(), state, batch)


def model_and_tokens(preset: str, tokens: int, length: int) -> tuple[Any, np.ndarray]:
    """A preset in bfloat16 with the fastest attention of this device, and random sequences of `length` tokens."""
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    model = dataclasses.replace(families.PRESETS[preset], dtype="bfloat16", attention=attention)
    shape = (tokens // length, length + 1)
    return model, np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)


def operations(model: Any, batch: int, length: int) -> float:
    """Floating-point operations of the matrix products in a step, forward and backward.

    Causal attention counts as half of the full square.
    """
    used = families.of(model).count(model)
    if not model.tied:
        used -= model.vocab_size * model.width  # the embedding is looked up
    used -= getattr(model, "positions", 0) * model.width
    return 6 * used * batch * length + 6 * model.layers * batch * length**2 * model.width


def matmul_peak(rounds: int, side: int = 2048, dtype: str = "float32") -> float:
    """Speed of the product of two square matrices, by wall time [operations/s]."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    _, wall = best_times(rounds, {"product": lambda: product(x)})
    return 2 * side**3 / wall["product"]


def training_table(options: Options) -> Table:
    """Tokens per second, compared with PyTorch and with the speed of float32 products."""
    shape = (SIZES.batch, SIZES.length + 1)
    tokens = np.random.default_rng(0).integers(0, SIZES.vocabulary, shape, np.int32)
    runs: dict[str, tuple[Any, Callable[[], Any]]] = {}
    note = ""
    sizes = ("width", "layers", "heads", "vocabulary")
    peer_shape = {name: getattr(SIZES, name) for name in sizes}
    for title, make, model in (
        ("LLaMA, Hugging Face", torch_peers.hugging_face, llama_like(SIZES)),
        ("GPT, PyTorch", torch_peers.plain_gpt, gpt_like(SIZES)),
    ):
        try:
            for kind, autocast in (("float32", False), ("autocast bfloat16", True)):
                run = make(tokens, peer_shape | {"mlp_width": model.mlp_width}, autocast)
                runs[f"{title}, eager {kind}"] = model, run
        except ImportError as error:
            note = f"PyTorch is left out: {error}. "
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
                "tokens/s": SIZES.batch * SIZES.length / wall[name],
                "/ first of the kind": beside / wall[name],
                "of float32 products %": 100
                * operations(model, SIZES.batch, SIZES.length)
                / wall[name]
                / peak,
            }
        )
    return Table(
        f"A training step: width {SIZES.width}, {SIZES.layers} layers, {SIZES.batch} x {SIZES.length} tokens,"
        f" a vocabulary of {SIZES.vocabulary}; wall time",
        rows,
        f"{note}Products reach {peak / 1e9:.0f} Gflop/s here. Causal attention counts as half of the square.",
    )
