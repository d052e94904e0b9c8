"""Reads a config from the command line, JSON or a run folder, and refuses what cannot be meant.

    python -m train [EXPERIMENT | --config FILE | --resume FOLDER] [--group.field VALUE ...]

The first part says where to start from: an experiment of `experiments.py` (without one, the first),
a JSON file such as a run's config.json, or an existing run folder; flags then change single fields.
Everything wrong is said before anything is computed, as a `UserError`: one clear paragraph.
"""

import dataclasses
import json
import math
import pathlib
import re
import types
import typing
from typing import Annotated, Any, Literal

import tyro

from train.config.experiments import EXPERIMENTS
from train.config.fields import (
    Config,
    Data,
    Images,
    Model,
    UserError,
    flatten,
    model_config,
    nearest,
    replace,
    resolved,
)
from train.config.ranges import Range
from train.config.rules import BOUNDED, OPTIMIZERS, PROXIMAL, SPECTRAL
from train.data.batches import STORE
from train.step import families
from train.weights.hugging_face_config import shape_from_weights

PROGRAM = "python -m train"


def parse(arguments: list[str]) -> Config:
    """The config of a command line, checked.

    Raises:
        UserError: an unknown experiment, an unreadable file, a value out of range.
        SystemExit: after `--help`, or an unknown flag, which tyro explains.
    """
    arguments = list(arguments)
    resume, path = _take(arguments, "--resume"), _take(arguments, "--config")
    named = [_take(arguments, "--experiment")]
    if arguments and not arguments[0].startswith("-"):
        named.append(arguments.pop(0))
    starts = [start for start in (resume, path, *named) if start is not None]
    if len(starts) > 1:
        raise UserError(
            f"A run starts from one place, but {' and '.join(starts)} are given: name an experiment,"
            " --config FILE or --resume FOLDER."
        )
    if resume is not None:
        start = _saved(pathlib.Path(resume))
    elif path is not None:
        start = from_json(_read(pathlib.Path(path)), path)
    else:
        start = experiment(starts[0] if starts else next(iter(EXPERIMENTS)))
    config = tyro.cli(
        Config,
        args=arguments,
        default=start,
        prog=f"{PROGRAM} [EXPERIMENT | --config FILE | --resume FOLDER]",
        description=_description(),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
    )
    if config.model.weights is not None and resume is None:
        config = shape_from_weights(config)
    if resume is None and path is None:
        config = _without_idle(config, start)
    check(config)
    return config


def _without_idle(config: Config, start: Config) -> Config:
    """Without an experiment's own values where the flags beside them leave those nothing to do."""
    values, own, default = flatten(config), flatten(start), flatten(Config())
    used = _effective(flatten(resolved(config)))
    idle = [name for name, (effective, _) in used.items() if not effective]
    return replace(config, {name: default[name] for name in idle if values[name] == own[name]})


def experiment(name: str) -> Config:
    if name not in EXPERIMENTS:
        raise UserError(
            f"There is no experiment {name!r}; there are {', '.join(EXPERIMENTS)};"
            f" nearest: {nearest(name, list(EXPERIMENTS))}."
        )
    return EXPERIMENTS[name]()


def _description() -> str:
    first = {name: (make.__doc__ or "").split("\n")[0] for name, make in EXPERIMENTS.items()}
    lines = "\n".join(f"  {name}: {line}" for name, line in first.items())
    return (
        "Pre-trains a language model, or an image classifier, and leaves a run folder with its config,"
        " metrics, checkpoints and pictures. Starts from an experiment, a saved config.json or an existing run folder;"
        f" the flags below change single fields.\n\nExperiments:\n{lines}"
    )


def _take(arguments: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` and returns the value."""
    for i, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return arguments.pop(i)[len(flag) + 1 :]
        if argument == flag:
            if i + 1 == len(arguments):
                raise UserError(f"{flag} needs a value.")
            del arguments[i]
            return arguments.pop(i)
    return None


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _saved(folder: pathlib.Path) -> Config:
    """The config of a run folder; its schedule keeps its length when run.steps grows."""
    path = folder / "config.json"
    if not path.is_file():
        runs = sorted(str(p.parent) for p in folder.parent.glob("*/config.json"))
        hint = f" Nearest: {nearest(str(folder), runs)}." if runs else ""
        raise UserError(f"{folder} is not a run folder: it holds no config.json.{hint}")
    config = from_json(_read(path), str(path))
    full = resolved(config).optimizer
    kept = {"optimizer.schedule_steps": full.schedule_steps, "optimizer.freeze": full.freeze}
    return replace(config, {"run.folder": str(folder), **kept})


def check(config: Config) -> None:
    """Raises UserError for the first value that is out of range, of no effect or at odds with another."""
    values = flatten(config)
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        hints = typing.get_type_hints(type(part), include_extras=True)
        for name, value in vars(part).items():
            _check_range(f"{group.name}.{name}", value, hints[name])
            _check_text(f"{group.name}.{name}", value)
    filled = resolved(config)
    full, untouched = flatten(filled), flatten(Config())
    model_config(filled, config.model.vocab_size or 1)
    for name, (used, where) in _effective(full).items():
        if values[name] != untouched[name] and not used:
            raise UserError(
                f"{name} = {values[name]} would have no effect: it belongs to {where}; leave it out."
            )
    longest = full["model.positions"]
    if longest is not None and config.data.length > longest:
        raise UserError(
            f"data.length = {config.data.length} is longer than model.positions = {longest};"
            f" nearest: {longest}."
        )
    if not config.decay.mask:
        raise UserError("decay.mask is empty; to decay nothing, set decay.weight_decay to 0.")
    end = full["optimizer.schedule_steps"]
    if end and full["optimizer.warmup_steps"] > end:
        raise UserError(
            f"optimizer.warmup_steps = {full['optimizer.warmup_steps']} is longer than the schedule;"
            f" allowed is 0 to {end} steps, nearest: {end}."
        )
    if config.optimizer.name == "one_bit_adam":
        _check_workers(config)
    batch, parts = config.data.batch_size, config.run.micro_batches
    if batch % parts:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(
            f"run.micro_batches = {parts} does not divide data.batch_size = {batch};"
            f" nearest: {min(divisors, key=lambda n: abs(n - parts))}."
        )


def _check_workers(config: Config) -> None:
    """Of one_bit_adam: what XLA cannot compile ends the process there, without a word that helps."""
    mesh = config.mesh
    if config.decay.spectral == "gradnorm":
        raise UserError(
            "decay.spectral = gradnorm needs the mean gradient, which optimizer.name = one_bit_adam never forms;"
            " nearest: decay.spectral fnorm."
        )
    if mesh.replica == 1 and mesh.fsdp * mesh.tensor > 1:
        raise UserError(
            f"mesh.replica = 1 with mesh.fsdp = {mesh.fsdp} and mesh.tensor = {mesh.tensor}: optimizer.name ="
            " one_bit_adam exchanges nothing with one replica, which may then only be split over mesh.data; nearest:"
            " mesh.replica 2, or optimizer.name adam."
        )
    if mesh.replica > 1 and config.model.attention == "cudnn":
        raise UserError(
            f"model.attention = cudnn with mesh.replica = {mesh.replica}: JAX cannot split the kernel where each"
            " replica of optimizer.name = one_bit_adam works for itself; nearest: model.attention xla."
        )
    if mesh.fsdp > 1 and mesh.tensor > 1:
        raise UserError(
            f"mesh.fsdp = {mesh.fsdp} with mesh.tensor = {mesh.tensor}: a replica of optimizer.name = one_bit_adam can"
            f" be split over one of the two; nearest: mesh.fsdp {mesh.fsdp * mesh.tensor} mesh.tensor 1."
        )


def _effective(full: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Fields that only some choices use: whether the choice is made, and its name."""
    bounded = full["decay.pull"] in BOUNDED
    threshold = full["decay.threshold"]
    varying = full["optimizer.schedule"] != "constant"
    model = families.PRESETS[full["model.preset"]]
    return {
        **{
            f"model.{field}": (hasattr(model, field), f"presets of {' and '.join(owners)}")
            for field in vars(Model())
            if (owners := families.owners(field))
        },
        **{
            f"optimizer.{field}": (
                field in OPTIMIZERS[full["optimizer.name"]],
                "optimizer.name " + " or ".join(n for n in OPTIMIZERS if field in OPTIMIZERS[n]),
            )
            for field in dict.fromkeys(name for own in OPTIMIZERS.values() for name in own)
        },
        **{
            f"decay.{field}": (full["decay.spectral"] is not None, "decay.spectral")
            for field in SPECTRAL
        },
        "optimizer.spike_window": (
            full["optimizer.spike_sigma"] is not None,
            "optimizer.spike_sigma",
        ),
        **_of_the_task(full),
        "optimizer.schedule_steps": (varying, "the schedules cosine and linear"),
        "optimizer.final": (varying, "the schedules cosine and linear"),
        "decay.threshold": (bounded, f"the pulls {', '.join(BOUNDED)}"),
        "decay.proximal": (full["decay.pull"] in PROXIMAL, f"the pulls {', '.join(PROXIMAL)}"),
        "decay.cautious": (not full["decay.proximal"], "the explicit decay (decay.proximal False)"),
        "decay.factor": (isinstance(threshold, str), "a threshold given by name"),
        "decay.memory": (threshold == "ema", "decay.threshold ema"),
        "decay.width_rule": (full["model.base_width"] is not None, "a model.base_width"),
    }


def _of_the_task(full: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """What texts and what images have alone; see `_effective`."""
    task, text = families.task(full["model.preset"]), full["data.text"]
    of = {
        name: (task == name, f"presets of {' and '.join(families.learning(name))}")
        for name in set(families.TASKS.values())
    }
    found = {f"images.{field}": of["images"] for field in vars(Images())}
    found |= {f"data.{field}": of["language"] for field in vars(Data()) if field != "batch_size"}
    found["model.weights"] = of["language"]
    if task == "language" and text.startswith(STORE):
        alone = (False, "a data.text that is not encoded yet; a store has its own tokenizer")
        found |= {"data.tokenizer": alone, "data.cache": alone}
    return found


def _check_range(name: str, value: Any, hint: Any) -> None:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    ranges = [r for o in options for r in getattr(o, "__metadata__", ()) if isinstance(r, Range)]
    if not ranges or value is None or isinstance(value, str):
        return
    if not ranges[0].holds(value):
        low, high = ranges[0].low, ranges[0].high
        end = low if not value > low else high
        open_end = ranges[0].above if end == low else ranges[0].below
        advice = f"a number {'above' if end == low else 'below'} {end:g}" if open_end else f"{end}"
        raise UserError(
            f"{name} = {str(value)[:40]} is out of range: allowed is {ranges[0]}; nearest: {advice}."
        )


def _check_text(name: str, value: Any) -> None:
    """Names and paths are texts that can be printed; a name of runs is one of a folder inside `runs`."""
    if not isinstance(value, str):
        return
    nearest_one = "".join(c for c in value if c.isprintable())
    if name == "run.name":
        nearest_one = re.sub(r"[/\\]+", "-", nearest_one) or "run"
    if value != nearest_one:
        allowed = "letters, digits and signs" + (", no slashes" if name == "run.name" else "")
        raise UserError(
            f"{name} = {value[:60]!r} is not a name: allowed are {allowed}; nearest: {nearest_one[:60]!r}."
        )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Reads what `to_json` wrote, or a part of it; fields left out keep their defaults.

    Raises:
        UserError: not JSON, an unknown group or field, or a value of the wrong type; names `source`.
    """
    try:
        groups = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}.") from None
    config, known = Config(), flatten(Config())
    if not isinstance(groups, dict) or not all(isinstance(v, dict) for v in groups.values()):
        raise UserError(f'{source} must hold groups of fields, such as {{"run": {{"steps": 10}}}}.')
    changes = {f"{group}.{field}": v for group, part in groups.items() for field, v in part.items()}
    for name, value in changes.items():
        if name not in known:
            raise UserError(
                f"{source}: unknown field {name!r}; nearest: {nearest(name, list(known))!r}."
            )
        group, field = name.split(".")
        hints = typing.get_type_hints(type(getattr(config, group)), include_extras=True)
        changes[name] = _convert(hints[field], value, f"{source}: {name}")
    return replace(config, changes)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as the type of a field."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    literals = [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]
    kinds = [o.__origin__ if typing.get_origin(o) is Annotated else o for o in options]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(typing.get_args(hint)[0], v, name) for v in value)
    if value in literals or (value is None and types.NoneType in kinds):
        return value
    if float in kinds and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, 1 if value > 0 else -1)
    if type(value) in kinds:
        return value
    if literals and isinstance(value, str):
        raise UserError(
            f"{name} = {value!r} is not one of {', '.join(literals)}; nearest: {nearest(value, literals)!r}."
        )
    expected = [repr(c) for c in literals] + [k.__name__ for k in kinds if isinstance(k, type)]
    raise UserError(
        f"{name} = {value!r} has the wrong type; expected {' or '.join(expected) or 'a list'}."
    )
