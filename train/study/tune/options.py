"""The options of `python -m train tune`, and the small model whose runs stand for those of the real one."""

import dataclasses
import itertools
import math
from typing import Annotated, Any

import tyro

from train.config import tree
from train.config.fields import Config, UserError, model_config, preset_of
from train.config.tree import flatten
from train.data.batches import STORE, TokenBatches
from train.step import families, optimizer
from train.study.small_runs import Setting, SmallProgram, SmallTask, fastest


@dataclasses.dataclass(frozen=True)
class Proxy:
    """The small model of the same family, and its runs. Learning rate and decay carry over to other widths by μP."""

    width: int = 64
    """Width of the model [features], at most that of the real model."""
    head_width: int = 16
    """Width of an attention head [features]; it divides the width."""
    layers: int = 2
    """Number of layers. Nothing corrects for another depth: use the real number if you can afford it."""
    tokenizer: str = "bytes"
    """As for --data.tokenizer. A large vocabulary makes a small model slow."""
    length: int = 64
    """Length of a sequence [tokens]."""
    batch_size: int = 8
    """Sequences per step."""
    steps: int = 1500
    """Updates per run, with a schedule of that length."""
    epochs: float | None = None
    """Times that a run sees its text, which is cut to that. Give those of the real run if it sees its text more than
    once, because the best decay depends on it. None: the whole text."""
    eval_batches: int = 32
    """Held-out batches for the loss at the end of a run."""


@dataclasses.dataclass(frozen=True)
class Tune:
    """How long to search, and with what."""

    minutes: float = 20.0
    """Time for this start. The same command with the same folder goes on where it stopped."""
    trials: int = 30
    """Points of the grid that the search may try, with one seed each."""
    seeds: int = 6
    """Runs of each of the best points. A seed decides the initial weights and the order of the text."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates to begin with, a geometric series; None: three around the optimizer's usual one."""
    weight_decays: tuple[float, ...] | None = None
    """Decay coefficients to begin with: 0, and a geometric series; None: 0 and two around the decay's usual one."""
    side_by_side: Annotated[bool | None, tyro.conf.FlagConversionOff] = None
    """Whether runs train side by side in one program; None: on accelerators they do, on CPUs they do not."""
    folder: str = "runs/tune"
    """Where results, table and picture go."""
    proxy: Proxy = dataclasses.field(default_factory=Proxy)


SHORT = 10  # steps
# Where a search begins, by the name of the optimizer: the middle of three peaks. Adam's for all others.
MIDDLE = {
    "conda": 0.016,
    "muon": 0.016,
    "normuon": 0.016,
    "adam_hyperball": 0.01,
    "muon_hyperball": 0.01,
    "sophia": 0.002,
    "exadam": 0.004,
    "lion": 0.001,
}


def check(tune: Tune, real: Config) -> None:
    """Raises UserError for options that are out of range, and for a run that cannot be tuned."""
    if families.task(real.model.preset) != "language":
        raise UserError(
            f"model.preset = {real.model.preset} learns images, and the small models of tune train on text; nearest:"
            " tiny. For images, compare short runs of python -m train that differ in --optimizer.learning_rate."
        )
    if real.model.weights is not None:
        raise UserError(
            "model.weights: tune trains small models from scratch, and no small model has these weights; leave it out."
        )
    if real.width is not None:
        raise UserError("width.base: tune chooses it and prints it; leave it out.")
    if flatten(real).get("decay.timescale") is not None:
        raise UserError(
            "decay.timescale: tune finds the decay itself, as decay.weight_decay; leave it out."
        )
    if (count := workers(real)) > 1 and tune.proxy.batch_size % count:
        raise UserError(
            f"--proxy.batch_size {tune.proxy.batch_size} cannot be split over the {count} workers of optimizer.name ="
            f" {real.optimizer.direction.name}; nearest: {-(-tune.proxy.batch_size // count) * count}."
        )
    proxy = tune.proxy
    for name, value in dataclasses.asdict(proxy).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--proxy.{name} {value} must be 1 or more; nearest: 1.")
    if proxy.epochs is not None and not 0 < proxy.epochs < math.inf:
        raise UserError(f"--proxy.epochs {proxy.epochs:g} must be above 0; nearest: 1.")
    if proxy.width % proxy.head_width:
        heads = max(1, proxy.width // proxy.head_width)
        raise UserError(
            f"--proxy.head_width {proxy.head_width} does not divide --proxy.width {proxy.width};"
            f" nearest: --proxy.width {heads * proxy.head_width}."
        )
    largest = model_config(real).width
    if proxy.width > largest:
        raise UserError(
            f"--proxy.width {proxy.width} is wider than the real model's {largest}; nearest: --proxy.width {largest}."
        )
    for name in ("trials", "seeds"):
        if getattr(tune, name) < 1:
            raise UserError(f"--{name} {getattr(tune, name)} must be 1 or more; nearest: 1.")
    if not tune.minutes > 0:
        raise UserError(f"--minutes {tune.minutes:g} must be above 0; nearest: 1.")
    _check_series("learning_rates", tune.learning_rates, 3)
    if tune.weight_decays is not None:
        _check_series("weight_decays", tuple(d for d in tune.weight_decays if d), 2)


def _check_series(name: str, values: tuple[float, ...] | None, least: int) -> None:
    if values is None:
        return
    ratios = [b / a for a, b in itertools.pairwise(values) if a > 0]
    if len(values) < least or len(ratios) < len(values) - 1 or min(ratios) < 1.1 * 0.999:
        raise UserError(
            f"--{name} {' '.join(f'{v:g}' for v in values)}: give {least} or more increasing numbers above 0, each"
            " at least 1.1 times the one before."
        )
    if max(ratios) > 1.01 * min(ratios):
        raise UserError(
            f"--{name} {' '.join(f'{v:g}' for v in values)} is no geometric series: each number must be the same"
            f" multiple of the one before, such as {values[0]:g} {values[1]:g} {values[1] ** 2 / values[0]:g}."
        )


def workers(config: Config) -> int:
    """Workers with gradients of their own, which small runs simulate: as many as mesh.replica, and two at least."""
    return max(2, config.mesh.replica) if config.optimizer.direction.workers else 1


def decays(config: Config) -> bool:
    """Whether the decay has a coefficient to tune."""
    return "decay.weight_decay" in flatten(config)


def grid(tune: Tune, real: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Learning rates and decay coefficients where the search begins."""
    middle = MIDDLE.get(real.optimizer.direction.name, 0.008)
    rates = tune.learning_rates or (middle / 2, middle, middle * 2)
    if not decays(real):
        return rates, (0.0,)
    usual = flatten(type(real.decay)())["weight_decay"]
    none = () if real.decay.name == "rotational" else (0.0,)  # its angle needs a decay above 0
    return rates, tune.weight_decays or (*none, 5 * usual, 20 * usual)


def first_deviation(tune: Tune, real: Config) -> float:
    """Standard deviation of the small model's initial matrices.

    Under μP hidden matrices start with a variance ∝ base width / width. This number at the base width gives hidden
    matrices of the real width the deviation that the real config asks for.
    """
    wide = model_config(real)
    return float(f"{wide.init_std * math.sqrt(wide.width / tune.proxy.width):.3g}")


def small_config(tune: Tune, real: Config) -> Config:
    """The config of one small run: the real one, with another shape and length.

    Lengths of schedules keep their share of the run. So do periods such as that of new spectra, which become shorter
    where the run does, but not shorter than `SHORT`.
    """
    proxy, preset = tune.proxy, model_config(real)
    heads = proxy.width // proxy.head_width
    changes: dict[str, Any] = {
        "model.width": proxy.width,
        "model.mlp_width": max(1, round(preset.mlp_width * proxy.width / preset.width)),
        "model.layers": proxy.layers,
        "model.heads": heads,
        "model.init_std": first_deviation(tune, real),
        "model.vocab_size": None,
        "data.length": proxy.length,
        "data.batch_size": proxy.batch_size,
        "run.steps": proxy.steps,
        "run.micro_batches": 1,
    }
    if hasattr(preset_of(real.model), "kv_heads"):
        groups = preset.heads // (preset.kv_heads or preset.heads)
        changes["model.kv_heads"] = max(1, heads // groups) if heads % groups == 0 else heads
    if hasattr(preset_of(real.model), "positions"):
        changes["model.positions"] = proxy.length
    if not real.data.text.startswith(STORE):
        changes["data.tokenizer"] = proxy.tokenizer
    share = proxy.steps / real.run.steps
    for name, value in flatten(real).items():
        if name.endswith(".refresh_every"):
            # A period of a few steps goes with the memory of a running mean, not with the length of the run.
            changes[name] = min(value, max(SHORT, round(share * value)))
        elif name.endswith(("schedule.steps", "bound.steps")) or (
            name.endswith(".freeze") and isinstance(value, int)
        ):
            changes[name] = max(1, round(share * value))
        elif name.endswith("schedule.warmup_steps"):
            changes[name] = round(share * value)
    return tree.replace(real, changes)


def small_program(tune: Tune, small: Config, data: TokenBatches) -> SmallProgram:
    """The runs of a small config, with learning rate and decay left open: the trainer's own chain of links."""
    proxy = tune.proxy
    task = SmallTask(
        length=proxy.length,
        batch_size=proxy.batch_size,
        clip=math.inf,  # the chain clips as the config says
        eval_batches=proxy.eval_batches,
        chunk=min(50, proxy.steps),
    )

    def build(setting: Setting) -> object:
        changes = {"optimizer.learning_rate": setting.peak}
        if decays(small):
            changes["decay.weight_decay"] = setting.weight_decay
        return optimizer.chain(tree.replace(small, changes), setting.axes)

    model = model_config(small, data.vocab_size)
    if small.model.attention is None:
        model = fastest(model)
    curvature = small.optimizer.direction.curvature
    return SmallProgram(task, model, build, workers(small), curvature)  # type: ignore[arg-type]
