"""Generates text with the weights of a run, or of a folder in the format of Hugging Face's transformers.

    python -m train sample RUN_OR_FOLDER [--prompt "..."] [--tokens 100] [--temperature 1] [--seed 0]
                                         [--top_k 50] [--top_p 0.9]

Without a prompt, the text starts like a new document. Tokens that the tokenizer.json of a folder puts before every
text, such as LLaMA's, are put before the prompt. With a temperature of 0, the most likely token is chosen every time.
`--top_k` chooses among that many likeliest tokens, and `--top_p` among as many of the likeliest as hold that share of
the probability; with both, the share is one of the first. The model's context is the end of the text, as long as the
sequences that it was trained on. The same seed gives the same text. Keys and values are kept in a cache
(key_value_cache.py) until the context is full; from then on the context moves with every token, which costs a pass over
all of it.
"""

import argparse
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import disk
from train.config.fields import Mesh
from train.data import tokens
from train.display import say
from train.errors import UserError
from train.run import kept_tokenizer
from train.step import families, sharding, tasks
from train.weights import hugging_face
from train.weights.hugging_face_config import longest, read_config
from train.weights.key_value_cache import decoder
from train.weights.trained import load_trained


class LanguageModel(NamedTuple):
    """A trained language model with its tokenizer."""

    model: Any  # a Config of models/
    params: Any
    tokenizer: tokens.Tokenizer
    window: int  # length of the context [tokens]
    begin: tuple[int, ...] = ()  # tokens before every text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train sample", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", type=disk.user_path, help="a run folder, or one in the format of transformers"
    )
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=100, help="number of tokens to generate")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 chooses the most likely token"
    )
    parser.add_argument(
        "--top_k", type=int, help="choose among this many likeliest tokens; default all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="choose among the likeliest tokens that together have this probability; default all",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise UserError(f"--tokens = {options.tokens} must be at least 1; nearest: 1.")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature = {options.temperature} must be 0 or more; nearest: 0.")
    if options.top_k is not None and options.top_k < 1:
        raise UserError(f"--top_k = {options.top_k} must be at least 1; nearest: 1.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        near = "1" if options.top_p > 1 else "a number above 0, such as 0.9"
        raise UserError(
            f"--top_p = {options.top_p} must be above 0 and at most 1; nearest: {near}."
        )
    for name in ("top_k", "top_p"):
        if options.temperature == 0 and getattr(options, name) is not None:
            raise UserError(
                f"--{name} = {getattr(options, name)} would have no effect: --temperature 0 always chooses the"
                " likeliest token. Leave one of the two out."
            )
    if not 0 <= options.seed < 1 << 32:
        raise UserError(
            f"--seed = {options.seed} must be 0 to {(1 << 32) - 1}; nearest:"
            f" {min(max(options.seed, 0), (1 << 32) - 1)}."
        )
    if any(0xD800 <= ord(letter) < 0xE000 for letter in options.prompt):
        raise UserError("--prompt must be valid UTF-8.")
    model = load_language_model(options.source)
    how = (options.temperature, options.seed, options.top_k, options.top_p)
    say(continue_text(model, options.prompt, options.tokens, *how))
    return 0


def load_language_model(folder: pathlib.Path) -> LanguageModel:
    """Loads the model in a run folder, or in a folder in the format of transformers.

    Raises:
        UserError: the folder is neither, or has no tokenizer that fits the model.
    """
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
        config, model, params, _, digest = load_trained(folder)
        tasks.only_language(config, "sample")
        tokenizer = kept_tokenizer.read(folder, digest)
        return LanguageModel(model, params, tokenizer, config.data.length)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is neither a run folder nor one with weights: it holds no config.json."
        )
    model = read_config(folder)
    try:
        tokenizer = tokens.read_vocabulary(folder)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model has only"
            f" {model.vocab_size}."
        )
    family = families.of(model)
    shapes = jax.eval_shape(lambda: family.init(model, jax.random.key(0)))
    mesh = sharding.make_mesh(Mesh(data=1), 1)
    places = sharding.of_parameters(family.axes(model), shapes, mesh)
    params = hugging_face.load_pretrained(folder, model, places)
    return LanguageModel(model, params, tokenizer, longest(folder), tokenizer.begin)


def continue_text(
    model: LanguageModel,
    prompt: str,
    count: int,
    temperature: float,
    seed: int,
    top_k: int | None = None,
    top_p: float | None = None,
) -> str:
    """The prompt with `count` generated tokens after it."""
    *prompt_tokens, separator = model.tokenizer.encode([prompt]).tolist()
    # In training, a document follows the separator of the previous one.
    start = [*model.begin, *prompt_tokens] or [separator]
    added = sample_tokens(model, start, count, temperature, seed, top_k, top_p)
    return model.tokenizer.decode(np.array(prompt_tokens + added, np.int64))


def sample_tokens(
    source: LanguageModel,
    start: list[int],
    count: int,
    temperature: float,
    seed: int,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[int]:
    """Generates `count` tokens after `start`, each drawn from the `choice` that the model's logits give."""
    model, params, tokenizer, window, _ = source
    window = min(window, len(start) + count)
    read, step = decoder(model, window)
    # float32 overflows when it divides by a smaller temperature, where sampling is greedy anyway.
    greedy = temperature < 1e-20
    pick = jax.jit(functools.partial(choice, tokenizer.vocab_size, greedy, top_k))
    key, text, cache = jax.random.key(seed), list(start), None
    for index in range(count):
        if cache is not None and len(text) <= window:
            logits_V, cache = step(params, np.int32(text[-1]), np.int32(len(text) - 1), cache)
        else:
            context = text[-window:]
            padded = np.zeros(window, np.int32)
            padded[: len(context)] = context
            logits_V, cache = read(params, padded, np.int32(len(context) - 1))
        key_here = jax.random.fold_in(key, index)
        text.append(int(pick(logits_V, temperature or 1.0, top_p, key_here)))
    return text[len(start) :]


def choice(
    vocab_size: int,
    greedy: bool,
    top_k: int | None,
    logits_V: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    """Draws a token from softmax(logits / temperature), or from the likeliest tokens alone.

    Args:
        vocab_size: tokens of the tokenizer; a model may have more rows.
        greedy: whether the likeliest token is chosen instead.
        top_k: number of tokens to choose from; None: all.
        logits_V: float [V].
        temperature: above 0.
        top_p: the likeliest tokens are kept whose predecessors have less probability than this together; None: all.
        key: of the draw.
    """
    logits_V = logits_V[:vocab_size]
    if greedy:
        return jnp.argmax(logits_V)
    if top_k is None and top_p is None:  # without sorting all tokens
        return jax.random.categorical(key, logits_V / temperature)
    scores, tokens = jax.lax.top_k(logits_V / temperature, min(top_k or vocab_size, vocab_size))
    share = jax.nn.softmax(scores)
    before = jnp.cumsum(share) - share
    least = jnp.float32(1.0 if top_p is None else top_p)
    kept = (before < least) | (jnp.arange(len(scores)) == 0) | (least >= 1)
    return tokens[jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))]
