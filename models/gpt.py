"""GPT-2 and GPT-3 (Radford et al. 2019; arXiv 2005.14165): the transformer with learned positions.

Letters, the same in array names, einsums and `AXES`:
  B sequences   T positions   D width   H heads   E width of a head   F width of the MLP   L layers
  V vocabulary

    x ← embedding[tokens] + position
    x ← x + out(attention(query(norm(x)), key(norm(x)), value(norm(x))))    L times,
    x ← x + down(gelu(up(norm(x))))                                        in turn
    logits = head(norm(x))

Norms are layer norms, and gelu is the tanh approximation (arXiv 1606.08415). The head is the transposed embedding.
Matrices are drawn from N(0, 0.02²), except out and down, whose variance is 0.02²/(2 L). Biases start at 0. The layers
are stacked in one tree, as in llama.py.

**Differs from the papers.** There is no dropout. Queries, keys and values are three matrices instead of one; the
function is the same, but a decay that measures spectra sees three matrices. Every layer attends to all earlier
positions, whereas GPT-3 alternates with sparse attention. GPT-3 1.3B has 16 heads, because the 24 heads of width 128 in
the paper's table do not give its width of 2048. 13B has width 5120 instead of 5140 for the same reason. The head can be
a separate matrix, and biases can be left out, as in nanoGPT.

With a `base_width` the model is parametrised so that hyperparameters found at that width transfer to it; see
`shapes.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import loss, shapes
from models.attention import attention
from models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    Placement,
    apply_layers,
    side_by_side,
    with_positions,
)

AXES = (
    (r"embed/embedding", "V -> D"),
    (r"position/embedding", "T -> D [embedding]"),
    (r"blocks/attention/(query|key|value)/kernel", "L | D -> H E"),
    (r"blocks/attention/(query|key|value)/bias", "L | H E"),
    (r"blocks/attention/out/kernel", "L | H E -> D"),
    (r"blocks/mlp/up/kernel", "L | D -> F"),
    (r"blocks/mlp/up/bias", "L | F"),
    (r"blocks/mlp/down/kernel", "L | F -> D"),
    (r"blocks/(attention/out|mlp/down|attention_norm|mlp_norm)/bias", "L | D"),
    (r"blocks/(attention_norm|mlp_norm)/scale", "L | D"),
    (r"final_norm/(scale|bias)", "D"),
    (r"head/kernel", "D -> V"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model and how it is computed. Every field is checked on construction."""

    vocab_size: int = 50_257  # V, tokens
    positions: int = 1024  # T, the longest sequence there is an embedding for
    width: int = 768  # D, features
    mlp_width: int = 3072  # F, features
    layers: int = 12  # L
    heads: int = 12  # H, must divide the width
    tied: bool = True  # the head is the transposed embedding, not a matrix of its own
    bias: bool = True  # of matrices and norms; the head has none
    norm_eps: float = 1e-5  # added to the variance of the features
    init_std: float = 0.02  # standard deviation of matrices at the start
    base_width: int | None = None  # D₀, the width at which hyperparameters were found; None: this
    base_head_width: int | None = None  # E₀, width of a head at the base width; None: as here
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; weights are float32
    attention: Literal["xla", "cudnn"] = "xla"  # cudnn: NVIDIA GPUs, bfloat16 only
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes per layer:
    # nothing; everything but matrix products and the attention output; everything

    def __post_init__(self):
        shapes.check(
            self,
            sizes=("vocab_size", "positions", "width", "mlp_width", "layers", "heads"),
            positive=("norm_eps", "init_std"),
            choices=("dtype", "attention", "remat"),
        )
        shapes.check_heads(self)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def _gpt3(width: int, layers: int, heads: int) -> Config:
    return Config(positions=2048, width=width, mlp_width=4 * width, layers=layers, heads=heads)


# gpt-toy is ours. GPT-2 has the sizes as released; the paper counts 117M and 345M for the two smaller ones.
PRESETS = {
    "gpt-toy": Config(vocab_size=61, positions=512, width=24, mlp_width=40, layers=3, heads=4),
    "gpt2-124M": Config(),
    "gpt2-355M": Config(width=1024, mlp_width=4096, layers=24, heads=16),
    "gpt2-774M": Config(width=1280, mlp_width=5120, layers=36, heads=20),
    "gpt2-1.5B": Config(width=1600, mlp_width=6400, layers=48, heads=25),
    "gpt3-125M": _gpt3(768, 12, 12),
    "gpt3-350M": _gpt3(1024, 24, 16),
    "gpt3-760M": _gpt3(1536, 24, 16),
    "gpt3-1.3B": _gpt3(2048, 24, 16),
    "gpt3-2.7B": _gpt3(2560, 32, 32),
    "gpt3-6.7B": _gpt3(4096, 32, 32),
    "gpt3-13B": _gpt3(5120, 40, 40),
}


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, H, E = config.width, config.heads, config.head_width
        std, last = shapes.hidden_std(config), math.sqrt(2 * config.layers)
        self.query = Linear((D,), (H, E), std, rngs, config.bias)
        self.key = Linear((D,), (H, E), std, rngs, config.bias)
        self.value = Linear((D,), (H, E), std, rngs, config.bias)
        self.out = Linear((H, E), (D,), std / last, rngs, config.bias)
        self.scale = shapes.attention_scale(config)
        self.implementation = config.attention
        # Where a layer is recomputed, the parts of one product and their gradients would be copied.
        self.together = config.remat == "none"

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        maps = self.query, self.key, self.value
        mixed_BTHE = attention(
            *(side_by_side(x_BTD, *maps) if self.together else [one(x_BTD) for one in maps]),
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.out(checkpoint_name(mixed_BTHE, "attention"))


class MLP(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, F, std = config.width, config.mlp_width, shapes.hidden_std(config)
        self.up = Linear((D,), (F,), std, rngs, config.bias)
        self.down = Linear((F,), (D,), std / math.sqrt(2 * config.layers), rngs, config.bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=True))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.norm_eps, config.bias)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, config.bias)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD += self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nnx.Module):
    """The model as a module, for training code of your own; `forward` computes the same from a dictionary of weights.

    model = GPT(config, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    logits = model(tokens)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.init_std, rngs)
        self.position = Embedding(config.positions, config.width, config.init_std, rngs)
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)
        self.final_norm = LayerNorm(config.width, config.norm_eps, config.bias)
        if not config.tied:
            self.head = Linear((config.width,), (config.vocab_size,), config.init_std, rngs)

    def __call__(self, tokens_BT: jax.Array, *, place: Placement | None = None) -> jax.Array:
        """The logits of the next token at every position, float32 [B, T, V], from integers [B, T]."""
        return loss.logits(self.features(tokens_BT, place=place), self.head_matrix())

    def features(self, tokens_BT: jax.Array, *, place: Placement | None = None) -> jax.Array:
        """The last features [B, T, D], in the dtype of the activations. Arguments as in `forward`."""
        shapes.check_tokens(tokens_BT, self.config.positions)
        config, place = self.config, place or Placement()
        x_BTD = place.look_up(self.embed.embedding[...], tokens_BT)
        x_BTD = with_positions(x_BTD, self.position.embedding[...][: tokens_BT.shape[1]])
        x_BTD = place(x_BTD.astype(config.dtype))

        def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return place(block(x_BTD)), None

        x_BTD = apply_layers(layer, x_BTD, self.blocks, config)
        return self.final_norm(x_BTD) * shapes.readout(config)

    def head_matrix(self) -> jax.Array:
        """The matrix of the head, [D, V]."""
        return self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]


@functools.cache
def _graph(config: Config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))[0]


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial float32 weights as a nested dictionary; under `jax.eval_shape`, only their shapes."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(key)), nnx.Param))


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
      tokens_BT: integers [B, T] below the vocabulary size, at most `config.positions` in a row.
      place: constrains the sharding of the activations [B, T, D] before and after every layer.

    Returns:
      the last features [B, T, D] in the dtype of the activations, and the float32 matrix [D, V] of the head.

    Raises:
      ValueError: tokens that are not integers [B, T], or a sequence that is longer than `config.positions`.
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
    """The rules of `AXES` that apply to this config, which may have no biases or a tied head."""
    rules = [rule for rule in AXES if not (config.tied and rule[0].startswith("head/"))]
    if not config.bias:
        rules = [(path.replace("(scale|bias)", "scale"), names) for path, names in rules]
    return tuple(rule for rule in rules if config.bias or not rule[0].endswith("/bias"))


def count(config: Config) -> int:
    """The number of weights. Allocates none of them."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    return sum(math.prod(leaf.shape) for leaf in leaves)
