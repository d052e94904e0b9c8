"""`python -m train COMMAND ...`; without a command, it trains a run."""

import contextlib
import importlib
import os
import signal
import sys

from train import compilation_cache, disk
from train.commands import ASKS, COMMANDS
from train.errors import UserError

OWN = ("train", "models", "optax_decay")
COMPILE_NOTHING = (
    "tokenise",
    "figures",
    "bench",
    "bench accelerator",
)  # or measure how long it takes


def main(arguments: list[str]) -> int:
    try:
        name, rest = _command(arguments)
        if name == "run" and set(ASKS) & set(rest):
            importlib.import_module("train.cli").parse(rest)  # without the imports of train.main
        if name not in COMPILE_NOTHING:
            rest = compilation_cache.start(rest)
        return importlib.import_module(COMMANDS[name].module).main(rest)
    except BrokenPipeError as error:
        if not disk.reader_is_gone(1):  # a run goes on without its reader; this is of another pipe
            raise error
        disk.lose(1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        tell("stopped; nothing was saved after the last checkpoint")
        return 130
    except Exception as error:
        if (text := explanation(error)) is None:
            raise
        tell(text)
        return 2


def explanation(error: Exception) -> str | None:
    """What a user is told instead of a traceback; None for errors of the program itself."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in disk.REFUSED:
        return (
            f"{error.filename or 'A file'} cannot be written: {error.strerror}. Everything up to the last checkpoint"
            " is safe; make room, and start the command again."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{disk.shortened(error.filename)} cannot be used: {error.strerror or error}."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"There is not enough memory: {disk.first_line(error) or 'the machine has no more'}. Nearest: a smaller"
            " --data.batch_size or --data.length, more --run.micro_batches, a smaller model, or more devices; `python"
            " -m train plan` with the same flags says what a run needs. Everything up to the last checkpoint is safe."
        )
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] not in OWN:
        return (
            f"The training program needs the package {error.name}, which this Python ({sys.executable}) does not"
            " have. In a checkout, python3 train/environment.py -m train sets everything up; source"
            " .venv/bin/activate uses it. Into an environment of your own: pip install . ./train"
        )
    return None


def tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed, too
        print(f"\n{text}", file=sys.stderr, flush=True)


def open_missing() -> None:
    """Opens standard streams that were closed, so that no file of a run takes their number, and prints go nowhere."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def drop_unwritten() -> None:
    """Drops what cannot be written any more, so that the interpreter does not complain of it at its end."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # AttributeError: it was closed from the start
            disk.lose(descriptor)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command of a line, and its arguments: `help tune` and `--help tune` ask for the help of tune."""
    for words in (2, 1):
        if " ".join(arguments[:words]) in COMMANDS and len(arguments) >= words:
            return " ".join(arguments[:words]), arguments[words:]
    if arguments[:1] == ["help"]:
        arguments = ["--help", *arguments[1:]]
    topic = arguments[1] if len(arguments) > 1 and arguments[0] in ASKS else None
    if topic in COMMANDS and topic not in importlib.import_module("train.help").groups():
        return topic, ["--help"]
    return "run", arguments


if __name__ == "__main__":
    code = None
    open_missing()
    try:
        code = main(sys.argv[1:])
    except SystemExit as asked:  # after --help, or for a wrong flag
        code = asked.code
    finally:
        drop_unwritten()
    if code and "train.processes" in sys.modules:
        code = sys.modules["train.processes"].end(code)
    sys.exit(code)
