"""LLaMA (arXiv 2302.13971): the decoder-only transformer of the pre-training papers.

Letters, the same in array names, einsums and `AXES`:
  B sequences   T positions   D width   H query heads   K key/value heads   E width of a head
  F width of the MLP   L layers   V vocabulary

    x ← embedding[tokens]
    x ← x + out(attention(rotate(query(norm(x))), rotate(key(norm(x))), value(norm(x))))    L times,
    x ← x + down(silu(gate(norm(x))) · up(norm(x)))                                        in turn
    logits = head(norm(x))

The L layers are stacked in one tree, and `jax.lax.scan` runs them. Compile time then does not grow with depth, and an
optimizer sees seven stacked matrices instead of 7 L.

**Differs from the paper.** Grouped queries (K < H) and a tied head are possible. The presets draw every matrix from
N(0, 0.02²), as the GaLore, Conda and AlphaDecay recipes do.

With a `base_width` the model is parametrised so that hyperparameters found at that width transfer to it; see
`shapes.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import loss, shapes
from models.attention import attention
from models.layers import (
    Embedding,
    Linear,
    Placement,
    apply_layers,
    joined,
    joins,
    side_by_side,
)

AXES = (
    (r"embed/embedding", "V -> D"),
    (r"blocks/attention/query/kernel", "L | D -> H E"),
    (r"blocks/attention/(key|value)/kernel", "L | D -> K E"),
    (r"blocks/attention/out/kernel", "L | H E -> D"),
    (r"blocks/mlp/(gate|up)/kernel", "L | D -> F"),
    (r"blocks/mlp/down/kernel", "L | F -> D"),
    (r"blocks/(attention_norm|mlp_norm)/scale", "L | D"),
    (r"final_norm/scale", "D"),
    (r"head/kernel", "D -> V"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model and how it is computed. Every field is checked on construction."""

    vocab_size: int = 32_000  # V, tokens
    width: int = 512  # D, features
    mlp_width: int = 1376  # F, features
    layers: int = 8  # L
    heads: int = 8  # H, must divide the width into heads of an even number of features
    kv_heads: int | None = None  # K, must divide `heads`; None: as many as `heads`
    tied: bool = False  # the head is the transposed embedding, not a matrix of its own
    rope_base: float = 10_000.0  # the slowest features turn by 1/rope_base rad per position
    norm_eps: float = 1e-6  # added to the mean square of the features
    init_std: float = 0.02  # standard deviation of every matrix at the start
    base_width: int | None = None  # D₀, the width at which hyperparameters were found; None: this
    base_head_width: int | None = None  # E₀, width of a head at the base width; None: as here
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; weights are float32
    attention: Literal["xla", "cudnn"] = "xla"  # cudnn: NVIDIA GPUs, bfloat16 only
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes per layer:
    # nothing; everything but matrix products and the attention output; everything

    def __post_init__(self):
        shapes.check(
            self,
            sizes=("vocab_size", "width", "mlp_width", "layers", "heads"),
            positive=("rope_base", "norm_eps", "init_std"),
            choices=("dtype", "attention", "remat"),
        )
        shapes.check_heads(self, unit=2)
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}; "
                f"nearest: kv_heads={shapes.nearest_divisor(self.heads, self.kv_heads)}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


# toy (tests) and tiny (the default run) are ours. 9M to 3B are GaLore's (arXiv 2403.03507), which Conda and AlphaDecay
# use too. 7B and larger are LLaMA's. root-1B is the model of ROOT's demonstration.
PRESETS = {
    "toy": Config(vocab_size=61, width=24, mlp_width=40, layers=3, heads=6, kv_heads=2),
    "tiny": Config(vocab_size=4096, width=128, mlp_width=352, layers=4, heads=4, kv_heads=2),
    "9M": Config(width=128, mlp_width=352, layers=4, heads=4),
    "20M": Config(width=256, mlp_width=688, layers=4, heads=4),
    "60M": Config(width=512, mlp_width=1376, layers=8, heads=8),
    "130M": Config(width=768, mlp_width=2048, layers=12, heads=12),
    "350M": Config(width=1024, mlp_width=2736, layers=24, heads=16),
    "1B": Config(width=2048, mlp_width=5461, layers=24, heads=32),
    "3B": Config(width=2560, mlp_width=6848, layers=32, heads=32),
    "7B": Config(width=4096, mlp_width=11008, layers=32, heads=32),
    "13B": Config(width=5120, mlp_width=13824, layers=40, heads=40),
    "33B": Config(width=6656, mlp_width=17920, layers=60, heads=52),
    "65B": Config(width=8192, mlp_width=22016, layers=80, heads=64),
    "root-1B": Config(
        vocab_size=128_256,
        width=2048,
        mlp_width=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        tied=True,
    ),
}


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD *= jax.lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + self.eps)
        return (y_BTD * self.scale[...]).astype(x_BTD.dtype)


def rotary_angles(T: int, E: int, base: float) -> jax.Array:
    """Angles [T, E/2] in radians: position t turns feature pair j by t · base^(-2j/E)."""
    frequency_E = base ** (-jnp.arange(0, E, 2, dtype=jnp.float32) / E)
    return jnp.arange(T, dtype=jnp.float32)[:, None] * frequency_E


def rotate(x_BTHE: jax.Array, angles_TE: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) of the pairs (feature j, feature j + E/2)."""
    cos, sin = jnp.cos(angles_TE)[:, None, :], jnp.sin(angles_TE)[:, None, :]
    a, b = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHE.dtype)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, H, K, E = config.width, config.heads, config.kv_heads or config.heads, config.head_width
        std = shapes.hidden_std(config)
        self.query = Linear((D,), (H, E), std, rngs)
        self.key = Linear((D,), (K, E), std, rngs)
        self.value = Linear((D,), (K, E), std, rngs)
        self.out = Linear((H, E), (D,), std, rngs)
        self.scale = shapes.attention_scale(config)
        self.implementation = config.attention
        # Where a layer is recomputed, the parts of one product and their gradients would be copied.
        self.together = config.remat == "none"

    def __call__(self, x_BTD: jax.Array, angles_TE: jax.Array) -> jax.Array:
        maps = self.query, self.key, self.value
        parts = side_by_side(x_BTD, *maps) if self.together else [one(x_BTD) for one in maps]
        query_BTHE, key_BTKE, value_BTKE = parts
        mixed_BTHE = attention(
            rotate(query_BTHE, angles_TE),
            rotate(key_BTKE, angles_TE),
            value_BTKE,
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.out(checkpoint_name(mixed_BTHE, "attention"))


@jax.custom_jvp
def _gated(y_BTG: jax.Array) -> jax.Array:
    """silu(gate) · up, where gate and up stand behind one another: [B, T, 2F] to [B, T, F]. For GPUs.

    With σ = sigmoid(gate) the gradients are

        ∂gate = ∂h σ up (1 + gate (1 − σ)),      ∂up = ∂h σ gate

    XLA would compute and keep σ, and read gate, up and ∂h once for each of the two. Here ∂h σ stands in front of a
    choice between the other factors, so that one kernel reads everything once.
    """
    gate_BTF, up_BTF = jnp.split(y_BTG.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate_BTF) * up_BTF).astype(y_BTG.dtype)


@_gated.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (y_BTG,), (dy_BTG,) = primals, tangents
    F = y_BTG.shape[-1] // 2
    twice = lambda x: jnp.concatenate([x, x], axis=-1).astype(jnp.float32)
    gate, up = twice(y_BTG[..., :F]), twice(y_BTG[..., F:])
    sigmoid = jax.nn.sigmoid(gate)
    rest = jnp.where(jnp.arange(2 * F) < F, up * (1 + gate * (1 - sigmoid)), gate)
    changes = (sigmoid * rest * dy_BTG).reshape(*y_BTG.shape[:-1], 2, F)
    return _gated(y_BTG), jnp.sum(changes, axis=-2).astype(y_BTG.dtype)


class SwiGLU(nnx.Module):
    """Gated MLP (arXiv 2002.05202)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, F, std = config.width, config.mlp_width, shapes.hidden_std(config)
        self.gate = Linear((D,), (F,), std, rngs)
        self.up = Linear((D,), (F,), std, rngs)
        self.down = Linear((F,), (D,), std, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if joins():
            # The backward pass reads gate and up again, which is faster than keeping more of them.
            return self.down(jax.checkpoint(_gated)(joined(x_BTD, self.gate, self.up)))
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x_BTD: jax.Array, angles_TE: jax.Array) -> jax.Array:
        x_BTD += self.attention(self.attention_norm(x_BTD), angles_TE)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Llama(nnx.Module):
    """The model as a module, for training code of your own; `forward` computes the same from a dictionary of weights.

    model = Llama(config, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    logits = model(tokens)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.init_std, rngs)
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            self.head = Linear((config.width,), (config.vocab_size,), config.init_std, rngs)

    def __call__(self, tokens_BT: jax.Array, *, place: Placement | None = None) -> jax.Array:
        """The logits of the next token at every position, float32 [B, T, V], from integers [B, T]."""
        return loss.logits(self.features(tokens_BT, place=place), self.head_matrix())

    def features(self, tokens_BT: jax.Array, *, place: Placement | None = None) -> jax.Array:
        """The last features [B, T, D], in the dtype of the activations. Arguments as in `forward`."""
        shapes.check_tokens(tokens_BT)
        config, place = self.config, place or Placement()
        x_BTD = place.look_up(self.embed.embedding[...], tokens_BT)
        x_BTD = place(x_BTD.astype(config.dtype))
        angles_TE = rotary_angles(tokens_BT.shape[1], config.head_width, config.rope_base)

        def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return place(block(x_BTD, angles_TE)), None

        x_BTD = apply_layers(layer, x_BTD, self.blocks, config)
        return self.final_norm(x_BTD) * shapes.readout(config)

    def head_matrix(self) -> jax.Array:
        """The matrix of the head, [D, V]."""
        return self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]


@functools.cache
def _graph(config: Config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))[0]


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial float32 weights as a nested dictionary; under `jax.eval_shape`, only their shapes."""
    return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(key)), nnx.Param))


def features(
    config: Config,
    params: dict[str, Any],
    tokens_BT: jax.Array,
    *,
    place: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The two factors of the logits, for a loss that never stores all logits.

    Args:
      config: the shape of the model.
      params: weights as `init` makes them.
      tokens_BT: integers [B, T] below the vocabulary size.
      place: constrains the sharding of the activations [B, T, D] before and after every layer.

    Returns:
      the last features [B, T, D] in the dtype of the activations, and the float32 matrix [D, V] of the head.

    Raises:
      ValueError: tokens that are not integers [B, T].
    """
    network = nnx.merge(_graph(config), params)
    return network.features(tokens_BT, place=place), network.head_matrix()


def forward(
    config: Config,
    params: dict[str, Any],
    tokens_BT: jax.Array,
    *,
    place: Placement | None = None,
) -> jax.Array:
    """The logits of the next token at every position. Arguments and errors as in `features`.

    Returns:
      float32 [B, T, V].
    """
    return loss.logits(*features(config, params, tokens_BT, place=place))


def axes(config: Config) -> tuple[tuple[str, str], ...]:
    """The rules of `AXES` that apply to this config: a model with a tied head has no matrix for the head."""
    return tuple(rule for rule in AXES if not (config.tied and rule[0].startswith("head/")))


def count(config: Config) -> int:
    """The number of weights. Allocates none of them."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
