"""Configs from the command line.

A run starts from an experiment, from a file (--config) or from a run folder (--resume). Flags change single fields of
that; `--optimizer conda` or `--optimizer.name conda` picks another class of optimizer, and so for every choice.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, NoReturn

import tyro

from train import disk, help
from train.commands import COMMANDS
from train.config import tree
from train.config.derived import derived, with_timescale_alone
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
    topics = help.asked(arguments)
    if topics == []:
        _leave(help.overview())
    if topics is not None and (named := [t for t in topics if t in EXPERIMENTS]):
        _leave("\n\n".join(map(help.about_experiment, named)))
    start, origin = _start(arguments)
    chosen = _choose(start, arguments)
    if topics is not None:
        _show(chosen, arguments, topics)
    _check_owners(chosen, arguments)
    config = _with_flags(chosen, arguments)
    return _checked(config, start, origin)


def _leave(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)


def _show(config: Config, arguments: list[str], topics: list[str]) -> NoReturn:
    """Prints the help on some topics, and leaves."""
    preset = _take(arguments, "--model.preset")
    config = config if preset is None else replace(config, {"model.preset": preset})
    config = help.opened(config, topics)
    wanted = {name for topic in topics for name in help.fields(config, topic)}
    idle = _idle(config) if topics == ["all"] or "model" in topics else set()
    hidden = (set(tree.leaves(config)) - wanted) | idle
    about = (
        help.about_absent("", config) if topics == ["all"] else "`--help` alone shows all groups."
    )
    _read(config, ["--help"], hidden, about)
    raise SystemExit(0)


def _checked(config: Config, start: Config, origin: str) -> Config:
    # Here, because these import all models and JAX's devices: --help does without.
    from train.config.checks import check, check_values
    from train.weights.hugging_face_config import shape_from_weights

    if config.model.weights is not None and origin != "--resume":
        config = shape_from_weights(config)
    if origin == "experiment":
        config = _without_idle(config, start)
    check_values(config)
    config = derived(with_timescale_alone(config, start))
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
        return _saved(disk.user_path(resume)), "--resume"
    if path is not None:
        return from_json(disk.config_text(disk.user_path(path)), path), "--config"
    return experiment(starts[0] if starts else next(iter(EXPERIMENTS))), "experiment"


def experiment(name: str) -> Config:
    if name not in EXPERIMENTS:
        raise UserError(
            f"There is no experiment or command {name!r}. Experiments: {', '.join(EXPERIMENTS)}."
            f" Commands: {', '.join(COMMANDS)}; nearest: {nearest(name, [*EXPERIMENTS, *COMMANDS])}."
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
                    f" such as {help.example(part)}."
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
    """The config with the values of all flags."""
    return replace(config, _values(_read(config, arguments, set(), "")))


def _read(config: Config, arguments: list[str], hidden: set[str], about: str) -> Any:
    """The values of all flags as tyro reads them; its help leaves out the hidden ones."""
    shape = _shape(config, "", "", hidden)
    return tyro.cli(
        type(shape),
        args=arguments,
        default=shape,
        prog=f"{PROGRAM} [EXPERIMENT | --config FILE | --resume FOLDER]",
        description=about,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _idle(config: Config) -> set[str]:
    """Fields that only presets of other families use, which the help leaves out."""
    from train.config.checks import effective

    return {name for name, (used, _) in effective(config).items() if not used}


def _shape(node: Any, path: str, text: str, hidden: set[str]) -> Any:
    """A node as tyro reads it: of one class, with a field for every flag; the help does not show `hidden` fields."""
    fields: list[Any] = []
    values: dict[str, Any] = {}

    def add(node: Any, path: str) -> None:
        for slot in tree.slots(type(node)):
            name, value = slot.field.name, getattr(node, slot.field.name)
            below = path if slot.inline else path + name + "."
            if not slot.classes:
                text = tree.texts(type(node))[name]
                hint = Annotated[slot.hint, tyro.conf.arg(help=text)]
                fields.append((name, tyro.conf.Suppress[hint] if below[:-1] in hidden else hint))
                values[name] = tyro.MISSING if value is dataclasses.MISSING else value
            elif value is not None and slot.inline:
                add(value, below)
            elif value is not None:
                values[name] = _shape(
                    value, below, help.about(tree.Part(below[:-1], name, slot, value)), hidden
                )
                fields.append((name, type(values[name])))

    add(node, path)
    kind = dataclasses.make_dataclass(type(node).__name__, fields, namespace={"__doc__": text})
    return kind(**values)


def _values(read: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(read).items():
        inside = dataclasses.is_dataclass(value)
        found |= _values(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return found


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


def _saved(folder: pathlib.Path) -> Config:
    """The config of a run folder; its schedule keeps its length when run.steps grows."""
    path = folder / "config.json"
    if not path.is_file():
        runs = sorted(str(p.parent) for p in folder.parent.glob("*/config.json"))
        hint = f" Nearest: {nearest(str(folder), runs)}." if runs else ""
        raise UserError(f"{folder} is not a run folder: it holds no config.json.{hint}")
    config = from_json(disk.config_text(path), str(path))
    return replace(derived(config), {"run.folder": str(folder)})
