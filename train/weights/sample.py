"""Generates text with the weights of a run, or of a folder in the format of Hugging Face's transformers.

    python -m train sample RUN_OR_FOLDER [--prompt "..."] [--tokens 100] [--temperature 1] [--seed 0]

Without a prompt, the text starts like a new document. Tokens that the tokenizer.json of a folder puts before every
text, such as LLaMA's, are put before the prompt. With a temperature of 0, the most likely token is chosen every time.
The model's context is the end of the text, as long as the sequences that it was trained on. The same seed gives the
same text. There is no cache of keys and values, so every token costs one forward pass over the context.
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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise UserError(f"--tokens = {options.tokens} must be at least 1; nearest: 1.")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature = {options.temperature} must be 0 or more; nearest: 0.")
    if not 0 <= options.seed < 1 << 32:
        raise UserError(
            f"--seed = {options.seed} must be 0 to {(1 << 32) - 1}; nearest:"
            f" {min(max(options.seed, 0), (1 << 32) - 1)}."
        )
    if any(0xD800 <= ord(letter) < 0xE000 for letter in options.prompt):
        raise UserError("--prompt must be valid UTF-8.")
    model = load_language_model(options.source)
    say(continue_text(model, options.prompt, options.tokens, options.temperature, options.seed))
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
    model: LanguageModel, prompt: str, count: int, temperature: float, seed: int
) -> str:
    """The prompt with `count` generated tokens after it."""
    *prompt_tokens, separator = model.tokenizer.encode([prompt]).tolist()
    # In training, a document follows the separator of the previous one.
    start = [*model.begin, *prompt_tokens] or [separator]
    added = sample_tokens(model, start, count, temperature, seed)
    return model.tokenizer.decode(np.array(prompt_tokens + added, np.int64))


def sample_tokens(
    source: LanguageModel, start: list[int], count: int, temperature: float, seed: int
) -> list[int]:
    """Generates `count` tokens after `start`, each drawn from softmax(logits / temperature)."""
    model, params, tokenizer, window, _ = source
    window = min(window, len(start) + count)
    # float32 overflows when it divides by a smaller temperature, where sampling is greedy anyway.
    greedy = temperature < 1e-20
    step = jax.jit(functools.partial(_next, model, tokenizer.vocab_size, greedy))
    key, text = jax.random.key(seed), list(start)
    for index in range(count):
        context = text[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(context)] = context
        key_here = jax.random.fold_in(key, index)
        text.append(int(step(params, padded, len(context) - 1, temperature or 1.0, key_here)))
    return text[len(start) :]


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
    """Samples the token after position `last`. Causal attention ignores the padding behind it."""
    logits_V = families.of(model).forward(model, params, tokens_1T)[0, last, :vocab_size]
    if greedy:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / temperature)
