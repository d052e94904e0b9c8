"""Configs as JSON: config.json of a run, and files for --config."""

import dataclasses
import json
import math
import types
import typing
from typing import Annotated, Any, Literal

from train.config import tree
from train.config.fields import Config
from train.config.tree import nearest
from train.errors import UserError


def to_json(config: Config) -> str:
    return json.dumps(tree.as_dict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Reads what `to_json` wrote, or a part of it; fields left out keep their defaults.

    Raises:
        UserError: not JSON, an unknown group, field or choice, or a value of the wrong type; names `source`.
    """
    try:
        groups = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}.") from None
    if not isinstance(groups, dict) or not all(isinstance(v, dict | None) for v in groups.values()):
        raise UserError(f'{source} must hold groups of fields, such as {{"run": {{"steps": 10}}}}.')
    changes = dict(_flat(groups))
    try:
        config = _with_parts(Config(), changes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    known = tree.leaves(config)
    for name, value in changes.items():
        if name not in known:
            raise UserError(f"{source}: {_unknown(config, name)}")
        changes[name] = converted(known[name].hint, value, f"{source}: {name}")
    config = tree.replace(config, changes)
    for name, value in tree.flatten(config).items():
        if value is dataclasses.MISSING:
            raise UserError(f"{source}: {name} is missing; it has no default.")
    return config


def _flat(groups: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, value in groups.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _with_parts(config: Config, changes: dict[str, Any]) -> Config:
    """The config with the parts that the changes speak of; what is left in `changes` are values."""
    done: set[tuple[str, str]] = set()  # an inline part has the path of the part around it
    while True:
        waiting = [part for part in tree.parts(config) if part[:2] not in done]
        if not waiting:
            return config
        part = waiting[0]
        done.add(part[:2])
        if part.slot.choice and f"{part.path}.name" in changes:
            name = changes.pop(f"{part.path}.name")
            config = tree.replace(config, {f"{part.path}.name": name})
        elif part.slot.optional and part.path in changes and changes[part.path] is None:
            config = tree.replace(config, {part.path: changes.pop(part.path)})
        elif part.slot.optional and any(name.startswith(f"{part.path}.") for name in changes):
            config = tree.replace(config, {part.path: tree.begun(part.slot)})


def _unknown(config: Config, name: str) -> str:
    for part in tree.parts(config):
        if part.path == name:
            kind = next(iter(part.slot.classes.values()))
            field = "name" if part.slot.choice else tree.slots(kind)[0].field.name
            return f'{name} must hold fields, such as {{"{field}": ...}}.'
    owners = tree.owners(config, name)
    names = list(tree.flatten(config))
    near = f"nearest: {nearest(name, names)!r}."
    if owners:
        return f"the field {name!r} belongs to {belongs(owners)}; {near}"
    return f"unknown field {name!r}; {near}"


def belongs(owners: list[tuple[str, str]]) -> str:
    """The choices that have a field, such as "optimizer conda or sophia"."""
    *first, last = (name for _, name in owners)
    return f"{owners[0][0]} {', '.join(first)}{' or ' if first else ''}{last}"


def converted(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as the type of a field."""
    options = tree.options_of(hint)
    literals = [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]
    kinds = [o.__origin__ if typing.get_origin(o) is Annotated else o for o in options]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(converted(typing.get_args(hint)[0], v, name) for v in value)
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
