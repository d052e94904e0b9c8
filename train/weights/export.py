"""Writes the weights of a run as Hugging Face's transformers reads them.

    python -m train export RUN --out FOLDER [--dtype bfloat16] [--largest 5000000000]

Of the newest checkpoint whose weights are what was saved. The tokenizer goes along as tokenizer.json
where it is one that such a file can describe and the text of the run can still be read.
"""

import argparse
import json
import pathlib

from train.config.fields import Config, UserError
from train.data.loading import read_data
from train.data.tokens import Subwords, Tokenizer
from train.display import say
from train.step import tasks
from train.weights import hugging_face
from train.weights.trained import newest


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=pathlib.Path, help="a run folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--largest", type=int, default=hugging_face.LARGEST_FILE, help="bytes of one file"
    )
    asked = parser.parse_args(arguments)
    if asked.largest < 1:
        raise UserError(f"--largest = {asked.largest} must be at least 1 byte; nearest: 1.")
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise UserError(f"{asked.out} is not an empty folder; name another with --out.")
    config, model, params, step = newest(asked.run)
    tasks.only_language(config, "export")
    tokenizer = tokenizer_of(config)
    files = hugging_face.save(
        asked.out,
        model,
        params,
        length=config.data.length,
        separator=None if tokenizer is None else tokenizer.separator,
        dtype=asked.dtype,
        largest=asked.largest,
    )
    if isinstance(tokenizer, Subwords):
        (asked.out / "tokenizer.json").write_text(tokenizer.to_json())
        end = {"eos_token": tokenizer.library.id_to_token(tokenizer.separator)}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **end}
        (asked.out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
        files.append("tokenizer.json")
    say(f"step {step} of {asked.run}: {', '.join(files)} in {asked.out}")
    return 0


def tokenizer_of(config: Config) -> Tokenizer | None:
    """That of a run, or None if its text is gone."""
    try:
        return read_data(config).tokenizer
    except UserError as error:
        say(f"The tokenizer does not go along. {error}")
        return None
