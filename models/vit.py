"""ViT (arXiv 2010.11929) as DeiT trains it (arXiv 2012.12877): a transformer over patches of an image.

Letters, the same in array names and `AXES`:
  B images   P values of a patch   N patches   T positions: a class token, then the patches
  D width   H heads   E width of a head   F width of the MLP   L layers   C classes

    x ← [class token, embed(patches)] + position
    x ← x + drop(out(attention(query(norm(x)), key(norm(x)), value(norm(x)))))    L times,
    x ← x + drop(down(gelu(up(norm(x)))))                                        in turn
    logits = head(norm(x) at the class token)

`drop` is stochastic depth (arXiv 1603.09382). In training it sets the output of a sublayer to 0 for some of the images
and divides the others by the probability of being kept. The probability of 0 grows linearly from 0 in the first layer
to `drop_path` in the last. gelu is exact. Matrices, class token and positions are drawn from N(0, 0.02²); biases start
at 0.

**Differs from DeiT.** Queries, keys and values are three matrices instead of one (see gpt.py). The patch embedding is
the matrix of DeiT's convolution, and it is drawn like the other matrices; DeiT draws it uniformly from ±1/sqrt(P).
There is no distillation token.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import shapes
from models.attention import attention
from models.layers import Embedding, LayerNorm, Linear, Placement, apply_layers

AXES = (
    (r"embed/kernel", "P -> D [embedding]"),
    (r"class_token", "D"),
    (r"position/embedding", "T -> D [embedding]"),
    (r"blocks/attention/(query|key|value)/kernel", "L | D -> H E"),
    (r"blocks/attention/(query|key|value)/bias", "L | H E"),
    (r"blocks/attention/out/kernel", "L | H E -> D"),
    (r"blocks/mlp/up/kernel", "L | D -> F"),
    (r"blocks/mlp/up/bias", "L | F"),
    (r"blocks/mlp/down/kernel", "L | F -> D"),
    (r"blocks/(attention/out|mlp/down|attention_norm|mlp_norm)/bias", "L | D"),
    (r"blocks/(attention_norm|mlp_norm)/scale", "L | D"),
    (r"(embed/bias|final_norm/scale|final_norm/bias)", "D"),
    (r"head/kernel", "D -> C [head]"),
    (r"head/bias", "C"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model and how it is computed. Every field is checked on construction."""

    image_size: int = 224  # pixels along a side
    patch_size: int = 16  # pixels along a side, must divide the image
    channels: int = 3
    classes: int = 1000  # C
    width: int = 192  # D, features
    mlp_width: int = 768  # F, features
    layers: int = 12  # L
    heads: int = 3  # H, must divide the width
    drop_path: float = 0.1  # probability of skipping a sublayer of the last layer in training
    norm_eps: float = 1e-6  # added to the variance of the features
    init_std: float = 0.02  # standard deviation of matrices at the start
    base_width: int | None = None  # D₀, the width at which hyperparameters were found; None: this
    base_head_width: int | None = None  # E₀, width of a head at the base width; None: as here
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; weights are float32
    attention: Literal["xla", "cudnn"] = "xla"  # cudnn: NVIDIA GPUs, bfloat16 only
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes per layer:
    # nothing; everything but matrix products and the attention output; everything

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "channels", "classes")
        shapes.check(
            self,
            sizes=(*sizes, "width", "mlp_width", "layers", "heads"),
            positive=("norm_eps", "init_std"),
            choices=("dtype", "attention", "remat"),
        )
        shapes.check_heads(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}; nearest: "
                f"patch_size={shapes.nearest_divisor(self.image_size, self.patch_size)}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must be at least 0 and below 1")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        """N, the number of patches per image."""
        return (self.image_size // self.patch_size) ** 2


# vit-toy is ours, the others are DeiT's.
PRESETS = {
    "vit-toy": Config(
        image_size=12, patch_size=4, classes=7, width=24, mlp_width=40, layers=3, heads=4
    ),
    "deit-tiny": Config(),
    "deit-small": Config(width=384, mlp_width=1536, heads=6),
    "deit-base": Config(width=768, mlp_width=3072, heads=12),
}


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, H, E, std = config.width, config.heads, config.head_width, shapes.hidden_std(config)
        self.query = Linear((D,), (H, E), std, rngs, bias=True)
        self.key = Linear((D,), (H, E), std, rngs, bias=True)
        self.value = Linear((D,), (H, E), std, rngs, bias=True)
        self.out = Linear((H, E), (D,), std, rngs, bias=True)
        self.scale = shapes.attention_scale(config)
        self.implementation = config.attention

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        mixed_BTHE = attention(
            self.query(x_BTD),
            self.key(x_BTD),
            self.value(x_BTD),
            scale=self.scale,
            causal=False,
            implementation=self.implementation,
        )
        return self.out(checkpoint_name(mixed_BTHE, "attention"))


class MLP(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        D, F, std = config.width, config.mlp_width, shapes.hidden_std(config)
        self.up = Linear((D,), (F,), std, rngs, bias=True)
        self.down = Linear((F,), (D,), std, rngs, bias=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=False))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: jax.Array, kept_2B: jax.Array) -> jax.Array:
        attention_B, mlp_B = kept_2B.astype(x_BTD.dtype)[..., None, None]
        x_BTD += attention_B * self.attention(self.attention_norm(x_BTD))
        return x_BTD + mlp_B * self.mlp(self.mlp_norm(x_BTD))


class ViT(nnx.Module):
    """The model as a module, for training code of your own; `forward` computes the same from a dictionary of weights.

    model = ViT(config, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    logits = model(images)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        D, std = config.width, config.init_std
        values = config.patch_size**2 * config.channels
        self.embed = Linear((values,), (D,), std, rngs, bias=True)
        self.class_token = nnx.Param(std * jax.random.normal(rngs.params(), (D,), jnp.float32))
        self.position = Embedding(1 + config.patches, D, std, rngs)
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)
        self.final_norm = LayerNorm(D, config.norm_eps)
        self.head = Linear((D,), (config.classes,), std, rngs, bias=True)

    def __call__(
        self,
        images_BHWC: jax.Array,
        *,
        key: jax.Array | None = None,
        place: Placement | None = None,
    ) -> jax.Array:
        """The logits of the classes, float32 [B, C]. Arguments and errors as in `forward`."""
        config, place = self.config, place or Placement()
        expected = (config.image_size, config.image_size, config.channels)
        if images_BHWC.ndim != 4 or images_BHWC.shape[1:] != expected:
            raise ValueError(
                f"images of shape {images_BHWC.shape} where [images, {', '.join(map(str, expected))}] is expected"
            )
        kept_L2B = kept_paths(config, len(images_BHWC), key)
        patches_BNP = patches(images_BHWC, config.patch_size).astype(config.dtype)
        x_BND = self.embed(patches_BNP)
        first_BD = jnp.broadcast_to(self.class_token[...], (len(x_BND), 1, config.width))
        x_BTD = jnp.concatenate([first_BD.astype(x_BND.dtype), x_BND], axis=1)
        x_BTD = place(x_BTD + self.position.embedding[...].astype(x_BTD.dtype))

        def layer(x_BTD: jax.Array, part: tuple[Block, jax.Array]) -> tuple[jax.Array, None]:
            block, kept_2B = part
            return place(block(x_BTD, kept_2B)), None

        x_BTD = apply_layers(layer, x_BTD, (self.blocks, kept_L2B), config)
        return self.head(self.final_norm(x_BTD[:, 0]) * shapes.readout(config), jnp.float32)


def patches(images_BHWC: jax.Array, size: int) -> jax.Array:
    """The square patches of `size` x `size` pixels, row by row: [B, N, size * size * channels]."""
    B, H, W, C = images_BHWC.shape
    squares = images_BHWC.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3)
    return squares.reshape(B, (H // size) * (W // size), size * size * C)


def kept_paths(config: Config, images: int, key: jax.Array | None) -> jax.Array:
    """The factors of the outputs of the sublayers, float32 [L, 2, B]; all ones without a key.

    A factor is 0 with the layer's probability p, else 1/(1 - p).
    """
    shape = (config.layers, 2, images)
    if key is None or config.drop_path == 0:
        return jnp.ones(shape)
    stay_L = 1 - jnp.linspace(0, config.drop_path, config.layers)[:, None, None]
    return jax.random.bernoulli(key, stay_L, shape) / stay_L


@functools.cache
def _graph(config: Config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))[0]


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial float32 weights as a nested dictionary; under `jax.eval_shape`, only their shapes."""
    return nnx.to_pure_dict(nnx.state(ViT(config, nnx.Rngs(key)), nnx.Param))


def forward(
    config: Config,
    params: dict[str, Any],
    images_BHWC: jax.Array,
    *,
    key: jax.Array | None = None,
    place: Placement | None = None,
) -> jax.Array:
    """The logits of the classes.

    Args:
      config: the shape of the model.
      params: weights as `init` makes them.
      images_BHWC: [B, image_size, image_size, channels], with a mean of about 0 and a standard deviation of about 1.
      key: the random key for stochastic depth in training; None, for evaluation, drops nothing.
      place: constrains the sharding of the activations [B, T, D] before and after every layer.

    Returns:
      float32 [B, C].

    Raises:
      ValueError: images of another size.
    """
    return nnx.merge(_graph(config), params)(images_BHWC, key=key, place=place)


def axes(config: Config) -> tuple[tuple[str, str], ...]:
    """All rules of `AXES`; they apply to every config."""
    del config
    return AXES


def count(config: Config) -> int:
    """The number of weights. Allocates none of them."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    return sum(math.prod(leaf.shape) for leaf in leaves)
