"""A config as a tree of frozen dataclasses: its fields by dotted name, and the choices in it.

A field holds a value or a part, which is another dataclass. The field's type says what may stand there:

    run: Run                                  one part; its fields are run.steps, run.seed, ...
    schedule: Cosine | Linear                 a choice between parts, by the `name` of their classes
    decay: Annotated[Any, Folder(PACKAGE)]    a choice between the parts that the modules of a folder define
    spikes: Spikes | None                     an optional part; None: it is switched off
    strength: Annotated[Strength, INLINE]     a part whose fields are named as if they were those of the whole
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from train.errors import UserError

INLINE = "inline"
Node = TypeVar("Node")


@dataclasses.dataclass(frozen=True)
class Folder:
    """Marks a field that holds one of the parts defined in a package."""

    package: str


class Slot(NamedTuple):
    """One field of a dataclass, as its type declares it."""

    field: dataclasses.Field[Any]
    hint: Any
    classes: dict[str, type]  # parts that it may hold, by name; empty for a value
    choice: bool  # whether a name picks one of the classes
    optional: bool  # whether it may be None instead of a part
    inline: bool


class Part(NamedTuple):
    """A part of a config, in its place."""

    path: str  # "optimizer.schedule"; of an inline part that of the part around it
    field: str  # of the part around it
    slot: Slot
    value: Any


class Leaf(NamedTuple):
    """A value of a config, in its place."""

    value: Any
    hint: Any
    text: str  # what its docstring says


def slots(kind: type) -> list[Slot]:
    """The fields of a dataclass."""
    return [_with_folder(slot) for slot in _slots(kind)]


@functools.cache
def _slots(kind: type) -> list[Slot]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [_slot(field, hints[field.name]) for field in dataclasses.fields(kind)]


def _slot(field: dataclasses.Field[Any], hint: Any) -> Slot:
    marks = getattr(hint, "__metadata__", ())
    options = options_of(hint.__origin__ if marks else hint)
    parts = [option for option in options if dataclasses.is_dataclass(option)]
    classes = {part.name if len(parts) > 1 else part.__name__: part for part in parts}  # type: ignore[attr-defined]
    optional = bool(parts) and types.NoneType in options
    return Slot(field, hint, classes, len(parts) > 1, optional, INLINE in marks)


def _with_folder(slot: Slot) -> Slot:
    """The slot, with the parts that are in its folder now if it has one."""
    for mark in getattr(slot.hint, "__metadata__", ()):
        if isinstance(mark, Folder):
            default: Any = slot.field.default_factory
            return slot._replace(classes=in_folder(mark.package, type(default())), choice=True)
    return slot


def in_folder(package: str, first: type) -> dict[str, type]:
    """The parts that the modules of a package define, by name: `first` first, then in alphabetical order.

    A part of the folder has every class variable that `first` has; parts inside of it, such as a threshold, do not.
    """
    return _in_folder(package, tuple(importlib.import_module(package).__path__), first)


@functools.cache
def _in_folder(package: str, path: tuple[str, ...], first: type) -> dict[str, type]:
    found: dict[str, Any] = {}
    needed = [n for n, hint in typing.get_type_hints(first).items() if "ClassVar" in str(hint)]
    for module in sorted(module.name for module in pkgutil.iter_modules(path)):
        content = vars(importlib.import_module(f"{package}.{module}")).values()
        found |= {
            kind.name: kind
            for kind in content
            if dataclasses.is_dataclass(kind) and all(hasattr(kind, n) for n in ("build", *needed))
        }
    return {first.name: first} | dict(sorted(found.items()))  # type: ignore[attr-defined]


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


@functools.cache
def texts(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass; empty where there is none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body, found = getattr(tree, "body", []), {}
    for line, below in zip(body, [*body[1:], None]):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = getattr(getattr(below, "value", None), "value", "")
            found[line.target.id] = inspect.cleandoc(text) if isinstance(text, str) else ""
    return found


def parts(node: Any, prefix: str = "") -> Iterator[Part]:
    """All parts below a node; what holds a part comes before it. An absent optional part is None."""
    for slot in slots(type(node)):
        value = getattr(node, slot.field.name)
        path = _path(prefix, slot)
        if slot.classes:
            yield Part(path[:-1], slot.field.name, slot, value)
            if value is not None:
                yield from parts(value, path)


def leaves(node: Any, prefix: str = "") -> dict[str, Leaf]:
    """All values below a node by dotted name, such as "optimizer.learning_rate"."""
    found: dict[str, Leaf] = {}
    for slot in slots(type(node)):
        name, value = slot.field.name, getattr(node, slot.field.name)
        if not slot.classes:
            found[prefix + name] = Leaf(value, slot.hint, texts(type(node))[name])
        elif value is not None:
            found |= leaves(value, _path(prefix, slot))
    return found


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Everything that a config says, by dotted name: values, names of choices ("optimizer.name"), absent parts."""
    found: dict[str, Any] = {}
    for slot in slots(type(node)):
        value, path = getattr(node, slot.field.name), _path(prefix, slot)
        if not slot.classes or value is None:
            found[prefix + slot.field.name] = value
            continue
        found |= {path + "name": value.name} if slot.choice else {}
        found |= flatten(value, path)
    return found


def as_dict(node: Any) -> dict[str, Any]:
    """Nested dictionaries as they stand in config.json; those of a choice begin with its name."""
    found: dict[str, Any] = {}
    for slot in slots(type(node)):
        name, value = slot.field.name, getattr(node, slot.field.name)
        if slot.classes and value is not None:
            inside = ({"name": value.name} if slot.choice else {}) | as_dict(value)
            found |= inside if slot.inline else {name: inside}
        else:
            found[name] = value
    return found


def replace(node: Node, changes: dict[str, Any]) -> Node:
    """The config with what `flatten` calls by these names changed; a part of another class can be given whole.

    Raises:
        UserError: there is no such field, or no such choice.
    """
    changed = _replaced(node, changes, "")
    known = {**flatten(changed), **{part.path: part for part in parts(changed)}}
    for name in changes:
        if name not in known:
            raise UserError(f"There is no field {name}; nearest: {nearest(name, list(known))}.")
    return changed


def _replaced(node: Any, changes: dict[str, Any], prefix: str) -> Any:
    new: dict[str, Any] = {}
    for slot in slots(type(node)):
        name, value = slot.field.name, getattr(node, slot.field.name)
        path = _path(prefix, slot)
        if not slot.classes:
            new[name] = changes.get(prefix + name, value)
            continue
        value = value if slot.inline else changes.get(prefix + name, value)
        if slot.choice and path + "name" in changes:
            value = picked(Part(path[:-1], name, slot, value), changes[path + "name"])
        if value is None and any(change.startswith(path) for change in changes):
            value = begun(slot)
        new[name] = value if value is None else _replaced(value, changes, path)
    return dataclasses.replace(node, **new)


def picked(part: Part, name: Any) -> Any:
    """The part of another class. Values that were set in the old one are kept where the new one has the same field.

    A class with one number, such as a fixed threshold, is picked by that number as well.

    Raises:
        UserError: there is no class of that name.
    """
    classes = part.slot.classes
    if name not in list(classes):
        for kind in classes.values():
            if (field := getattr(kind, "written_as", None)) and _is_number(name):
                return kind(**{field: float(name)})
        numbers = [kind for kind in classes.values() if hasattr(kind, "written_as")]
        allowed = ", ".join(classes) + (", or a number" if numbers else "")
        near = nearest(name, list(classes))
        raise UserError(f"{part.path} = {name} is not one of {allowed}; nearest: {near!r}.")
    kind = classes[name]
    return part.value if type(part.value) is kind else _carried(part.value, kind())


def _carried(old: Any, new: Any) -> Any:
    plain, before = type(old)(), {slot.field.name: slot for slot in slots(type(old))}
    kept: dict[str, Any] = {}
    for slot in slots(type(new)):
        name = slot.field.name
        if name not in before or before[name].hint != slot.hint:
            continue
        value, default = getattr(old, name), getattr(plain, name)
        if slot.inline and type(value) is type(getattr(new, name)):
            changed = {f: v for f, v in vars(value).items() if v != getattr(default, f)}
            kept[name] = dataclasses.replace(getattr(new, name), **changed)
        elif value != default:
            kept[name] = value
    return dataclasses.replace(new, **kept)


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(text, bool)


def begun(slot: Slot) -> Any:
    """An optional part with its defaults; a field without one is MISSING until it is set."""
    (kind,) = slot.classes.values()
    needed = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    return kind(**dict.fromkeys(needed, dataclasses.MISSING))


def owners(node: Any, name: str, prefix: str = "") -> list[tuple[str, str]]:
    """The choices that would have a field or part `name`: (path, name of the choice), all on the innermost path."""
    found: list[tuple[str, str]] = []
    for part in parts(node, prefix):
        below = part.path + "."
        if part.slot.choice and part.value is not None and name.startswith(below):
            for choice in part.slot.classes:
                other = picked(part, choice)
                if choice != part.value.name and (
                    _has(other, name, below) or owners(other, name, below)
                ):
                    found.append((part.path, choice))
    innermost = max((path for path, _ in found), key=len, default="")
    return [(path, choice) for path, choice in found if path == innermost]


def _has(node: Any, name: str, prefix: str) -> bool:
    """Whether a field or part of this name could be set, in a part that is switched off too."""
    inside = list(parts(node, prefix))
    absent = [part.path + "." for part in inside if part.value is None]
    return (
        name in leaves(node, prefix)
        or name in {part.path for part in inside}
        or any(name.startswith(path) for path in absent)
    )


def _path(prefix: str, slot: Slot) -> str:
    return prefix if slot.inline else f"{prefix}{slot.field.name}."


def nearest(value: Any, allowed: Sequence[str]) -> str:
    return difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
