"""`python -m train bench`: benchmarks, printed as tables, and written as JSON with ``--out``.

    python -m train bench                                   # optimizers, refresh, quantile, spectra, memory, model
    python -m train bench contract --preset 20M             # every row of the contract table, tests/cases.py
    python -m train bench collectives --layout stacked
    python -m train bench loader loader-step                # whether training ever waits for data
    python -m train bench device device-step --preset 1B --tokens 32768 --layout stacked      # an accelerator's limits
    python -m train bench population                        # many small runs as one program
    python -m train bench accelerator --minutes 8 --out results/h200       # all of an accelerator; see its own --help
    taskset -c 0 python -m train bench spectra              # in one thread

The rows of a table run in one process, in turns, and the best of all rounds counts. Therefore ratios are reliable on a
busy machine, and absolute times are not. Times are CPU times of all threads unless the column says otherwise.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import tyro

from train.bench import (
    device,
    loader,
    optimizers,
    population,
    spectra,
    spectral_accuracy,
    training,
)
from train.bench.table import Options, Table
from train.display import say
from train.errors import UserError
from train.run.folder import environment

SECTIONS: dict[str, Callable[[Options], Table]] = {
    "optimizers": optimizers.steps_table,
    "contract": optimizers.contract_table,
    "refresh": optimizers.refresh_table,
    "quantile": optimizers.quantile_table,
    "collectives": optimizers.collectives_table,
    "spectra": spectra.exact_table,
    "spectra-step": spectra.steps_table,
    "spectra-memory": spectra.memory_table,
    "spectra-model": spectra.model_table,
    "accuracy": spectral_accuracy.synthetic_table,
    "accuracy-time": spectral_accuracy.time_table,
    "accuracy-trained": spectral_accuracy.trained_table,
    "training": training.training_table,
    "population": population.population_table,
    "device": device.limits_table,
    "device-step": device.training_table,
    "loader": loader.ceiling_table,
    "loader-step": loader.step_table,
}
Section = Literal[
    "optimizers",
    "contract",
    "refresh",
    "quantile",
    "collectives",
    "spectra",
    "spectra-step",
    "spectra-memory",
    "spectra-model",
    "accuracy",
    "accuracy-time",
    "accuracy-trained",
    "training",
    "population",
    "device",
    "device-step",
    "loader",
    "loader-step",
]
USUAL: tuple[Section, ...] = (
    "optimizers",
    "refresh",
    "quantile",
    "spectra",
    "spectra-step",
    "spectra-memory",
    "spectra-model",
)


@dataclasses.dataclass(frozen=True)
class Bench(Options):
    """Tables to measure, and their options."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = USUAL
    """Sections to run; each prints a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "collectives" in self.sections and len(self.sections) > 1:
            raise UserError(
                "The section collectives needs eight devices, and all others need one; run the section collectives"
                " alone."
            )


def main(arguments: list[str]) -> int:
    options = tyro.cli(Bench, args=arguments, prog="python -m train bench", description=__doc__)
    if "collectives" in options.sections:
        jax.config.update("jax_num_cpu_devices", 8)
    kept = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)  # the benchmarks measure compile times
    try:
        return _run(options)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _run(options: Bench) -> int:
    """All sections, one after the other; what is done is written after each."""
    facts = environment()
    say(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, commit {facts['commit']}")
    done: dict[str, Table] = {}
    for section in options.sections:
        done[section] = SECTIONS[section](options)
        say(f"\n{done[section]}")
        if options.out:
            whole = {name: dataclasses.asdict(table) for name, table in done.items()}
            text = json.dumps({"environment": facts, "tables": whole}, indent=1)
            pathlib.Path(options.out).write_text(text + "\n")
    return 0
