"""What a user sees of errors: one message, of the command that was typed, and never a traceback."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.runs import flags
from train import __main__ as command
from train import display

ROOT = pathlib.Path(__file__).parents[2]
LONG = "x" * 5000


@pytest.mark.parametrize("path", ["~nosuchuser/x", LONG, "/dev/zero", "FIFO"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "PATH"],
        ["--resume", "PATH"],
        ["--model.weights", "PATH"],
        ["--data.text", "PATH"],
        ["--data.text", "store:PATH"],
        ["--data.tokenizer", "PATH"],
        ["--run.folder", "PATH"],
        ["tokenise", "--out", "PATH", "--tokenizer", "bytes"],
        ["tokenise", "--source", "PATH", "--out", "OUT"],
        ["sample", "PATH"],
        ["export", "PATH", "--out", "OUT"],
        ["params", "PATH", "--out", "OUT"],
        ["--model.preset", "vit-toy", "--images.folder", "PATH"],
    ],
    ids=" ".join,
)
def test_paths_that_cannot_be_used(tmp_path, capsys, arguments, path):
    os.mkfifo(tmp_path / "fifo")
    path = str(tmp_path / "fifo") if path == "FIFO" else path
    words = {"PATH": path, "store:PATH": f"store:{path}", "OUT": str(tmp_path / "out")}
    asked = [words.get(word, word) for word in arguments]
    if (
        arguments[0] in ("--data.text", "--data.tokenizer", "--run.folder")
        and arguments[1] == "PATH"
    ):
        asked = [*flags(tmp_path), *asked]
    assert command.main(asked) == 2
    said = capsys.readouterr().err.strip()
    assert said and "Traceback" not in said and len(said) < 1600
    assert path[:30] in said or "FIFO" in said


SIZES = [
    ("--model.width 200000 --model.heads 8", "state of optimizer and decay"),
    ("--data.batch_size 2147483647", "inputs of the layers"),
    ("--model.layers 2147483647", "state of optimizer and decay"),
    ("--model.vocab_size 2147483647", "state of optimizer and decay"),
]


@pytest.mark.parametrize(("more", "largest"), SIZES)
def test_sizes_that_no_machine_has(tmp_path, capsys, more, largest):
    assert command.main(flags(tmp_path, *more.split())) == 2
    said = capsys.readouterr().err
    assert f"GB of it for {largest}, needs" in said and "GB; there are" in said
    assert "train plan" in said
    assert not (tmp_path / "run").exists()  # nothing has begun


def test_memory_that_runs_out_is_one_message(monkeypatch, capsys):
    import train.main

    errors = [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes\nstack"),
    ]
    for error in errors:

        def fail(arguments, error=error):
            raise error

        monkeypatch.setattr(train.main, "main", fail)
        assert command.main(["run"]) == 2
        said = capsys.readouterr().err
        assert "not enough memory" in said and "--run.micro_batches" in said and "stack" not in said


def test_a_reader_that_goes_away_does_not_end_the_program(capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        for _ in range(3):
            display.say("into the void " * 10_000)
        gone.flush()  # nothing that could fail is left
    monkeypatch.setattr(sys, "stdout", None)  # closed before the program began
    display.say("nowhere")


def test_help_into_head_says_nothing_else():
    line = f"{sys.executable} -m train --help | head -n 2"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2
