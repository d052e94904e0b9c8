"""The help of `python -m train`: one screen first, then one topic at a time.

    python -m train --help                 # this screen
    python -m train --help optimizer       # a group of flags, or one part such as decay.threshold
    python -m train --optimizer conda --help
    python -m train --help learning_rate   # every flag with this word in its name
    python -m train --help conda_60m       # what an experiment sets
    python -m train --help all

A topic is a group, a part, a word in the name of a flag, an experiment or a command.
"""

import dataclasses
import inspect
import textwrap
from typing import Any

from train.commands import ASKS, COMMANDS
from train.config import experiments, tree
from train.config.experiments import EXPERIMENTS
from train.config.fields import Config
from train.config.tree import flatten, leaves, nearest, replace
from train.errors import UserError

# Names that the help writes as people do; the first word of an experiment is its method or its model.
TITLES = {"alphadecay": "AlphaDecay", "conda": "Conda", "sophia": "Sophia"}
GROUPS = {
    "model": "the network: a preset, and changes to it",
    "data": "the text, the tokenizer and the batches",
    "images": "labelled images for a ViT, and how they are changed in training",
    "width": "scales model, learning rate and decay from a narrower model",
    "mesh": "how devices share the work and the weights",
    "run": "steps, seed, folder, evaluations and checkpoints",
}


def asked(arguments: list[str]) -> list[str] | None:
    """The topics of a command line that asks for help, without repetition; None if it does not ask.

    They follow `--help`. Without any, the parts that the other flags choose or change are the topics.
    Takes the topics and `--help` out of the arguments.
    """
    places = [i for i, argument in enumerate(arguments) if argument in ASKS]
    if not places:
        return None
    start = places[0]
    end = next(
        (i for i in range(start + 1, len(arguments)) if arguments[i].startswith("-")),
        len(arguments),
    )
    topics = arguments[start + 1 : end]
    del arguments[start:end]
    arguments[:] = [argument for argument in arguments if argument not in ASKS]
    if not topics:
        flags = [a.partition("=")[0][2:] for a in arguments if a.startswith("--")]
        if start and arguments[start - 1].startswith("--") and "=" not in arguments[start - 1]:
            del arguments[start - 1]  # a flag in place of a topic: --optimizer --help
        topics = [flag.split(".")[0] for flag in flags]
        topics = [topic for topic in topics if topic in groups()]
        if arguments and not arguments[0].startswith("-"):
            topics.append(arguments[0])
    return list(dict.fromkeys(topics))


def groups() -> set[str]:
    """Groups of flags."""
    return {slot.field.name for slot in tree.slots(Config)}


def overview() -> str:
    """The first screen."""
    rows = {slot.field.name: GROUPS.get(slot.field.name, "") for slot in tree.slots(Config)}
    choices = {part.path: part for part in tree.parts(Config()) if part.slot.choice}
    rows["optimizer"] = ", ".join(choices["optimizer"].slot.classes)
    rows["decay"] = ", ".join(choices["decay"].slot.classes)
    commands = {n: c.does for n, c in COMMANDS.items() if n != "run" and " " not in n}
    lines = [
        "usage: python -m train [EXPERIMENT | --config FILE | --resume FOLDER] [--FLAG VALUE ...]",
        "       python -m train COMMAND [--help]",
        "",
        *textwrap.wrap(
            "Trains a language model or an image classifier. A run leaves a folder in runs/ with"
            " its config, metrics, checkpoints and pictures, and can be resumed.",
            88,
        ),
        "",
        "Experiments:",
        *_table(families()),
        "",
        "Groups of flags; `--help GROUP` shows their flags:",
        *_table(rows),
        "",
        "Other commands; `COMMAND --help` shows their flags:",
        *_table(commands),
        "",
        "More: `--help conda_60m` shows an experiment, `--optimizer conda --help` another choice,",
        "`--help rate` every flag with this word, `--help all` everything. README.md is the way in.",
    ]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows)) + 2
    found = []
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, 92 - width - 2, break_on_hyphens=False)
        found += [f"  {name:{width}}{first}", *(" " * (width + 2) + line for line in rest)]
    return found


def families() -> dict[str, str]:
    """Names of the experiments, by what they are about."""
    found: dict[str, list[str]] = {}
    for name, make in EXPERIMENTS.items():
        own = make.__module__ == experiments.__name__
        first = name.split("_")[0]
        title = "first runs" if own else TITLES.get(first, "others")
        found.setdefault(title, []).append(name)
    ordered = sorted(found, key=lambda title: title == "others")
    return {title: ", ".join(found[title]) for title in ordered}


def about_experiment(name: str) -> str:
    """The docstring of an experiment, and the flags that would make it out of the defaults."""
    make = EXPERIMENTS[name]
    values, default = flatten(make()), flatten(Config())
    changed = {n: v for n, v in values.items() if v is not None and v != default.get(n)}
    flags = [f"  --{field} {_written(value)}" for field, value in changed.items()]
    return "\n".join(
        [
            f"{name}: {inspect.getdoc(make)}",
            "",
            "It differs from the defaults in:" if flags else "It has the default of every flag.",
            *flags,
        ]
    )


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def opened(config: Config, topics: list[str]) -> Config:
    """The config with those parts switched on that a topic names and that are off."""
    for part in list(tree.parts(config)):
        if part.value is None and any(is_in(topic, part.path) for topic in topics):
            config = replace(config, {part.path: tree.begun(part.slot)})
    return config


def fields(config: Config, topic: str) -> set[str]:
    """The flags that a topic is about.

    Raises:
        UserError: there are none.
    """
    names = list(leaves(config))
    topic = topic.lstrip("-").replace("-", "_")
    found = {name for name in names if topic == "all" or is_in(name, topic)}
    found = found or {name for name in names if topic in name.split(".")[-1]}
    if not found:
        parts = {part.path for part in tree.parts(config)}
        words = {name.split(".")[-1] for name in names}
        known = [*parts, *names, *words, *EXPERIMENTS, *COMMANDS, "all"]
        raise UserError(
            f"There is no help on {topic!r}: a topic is a group of flags, such as optimizer, a word in the"
            f" name of a flag, an experiment, a command, or all; nearest: {nearest(topic, known)}."
        )
    return found


def is_in(name: str, part: str) -> bool:
    """Whether a field or part is, or lies in, a part."""
    return name == part or name.startswith(part + ".")


def about(part: tree.Part) -> str:
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
    return "\n".join([*lines, about_absent(part.path + ".", part.value)]).strip()


def about_absent(prefix: str, node: Any) -> str:
    """Of the parts of a node that are switched off: what they do, and how they are switched on."""
    lines = []
    for part in tree.parts(node, prefix):
        if part.value is None and part.path.rpartition(".")[0] == prefix[:-1]:
            (kind,) = part.slot.classes.values()
            lines.append(
                f"--{part.path} is None; any of its flags switches it on, such as {example(part)}."
                f" {(kind.__doc__ or '').strip()}"
            )
    return "\n".join(lines)


def example(part: tree.Part) -> str:
    """A flag that switches an optional part on."""
    (kind,) = part.slot.classes.values()
    first = tree.slots(kind)[0].field
    default = "NUMBER" if first.default is dataclasses.MISSING else first.default
    return f"--{part.path}.{first.name} {default}"
