"""`python -m train COMMAND ...`; without a command, it trains a run."""

import importlib
import sys

from train import compilation_cache, disk
from train.errors import UserError

# Command to module; its `main(arguments)` returns the exit code.
COMMANDS = {
    "run": "train.main",
    "tokenise": "train.data.tokenise",
    "plan": "train.plan.main",
    "width": "train.study.width.main",
    "compare": "train.study.compare.main",
    "tune": "train.study.tune.main",
    "coordinate_check": "train.study.coordinate_check",
    "gains": "train.study.gains",
    "params": "train.weights.params",
    "torture": "train.torture.main",
    "export": "train.weights.export",
    "sample": "train.weights.sample",
    "figures": "train.run.overlay",
    "bench": "train.bench.main",
    "reference": "train.reference",
}

COMPILE_NOTHING = ("tokenise", "figures", "bench")  # or measure how long it takes


def main(arguments: list[str]) -> int:
    name, rest = (
        (arguments[0], arguments[1:])
        if arguments[:1] and arguments[0] in COMMANDS
        else ("run", arguments)
    )
    try:
        if name == "run" and {"-h", "--help"} & set(rest):
            importlib.import_module("train.cli").parse(
                rest
            )  # without the seconds of the other imports
        if name not in COMPILE_NOTHING:
            rest = compilation_cache.start(rest)
        return importlib.import_module(COMMANDS[name]).main(rest)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
