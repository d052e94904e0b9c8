"""Continues a text with the weights of a run, or with those of a folder that transformers reads.

    python -m train sample RUN_OR_FOLDER [--prompt "..."] [--tokens 100] [--temperature 1] [--seed 0]

Without a prompt the text starts where texts of the training data start; what a folder's tokenizer.json puts
before every text, as LLaMA's does, the model sees there too. Temperature 0 takes the most
likely token each time. Of a long text the model sees as much of the end as it was trained on at once.
The same seed gives the same text. Every token costs a pass over that window: no keys and values are kept.
"""

import argparse
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config.fields import Mesh, UserError
from train.data import tokens
from train.data.loading import read_data
from train.display import say
from train.step import families, sharding, tasks
from train.weights import hugging_face
from train.weights.hugging_face_config import longest, read_config
from train.weights.trained import newest


class Source(NamedTuple):
    """What text is made with."""

    model: Any  # Config of models/
    params: Any
    tokenizer: tokens.Tokenizer
    window: int  # tokens that the model sees at once
    begin: tuple[int, ...] = ()  # tokens that stand before every text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train sample", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", type=pathlib.Path, help="a run folder, or one that transformers reads"
    )
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=100, help="how many to add")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    if asked.tokens < 1:
        raise UserError(f"--tokens = {asked.tokens} must be at least 1; nearest: 1.")
    if not 0 <= asked.temperature < math.inf:
        raise UserError(f"--temperature = {asked.temperature} must be 0 or more; nearest: 0.")
    if not 0 <= asked.seed < 1 << 32:
        raise UserError(
            f"--seed = {asked.seed} must be 0 to {(1 << 32) - 1}; nearest:"
            f" {min(max(asked.seed, 0), (1 << 32) - 1)}."
        )
    if any(0xD800 <= ord(letter) < 0xE000 for letter in asked.prompt):
        raise UserError("--prompt is not text in UTF-8; write it in that.")
    say(text(source(asked.source), asked.prompt, asked.tokens, asked.temperature, asked.seed))
    return 0


def source(folder: pathlib.Path) -> Source:
    """The model in a folder of either kind.

    Raises:
        UserError: it is of neither, or there is no tokenizer for it.
    """
    if (folder / "checkpoints").is_dir():
        config, model, params, _ = newest(folder)
        tasks.only_language(config, "sample")
        return Source(model, params, read_data(config).tokenizer, config.data.length)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds neither a run nor weights: there is no config.json in it.")
    model = read_config(folder)
    try:
        tokenizer = tokens.given(folder)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}."
        )
    family = families.of(model)
    shapes = jax.eval_shape(lambda: family.init(model, jax.random.key(0)))
    mesh = sharding.make_mesh(Mesh(data=1), 1)
    places = sharding.of_parameters(family.axes(model), shapes, mesh)
    params = hugging_face.load(folder, model, places)
    return Source(model, params, tokenizer, longest(folder), tokenizer.begin)


def text(source: Source, prompt: str, count: int, temperature: float, seed: int) -> str:
    """The prompt and what follows it."""
    *given, end = source.tokenizer.encode([prompt]).tolist()
    # A text begins behind the separator of the one before it.
    start = [*source.begin, *given] or [end]
    added = continuation(source, start, count, temperature, seed)
    return source.tokenizer.decode(np.array(given + added, np.int64))


def continuation(
    source: Source, given: list[int], count: int, temperature: float, seed: int
) -> list[int]:
    """`count` tokens after those given, each drawn from softmax(logits / temperature)."""
    model, params, tokenizer, window, _ = source
    window = min(window, len(given) + count)
    # Below that, float32 can no longer divide; nothing but the likeliest would be drawn.
    greedy = temperature < 1e-20
    step = jax.jit(functools.partial(_next, model, tokenizer.vocab_size, greedy))
    key, found = jax.random.key(seed), list(given)
    for index in range(count):
        seen = found[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(seen)] = seen
        drawn = jax.random.fold_in(key, index)
        found.append(int(step(params, padded, len(seen) - 1, temperature or 1.0, drawn)))
    return found[len(given) :]


def _next(
    model: Any,
    vocab_size: int,
    greedy: bool,
    params: Any,
    tokens_1T: jax.Array,
    last: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The token after position `last`; what stands behind it is not seen. Only tokens that mean something."""
    logits_V = families.of(model).forward(model, params, tokens_1T)[0, last, :vocab_size]
    if greedy:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / temperature)
