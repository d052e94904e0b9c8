"""`python -m train COMMAND ...`; without a command, it trains a run."""

import importlib
import sys

from train import disk
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
    "bench": "train.bench.main",
    "bench accelerator": "train.bench.accelerator",  # imports less: only what a bare machine has
    "reference": "train.reference",
}


def main(arguments: list[str]) -> int:
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 0)
    name, rest = " ".join(arguments[:words]) or "run", arguments[words:]
    try:
        if name == "run" and {"-h", "--help"} & set(rest):
            importlib.import_module("train.cli").parse(
                rest
            )  # without the seconds of the other imports
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
