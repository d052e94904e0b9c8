"""`python -m train bench`: what the library costs, as tables, and as JSON with ``--out``.

    python -m train bench                                   # optimizers, refresh, quantile, spectra, memory, model
    python -m train bench contract --preset 20M             # every row of the contract table
    python -m train bench collectives --layout stacked
    python -m train bench loader loader-step                # whether reading keeps a step fed
    python -m train bench device device-step --preset 1B --tokens 32768 --layout stacked      # of an accelerator
    taskset -c 0 python -m train bench spectra              # one thread each

What one table compares runs in one process, in turns, and the best of the rounds counts: ratios hold on a busy machine,
seconds do not. Times are CPU time of all threads unless a column says otherwise.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import tyro

from train.bench import device as bench_device
from train.bench import loader as bench_loader
from train.bench import optimizers as bench_optimizers
from train.bench import products as bench_products
from train.bench import spectra as bench_spectra
from train.bench import training as bench_training
from train.bench.table import Options, Table
from train.config.fields import UserError
from train.display import say
from train.run.folder import environment

SECTIONS: dict[str, Callable[[Options], Table]] = {
    "optimizers": bench_optimizers.steps_table,
    "contract": bench_optimizers.contract_table,
    "refresh": bench_optimizers.refresh_table,
    "quantile": bench_optimizers.quantile_table,
    "collectives": bench_optimizers.collectives_table,
    "spectra": bench_spectra.exact_table,
    "spectra-step": bench_spectra.steps_table,
    "spectra-memory": bench_spectra.memory_table,
    "spectra-model": bench_spectra.model_table,
    "products": bench_products.made_up_table,
    "products-time": bench_products.products_time_table,
    "products-trained": bench_products.trained_table,
    "training": bench_training.training_table,
    "device": bench_device.limits_table,
    "device-step": bench_device.training_table,
    "loader": bench_loader.ceiling_table,
    "loader-step": bench_loader.step_table,
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
    "products",
    "products-time",
    "products-trained",
    "training",
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
    """Which tables."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = USUAL
    """Tables to measure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "collectives" in self.sections and len(self.sections) > 1:
            raise UserError(
                "collectives are counted for eight devices, and times are taken on one: ask for the section"
                " collectives alone."
            )


def main(arguments: list[str]) -> int:
    options = tyro.cli(Bench, args=arguments, prog="python -m train bench", description=__doc__)
    if "collectives" in options.sections:
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
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
