"""Rejects invalid configs: each message names the value, the values that are allowed, and the nearest of them."""

import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp

import optax_decay
from train.config import tree
from train.config.fields import Config, Data, Images, Model, model_config, preset_of
from train.config.parts import schedules
from train.config.ranges import Range
from train.config.tree import flatten
from train.data.batches import STORE
from train.errors import UserError


def check(config: Config) -> None:
    """Raises UserError for the first value that is out of range, of no effect or at odds with another.

    Args:
        config: with numbers in place of names that stand for them (train/config/derived.py).
    """
    check_values(config)
    shape = model_config(config, config.model.vocab_size or 1)
    values, untouched = flatten(config), flatten(Config())
    for name, (used, where) in effective(config).items():
        if values[name] != untouched[name] and not used:
            raise UserError(
                f"{name} = {values[name]} would have no effect: it belongs to {where}; leave it out."
            )
    longest = getattr(shape, "positions", None)
    if longest is not None and config.data.length > longest:
        raise UserError(
            f"data.length = {config.data.length} is longer than model.positions = {longest};"
            f" nearest: {longest}."
        )
    if values["decay.mask"] == ():
        raise UserError("decay.mask is empty; to decay nothing, set decay.weight_decay to 0.")
    schedules.check(config.optimizer.schedule)
    _check_links(config)
    batch, parts = config.data.batch_size, config.run.micro_batches
    if batch % parts:
        small = [n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0]
        divisors = sorted({*small, *(batch // n for n in small)})
        raise UserError(
            f"run.micro_batches = {parts} does not divide data.batch_size = {batch};"
            f" nearest: {min(divisors, key=lambda n: abs(n - parts))}."
        )


def check_values(config: Config) -> None:
    """Raises UserError for the first number that is out of range and the first text that cannot be a name."""
    for name, leaf in tree.leaves(config).items():
        _check_range(name, leaf.value, leaf.hint)
        _check_text(name, leaf.value)


def _check_links(config: Config) -> None:
    """What optimizer and decay need of each other, and their own checks."""
    direction, decay = config.optimizer.direction, config.decay
    if direction.workers and flatten(config).get("decay.spectrum.score") == "gradient_norm":
        raise UserError(
            f"decay.spectrum.score = gradient_norm needs the mean gradient, which optimizer.name = {direction.name}"
            " never forms; nearest: decay.spectrum.score frobenius_norm."
        )
    if direction.workers and decay.gradients:
        raise UserError(
            f"decay.name = {decay.name} needs the mean gradient, which optimizer.name = {direction.name} never"
            " forms; nearest: decay.name l2."
        )
    if config.width is not None and not decay.multipliers:
        raise UserError(
            f"width.base = {config.width.base} does not go with decay.name = {decay.name}, which cannot follow the"
            " width; nearest: decay.name l2."
        )
    values = flatten(config)
    if values.get("decay.schedule.name") == "log_time" and values["decay.coupling"] != "schedule":
        raise UserError(
            f"decay.schedule = log_time with decay.coupling = {values['decay.coupling']}: its coefficient is made for"
            " a shrink that follows the shape of the learning rate alone; nearest: decay.coupling schedule."
        )
    for link in (direction, decay):
        if hasattr(link, "check"):
            link.check(config)
    if hasattr(direction, "build_last") or hasattr(decay, "build_rate"):
        _check_norms(config)


# One parameter of every role.
AXES = (("embedding", "V -> D"), ("hidden", "D -> F"), ("head", "D -> V"), ("vector", "D"))
SHAPES = {"embedding": (7, 2), "hidden": (2, 3), "head": (2, 7), "vector": (2,)}


def _check_norms(config: Config) -> None:
    """Raises UserError if rules about norms contradict each other or the decay on some role of parameters."""
    from train.step import optimizer  # here, because it imports this

    values = flatten(config)
    for name in ("optimizer.sphere", "decay.sphere", "decay.braked"):
        chosen = values.get(name, ("hidden",))
        if "vector" in chosen or not chosen:
            raise UserError(
                f"{name} = {' '.join(chosen) or 'nothing'}: allowed are roles whose parameters are matrices, hidden,"
                " head and embedding; nearest: hidden."
            )
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    links = optimizer.chain(config, AXES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a mask that none of these parameters has
            optax_decay.decay_table(shapes, 0.0, axes=AXES, optimizer=links)
    except ValueError as error:
        reason = str(error).splitlines()[0].split(". Remove")[0].split(". Put")[0].rstrip(".")
        raise UserError(
            f"optimizer.name = {config.optimizer.direction.name} does not go with decay.name = {config.decay.name} as"
            f" it is: {reason}; nearest: {_nearest_decay(config, 'two links' in reason)}."
        ) from None


def _nearest_decay(config: Config, other: bool) -> str:
    """A decay beside matrices that keep their norms; `other` if it must be one of another name."""
    values = flatten(config)
    fixed = (*values.get("optimizer.sphere", ()), *values.get("decay.sphere", ()))
    free = [role for role in values.get("decay.mask", ()) if role not in fixed]
    if other or "decay.mask" not in values:
        return "decay.name l2 with decay.mask head"
    return f"decay.mask {' '.join(free)}" if free else "decay.weight_decay 0"


def effective(config: Config) -> dict[str, tuple[bool, str]]:
    """Fields that only models of some families use, or some texts: whether they are used, and by what."""
    from train.step import families  # here, because it imports all models: --help does without

    model = preset_of(config.model)
    task, text = families.task(config.model.preset), config.data.text
    of = {
        name: (task == name, f"presets of {' and '.join(families.learning(name))}")
        for name in set(families.TASKS.values())
    }
    found = {
        f"model.{field}": (hasattr(model, field), f"presets of {' and '.join(owners)}")
        for field in vars(Model())
        if (owners := families.owners(field))
    }
    found |= {f"images.{field}": of["images"] for field in vars(Images())}
    found |= {f"data.{field}": of["language"] for field in vars(Data()) if field != "batch_size"}
    found["model.weights"] = of["language"]
    if task == "language" and text.startswith(STORE):
        alone = (False, "a data.text that is not encoded yet; a store has its own tokenizer")
        found |= {"data.tokenizer": alone, "data.cache": alone}
    return found


def _check_range(name: str, value: Any, hint: Any) -> None:
    options = tree.options_of(hint)
    ranges = [r for o in options for r in getattr(o, "__metadata__", ()) if isinstance(r, Range)]
    if not ranges or value is None or isinstance(value, str):
        return
    if not ranges[0].holds(value):
        low, high = ranges[0].low, ranges[0].high
        end = low if not value > low else high
        open_end = ranges[0].above if end == low else ranges[0].below
        advice = f"a number {'above' if end == low else 'below'} {end:g}" if open_end else f"{end}"
        if math.isinf(end):
            advice = "a finite number"
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
