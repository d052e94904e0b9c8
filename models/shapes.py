"""Checks that the configs of all models share, and the three numbers that depend on the base width.

With a `base_width` D₀ a model of width D is parametrised so that hyperparameters found at width D₀ transfer to it (μP,
arXiv 2203.03466). Hidden matrices start with the variance init_std² D₀/D. The input of the head is multiplied by D₀/D.
Attention scores are multiplied by sqrt(E₀)/E instead of 1/sqrt(E), where E is the width of a head and E₀ that of the
base model. At D = D₀ the model equals the one without a base width.
"""

import math
from typing import Any

import jax.numpy as jnp


def check(
    config: Any, *, sizes: tuple[str, ...], positive: tuple[str, ...], choices: tuple[str, ...]
) -> None:
    """Checks the fields that every model has.

    Args:
      config: a model's Config with `heads`, `width`, `base_width`, `base_head_width`, `attention`.
      sizes: fields that are at least 1.
      positive: fields above 0.
      choices: fields that are one of their `Literal`.

    Raises:
      ValueError: a bad value; the message names the field, the value and what is allowed.
    """
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    for name in ("base_width", "base_head_width"):
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1, or None")
    if config.base_head_width is not None and config.base_width is None:
        raise ValueError(f"base_head_width={config.base_head_width} needs a base_width as well")
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be greater than 0 and finite")
    for name in choices:
        allowed = type(config).__annotations__[name].__args__
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} must be one of {allowed}")
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise ValueError('attention="cudnn" needs dtype="bfloat16"; for float32 take "xla"')


def check_heads(config: Any, unit: int = 1) -> None:
    """Raises ValueError unless the heads divide the width into parts of a multiple of `unit` features.

    The message suggests numbers of heads and widths that work together, with the key and value heads too.
    """
    width, heads = config.width, config.heads
    groups = max(1, getattr(config, "kv_heads", None) or 1)
    if width % (unit * heads):
        even = " into heads of an even number of features" if unit == 2 else ""
        raise ValueError(
            f"heads={heads} must divide width={width}{even}; "
            f"nearest: {_nearest_shape(width, heads, unit, groups)}"
        )


def _nearest_shape(width: int, heads: int, unit: int, groups: int) -> str:
    """The nearest number of heads for this width, a multiple of `groups`, and the nearest width for these heads."""
    found = []
    fitting = [n for n in range(groups, width // unit + 1, groups) if width % (unit * n) == 0]
    if fitting:
        found.append(f"heads={min(fitting, key=lambda n: abs(n - heads))}")
    kept = max(1, round(heads / groups)) * groups
    with_heads = "" if kept == heads else f" with heads={kept}"
    if not (found and with_heads):
        part = unit * kept
        found.append(f"width={max(1, round(width / part)) * part}{with_heads}")
    return ", or ".join(found)


def check_tokens(tokens_BT: Any, positions: int | None = None) -> None:
    """Raises ValueError unless tokens are integers of shape [B, T], at most `positions` in a row.

    Their values are not read: a token at or above the vocabulary size takes the last row of the embedding.
    """
    shape = jnp.shape(tokens_BT)
    if len(shape) != 2:
        advice = "; add the axis of sequences with tokens[None]" if len(shape) == 1 else ""
        raise ValueError(
            f"tokens of shape {shape} where [sequences, positions] is expected{advice}"
        )
    dtype = jnp.result_type(tokens_BT)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens of dtype {dtype} where integers are expected")
    if positions is not None and shape[1] > positions:
        raise ValueError(f"a sequence of {shape[1]} tokens is longer than positions={positions}")


def nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted), default=1)


def readout(config: Any) -> float:
    """The factor of the head's input, D₀/D."""
    return 1.0 if config.base_width is None else config.base_width / config.width


def hidden_std(config: Any) -> float:
    """The standard deviation of hidden matrices at initialisation."""
    return config.init_std * math.sqrt(readout(config))


def attention_scale(config: Any) -> float:
    """The factor of the products of queries and keys."""
    base = config.base_head_width or config.head_width
    return math.sqrt(base / config.head_width) / math.sqrt(config.head_width)
