"""Training runs small enough for tests: a text, flags for a toy model on it, and ways to run them."""

import os
import pathlib
import random
import signal

import pytest

from train import main
from train.cli import parse
from train.run import log
from train.run.records import read_records

WIDTH = "--model.preset toy --model.width 16 --model.mlp_width 20 --model.layers 2 --model.heads 2"
TOY = (
    f"{WIDTH} --model.kv_heads 1 --data.tokenizer bytes --data.length 12 --data.batch_size 8"
    " --mesh.data 1 --run.steps 6 --run.eval_every 2 --run.eval_batches 2 --run.save_every 2"
    " --run.keep 9 --run.tensorboard False"
).split()


def write_text(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """30 kB of words with a Zipf-like frequency, in a file."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghij", k=n % 7 + 1)) for n in range(50)]
    weights = [1 / (n + 1) for n in range(50)]
    path = folder / "text.txt"
    path.write_text(" ".join(generator.choices(words, weights, k=7000)))
    return path


def flags(folder: pathlib.Path, *more: str) -> list[str]:
    """Of a toy run in folder/run on the text in `folder`; `more` overrides."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(folder)
    own = ["--data.text", str(text), "--data.cache", str(folder / "cache")]
    return [*TOY, *own, "--run.folder", str(folder / "run"), *more]


def program(folder: pathlib.Path, *more: str) -> main.Run:
    """A toy run, before its first step: its program and its data."""
    config = parse(flags(folder, *more))
    return main.assemble(config, main.read_data(config))


def records(run: pathlib.Path) -> list[dict]:
    """All records of a run without the clock's."""
    path = run / "metrics.jsonl"
    found = read_records(path)
    assert len(found) == path.read_bytes().count(b"\n")  # none is damaged
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def losses(run: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(run) if r["kind"] == "train"}


def interrupt_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """From here on, a run gets a signal right after it has started `step`."""
    plain = log.Recorder.train

    def train(self, now, noted):
        plain(self, now, noted)
        if now == step:
            os.kill(os.getpid(), number)

    patch.setattr(log.Recorder, "train", train)
