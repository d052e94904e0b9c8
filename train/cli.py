"""Configs from the command line.

A run starts from an experiment, from a file (--config) or from a run folder (--resume). Flags change single fields of
that; `--optimizer conda` or `--optimizer.name conda` picks another class of optimizer, and so for every choice.
"""

import dataclasses
import pathlib
import textwrap
from typing import Annotated, Any

import tyro

from train.config import tree
from train.config.derived import derived
from train.config.experiments import EXPERIMENTS
from train.config.fields import Config
from train.config.saved import belongs, from_json
from train.config.tree import flatten, nearest, replace
from train.errors import UserError

PROGRAM = "python -m train"


def parse(arguments: list[str]) -> Config:
    """The config of a command line, checked, with numbers in place of names that stand for them.

    Raises:
        UserError: an unknown experiment or choice, an unreadable file, a value out of range.
        SystemExit: after `--help`, or an unknown flag, which tyro explains.
    """
    arguments = list(arguments)
    start, origin = _start(arguments)
    chosen = _choose(start, arguments)
    _check_owners(chosen, arguments)
    config = _with_flags(chosen, arguments)
    return _checked(config, start, origin)


def _checked(config: Config, start: Config, origin: str) -> Config:
    # Here, because these import all models and JAX's devices: --help does without.
    from train.config.checks import check, check_values
    from train.weights.hugging_face_config import shape_from_weights

    if config.model.weights is not None and origin != "--resume":
        config = shape_from_weights(config)
    if origin == "experiment":
        config = _without_idle(config, start)
    check_values(config)
    config = derived(config)
    check(config)
    return config


def _without_idle(config: Config, start: Config) -> Config:
    """Without an experiment's own values where the flags beside them leave those nothing to do."""
    from train.config.checks import effective

    values, own, default = flatten(config), flatten(start), flatten(Config())
    idle = [name for name, (used, _) in effective(config).items() if not used]
    return replace(config, {name: default[name] for name in idle if values[name] == own[name]})


def _start(arguments: list[str]) -> tuple[Config, str]:
    """Where a command line starts from, and of which kind that is; takes it out of the arguments."""
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
        return _saved(pathlib.Path(resume)), "--resume"
    if path is not None:
        return from_json(_read(pathlib.Path(path)), path), "--config"
    return experiment(starts[0] if starts else next(iter(EXPERIMENTS))), "experiment"


def experiment(name: str) -> Config:
    if name not in EXPERIMENTS:
        raise UserError(
            f"There is no experiment {name!r}; there are {', '.join(EXPERIMENTS)};"
            f" nearest: {nearest(name, list(EXPERIMENTS))}."
        )
    return EXPERIMENTS[name]()


def _choose(config: Config, arguments: list[str]) -> Config:
    """The config with the parts that the arguments pick or switch on; takes the picks out of the arguments."""
    done: set[tuple[str, str]] = set()  # an inline part has the path of the part around it
    while True:
        waiting = [part for part in tree.parts(config) if part[:2] not in done]
        if not waiting:
            return config
        # Parts that hold others come first: --decay decides which parts a decay has.
        part = min(waiting, key=lambda part: part.path.count("."))
        done.add(part[:2])
        if part.slot.choice:
            for flag in (f"--{part.path}", f"--{part.path}.name"):
                while (name := _take(arguments, flag)) is not None:
                    config = replace(config, {f"{part.path}.name": name})
        elif part.slot.optional:
            text = _take(arguments, f"--{part.path}")
            fields = [a for a in arguments if _name(a).startswith(part.path + ".")]
            if text is not None and text != "None":
                raise UserError(
                    f"--{part.path} {text}: allowed is None, which switches it off; any of its flags switches it on,"
                    f" such as {_example(part)}."
                )
            if text is not None or (part.value is None and fields):
                value = None if text is not None else tree.begun(part.slot)
                config = replace(config, {part.path: value})


def _check_owners(config: Config, arguments: list[str]) -> None:
    """Raises UserError for the flag of a class that is not chosen."""
    known = set(tree.leaves(config)) | {part.path for part in tree.parts(config)}
    for argument in arguments:
        name = _name(argument)
        owners = tree.owners(config, name) if name and name not in known else []
        if not owners:
            continue
        path = owners[0][0]
        (here,) = (p.value for p in tree.parts(config) if p.slot.choice and p.path == path)
        own = [f"--{field}" for field in tree.leaves(here, path + ".")]
        raise UserError(
            f"--{name} belongs to --{belongs(owners)}; {here.name} has: {', '.join(own)};"
            f" nearest: {nearest('--' + name, own)}."
        )


def _name(argument: str) -> str:
    """The field that a flag speaks of; empty for values."""
    flag, _, _ = argument.partition("=")
    return flag[2:].replace("-", "_") if flag.startswith("--") else ""


def _with_flags(config: Config, arguments: list[str]) -> Config:
    """The config with the values of all flags, which tyro reads."""
    shape = _shape(config, "", "", _idle(config, arguments))
    read = tyro.cli(
        type(shape),
        args=arguments,
        default=shape,
        prog=f"{PROGRAM} [EXPERIMENT | --config FILE | --resume FOLDER]",
        description=f"{_description()}\n\n{_about_absent('', config)}",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    return replace(config, _values(read))


def _idle(config: Config, arguments: list[str]) -> set[str]:
    """Fields that only presets of other families use, which the help leaves out."""
    if not {"-h", "--help"} & set(arguments):
        return set()
    from train.config.checks import effective

    preset = _take(list(arguments), "--model.preset")
    chosen = config if preset is None else replace(config, {"model.preset": preset})
    return {name for name, (used, _) in effective(chosen).items() if not used}


def _shape(node: Any, path: str, text: str, idle: set[str]) -> Any:
    """A node as tyro reads it: of one class, with a field for every flag; flags of `idle` fields are not shown."""
    fields: list[Any] = []
    values: dict[str, Any] = {}

    def add(node: Any, path: str) -> None:
        for slot in tree.slots(type(node)):
            name, value = slot.field.name, getattr(node, slot.field.name)
            below = path if slot.inline else path + name + "."
            if not slot.classes:
                text = tree.texts(type(node))[name]
                hint = Annotated[slot.hint, tyro.conf.arg(help=text)]
                fields.append((name, tyro.conf.Suppress[hint] if below[:-1] in idle else hint))
                values[name] = tyro.MISSING if value is dataclasses.MISSING else value
            elif value is not None and slot.inline:
                add(value, below)
            elif value is not None:
                values[name] = _shape(
                    value, below, _about(tree.Part(below[:-1], name, slot, value)), idle
                )
                fields.append((name, type(values[name])))

    add(node, path)
    kind = dataclasses.make_dataclass(type(node).__name__, fields, namespace={"__doc__": text})
    return kind(**values)


def _about(part: tree.Part) -> str:
    """The help above the flags of a part: what it is, the other choices, and parts to switch on."""
    lines = [(type(part.value).__doc__ or "").strip()]
    inline = [p for p in tree.parts(part.value, part.path + ".") if p.path == part.path]
    for choice in (p for p in (part, *inline) if p.slot.choice):
        name = choice.value.name
        others = [other for other in choice.slot.classes if other != name]
        lines.append(
            f"--{part.path} {name} is chosen"
            + (
                f" ({(type(choice.value).__doc__ or '').strip().rstrip('.')})"
                if choice in inline
                else ""
            )
            + f"; others: {', '.join(others)}. `--{part.path} {others[0]} --help` shows its flags."
        )
    for choice in tree.parts(part.value, part.path + "."):
        if choice.slot.choice and choice.value is not None and not tree.slots(type(choice.value)):
            # Without flags of its own it has no group of flags, above which this would stand.
            others = [other for other in choice.slot.classes if other != choice.value.name]
            lines.append(
                f"--{choice.path} {choice.value.name} is chosen; others: {', '.join(others)}."
            )
    return "\n".join([*lines, _about_absent(part.path + ".", part.value)]).strip()


def _about_absent(prefix: str, node: Any) -> str:
    """Of the parts of a node that are switched off: what they do, and how they are switched on."""
    lines = []
    for part in tree.parts(node, prefix):
        if part.value is None and part.path.rpartition(".")[0] == prefix[:-1]:
            (kind,) = part.slot.classes.values()
            lines.append(
                f"--{part.path} is None; any of its flags switches it on, such as {_example(part)}."
                f" {(kind.__doc__ or '').strip()}"
            )
    return "\n".join(lines)


def _example(part: tree.Part) -> str:
    """A flag that switches an optional part on."""
    (kind,) = part.slot.classes.values()
    first = tree.slots(kind)[0].field
    default = "NUMBER" if first.default is dataclasses.MISSING else first.default
    return f"--{part.path}.{first.name} {default}"


def _values(read: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(read).items():
        inside = dataclasses.is_dataclass(value)
        found |= _values(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return found


def _description() -> str:
    first = {name: (make.__doc__ or "").split("\n")[0] for name, make in EXPERIMENTS.items()}
    lines = "\n".join(f"  {name}: {line}" for name, line in first.items())
    return textwrap.dedent(
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
    return replace(derived(config), {"run.folder": str(folder)})
