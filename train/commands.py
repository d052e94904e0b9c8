"""The commands of `python -m train`: their modules, and what each does."""

from typing import NamedTuple


class Command(NamedTuple):
    """One command. `main(arguments)` of its module returns the exit code."""

    module: str
    does: str


ASKS = ("-h", "--help")
COMMANDS = {
    "run": Command("train.main", "trains a run; this is also what happens without a command"),
    "tokenise": Command("train.data.tokenise", "encodes a text once, for many runs"),
    "plan": Command(
        "train.plan.main", "costs of a run without a device; `plan population`: of many small runs"
    ),
    "plan population": Command(
        "train.plan.population", "kernels of many runs as one program, compiled for a GPU"
    ),
    "tune": Command("train.study.tune.main", "finds learning rate and decay for your text"),
    "compare": Command(
        "train.study.regimes.main", "which decay and optimizer gains what, and where"
    ),
    "width": Command("train.study.width.main", "best learning rate and decay at several widths"),
    "coordinate_check": Command(
        "train.study.coordinate_check", "whether activations keep their size as width grows"
    ),
    "gains": Command("train.study.gains", "largest singular values beside those of a small model"),
    "figures": Command("train.run.overlay", "lays the losses of several runs over each other"),
    "sample": Command("train.weights.sample", "generates text with the weights of a run"),
    "params": Command("train.weights.params", "writes the weights of a run alone"),
    "export": Command("train.weights.export", "writes weights in the format of transformers"),
    "bench": Command(
        "train.bench.main",
        "times, memory, precision; `bench accelerator`: a few minutes of a GPU",
    ),
    "bench accelerator": Command(
        "train.bench.accelerator", "everything that a few minutes of a GPU or TPU can tell"
    ),
    "torture": Command("train.torture.main", "kills, damages and resumes runs, and counts losses"),
    "reference": Command("train.reference", "builds the documentation as a static site"),
}
