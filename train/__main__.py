"""`python -m train COMMAND ...`; without a command, it trains a run."""

import importlib
import sys

from train import compilation_cache, disk
from train.commands import COMMANDS
from train.errors import UserError

try:
    from train import help
except ModuleNotFoundError as missing:
    sys.exit(
        f"The training program needs the package {missing.name}, which this Python ({sys.executable}) does not"
        " have. In a checkout, python3 train/environment.py -m train sets everything up; source"
        " .venv/bin/activate uses it. Into an environment of your own: pip install . ./train"
    )

COMPILE_NOTHING = ("tokenise", "bench")  # or measure how long it takes


def main(arguments: list[str]) -> int:
    name, rest = _command(arguments)
    try:
        if name == "run" and set(help.ASKS) & set(rest):
            importlib.import_module("train.cli").parse(rest)  # without the imports of train.main
        if name not in COMPILE_NOTHING:
            rest = compilation_cache.start(rest)
        return importlib.import_module(COMMANDS[name].module).main(rest)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in disk.REFUSED:
            raise
        print(
            f"\n{error.filename or 'A file'} cannot be written: {error.strerror}. Everything up to the"
            " last checkpoint is safe; make room, and start the command again.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was saved after the last checkpoint", file=sys.stderr)
        return 130


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command of a line, and its arguments: `help tune` and `--help tune` ask for the help of tune."""
    if arguments[:1] == ["help"]:
        arguments = ["--help", *arguments[1:]]
    topic = arguments[1] if len(arguments) > 1 and arguments[0] in help.ASKS else None
    if topic in COMMANDS and topic not in help.groups():
        return topic, ["--help"]
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return "run", arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
