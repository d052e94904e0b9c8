"""Exports the weights of a run in the format of Hugging Face's transformers.

    python -m train export RUN --out FOLDER [--dtype bfloat16] [--largest 5000000000]

The weights come from the newest intact checkpoint. The tokenizer comes from the run folder, and is exported as
tokenizer.json and tokenizer_config.json, unless it is "bytes".
"""

import argparse

from train import disk
from train.display import say
from train.errors import UserError
from train.run import kept_tokenizer
from train.step import tasks
from train.weights import hugging_face
from train.weights.trained import load_trained


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=disk.user_path, help="a run folder")
    parser.add_argument("--out", type=disk.user_path, required=True, help="a new folder")
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
    config, model, params, step, digest = load_trained(options.run)
    tasks.only_language(config, "export")
    tokenizer = kept_tokenizer.read(options.run, digest)
    files = hugging_face.save_pretrained(
        options.out,
        model,
        params,
        length=config.data.length,
        separator=tokenizer.separator,
        dtype=options.dtype,
        largest=options.largest,
    )
    files += kept_tokenizer.write_vocabulary(options.out, tokenizer)
    say(f"step {step} of {options.run}: {', '.join(files)} in {options.out}")
    return 0
