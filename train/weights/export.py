"""Exports the weights of a run in the format of Hugging Face's transformers.

    python -m train export RUN --out FOLDER [--dtype bfloat16] [--largest 5000000000]

The weights come from the newest intact checkpoint. The tokenizer is exported as tokenizer.json, unless it is "bytes",
or the text of the run can no longer be read.
"""

import argparse
import json
import pathlib

from train.config.fields import Config
from train.data.loading import read_data
from train.data.tokens import Subwords, Tokenizer
from train.display import say
from train.errors import UserError
from train.step import tasks
from train.weights import hugging_face
from train.weights.trained import load_trained


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=pathlib.Path, help="a run folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--largest",
        type=int,
        default=hugging_face.LARGEST_FILE,
        help="largest size of a file [bytes]",
    )
    options = parser.parse_args(arguments)
    if options.largest < 1:
        raise UserError(f"--largest = {options.largest} must be at least 1 byte; nearest: 1.")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"{options.out} must be a new or an empty folder; name another with --out.")
    config, model, params, step = load_trained(options.run)
    tasks.only_language(config, "export")
    tokenizer = tokenizer_of(config)
    files = hugging_face.save_pretrained(
        options.out,
        model,
        params,
        length=config.data.length,
        separator=None if tokenizer is None else tokenizer.separator,
        dtype=options.dtype,
        largest=options.largest,
    )
    if isinstance(tokenizer, Subwords):
        (options.out / "tokenizer.json").write_text(tokenizer.to_json())
        end = {"eos_token": tokenizer.library.id_to_token(tokenizer.separator)}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **end}
        (options.out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
        files.append("tokenizer.json")
    say(f"step {step} of {options.run}: {', '.join(files)} in {options.out}")
    return 0


def tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer of a run; None if its text cannot be read."""
    try:
        return read_data(config).tokenizer
    except UserError as error:
        say(f"The tokenizer is not exported. {error}")
        return None
