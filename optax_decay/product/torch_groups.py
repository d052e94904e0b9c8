"""Masks from the parameter groups of a PyTorch optimizer, such as Hugging Face's `Trainer` makes them.

PyTorch gives each group of parameters a ``weight_decay`` λ_g of its own; here one λ, the largest of them, goes with a
number m = λ_g / λ per parameter, so that ``u ← u + λ m w`` adds λ_g w.

Reference: ``torch.optim.AdamW`` (the option ``weight_decay`` of a group), and ``get_decay_parameter_names`` of
transformers' `Trainer`.

**Differs from PyTorch.** A group's learning rate is not translated: one ``optax.partition`` or `by_role` entry per
learning rate does that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from optax_decay.parameters.arguments import check

# What Flax and Haiku call PyTorch's `weight`, and PyTorch's `bias`.
_OWN = {"weight": "(?:weight|kernel|scale|embedding|w)", "bias": "(?:bias|offset|b)"}


class TorchGroups(NamedTuple):
    """Parameter groups in the terms of `decay`: ``decay(groups.weight_decay, mask=groups.mask)``.

    Attributes:
        weight_decay: λ, the largest of the groups, a number.
        mask: rules ``((path pattern, number), ...)``, one for parameters that differ only in numbers in their names.
    """

    weight_decay: float
    mask: tuple[tuple[str, float], ...]


def from_torch_groups(
    groups: Sequence[Mapping[str, Any]],
    named_parameters: Iterable[tuple[str, Any]] = (),
    *,
    weight_decay: float | None = None,
) -> TorchGroups:
    """Translates the parameter groups of a PyTorch optimizer into λ and a mask.

    Args:
        groups: ``optimizer.param_groups``, or the list of dictionaries that the optimizer was made from. The parameters
            of a group are names, pairs (name, parameter), or parameters.
        named_parameters: ``model.named_parameters()``, for groups that hold parameters without names.
        weight_decay: λ of the groups that do not give one; ``optimizer.param_groups`` always does.

    Returns:
        `TorchGroups`. The rules are for parameters that keep PyTorch's names, with ``.`` or ``/`` between their parts.
        They also match Flax's names for ``weight`` (kernel, scale, embedding), and a tree that stacks all layers in one
        array, if these layers decay alike.

    Raises:
        ValueError: no groups, a group without a weight decay, a parameter without a name or in two groups, or groups
            with different learning rates.

    >>> no_decay = {"params": ["h.0.ln.weight", "h.1.ln.weight"], "weight_decay": 0.0}
    >>> groups = from_torch_groups([{"params": ["h.0.fc.weight", "h.1.fc.weight"], "weight_decay": 0.1}, no_decay])
    >>> groups.weight_decay
    0.1
    >>> [value for pattern, value in groups.mask]
    [1.0, 0.0]
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    if isinstance(groups, Mapping) or not groups:
        raise ValueError(
            "groups is empty or a single dictionary; pass optimizer.param_groups, a list of dictionaries."
        )
    rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
    if len(rates) > 1:
        raise ValueError(
            f"the groups have the learning rates {rates}; only weight decay is translated. Give each rate its own "
            "optimizer with optax.partition or optax_decay.by_role, and pass the groups of one rate at a time."
        )
    decays: dict[str, float] = {}
    for number, group in enumerate(groups):
        own = group.get("weight_decay", weight_decay)
        if own is None:
            raise ValueError(
                f"group {number} gives no weight_decay; pass the optimizer's own as weight_decay=..."
            )
        check(f"weight_decay of group {number}", own, 0.0)
        for name in _names(group, number, names):
            if name in decays:
                raise ValueError(f"{name!r} is in two groups.")
            decays[name] = float(own)
    if not decays:
        raise ValueError("the groups hold no parameters.")
    largest = max(decays.values())
    strengths = {name: own / largest if largest else 0.0 for name, own in decays.items()}
    return TorchGroups(largest, _rules(strengths))


def _names(group: Mapping[str, Any], number: int, names: Mapping[int, str]) -> list[str]:
    given = group.get("param_names")
    if given is not None:
        return list(given)
    found = []
    parameters = group.get("params", ())
    alone = isinstance(parameters, str) or hasattr(parameters, "shape")
    for place, parameter in enumerate([parameters] if alone else parameters):
        if isinstance(parameter, tuple) and len(parameter) == 2:
            parameter = parameter[0]
        name = parameter if isinstance(parameter, str) else names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"parameter {place} of group {number}, with shape {tuple(getattr(parameter, 'shape', ()))}, has no "
                "name: pass named_parameters=model.named_parameters() of the model that the optimizer was made for."
            )
        found.append(name)
    return found


def _rules(strengths: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """One rule for names that differ only in numbers, if they have one strength; longer patterns first."""
    alike: dict[str, set[float]] = {}
    for name, strength in strengths.items():
        alike.setdefault(_pattern(name, any_number=True), set()).add(strength)
    rules = {}
    for name, strength in strengths.items():
        general = _pattern(name, any_number=True)
        rules[general if len(alike[general]) == 1 else _pattern(name)] = strength
    return tuple(sorted(rules.items(), key=lambda rule: (-rule[0].count("[./]"), rule[0])))


def _pattern(name: str, any_number: bool = False) -> str:
    *parts, last = re.split(r"[./]", name)
    pieces = []
    for part in parts:
        if part.isdigit():
            pieces.append(r"(?:\d+[./])?" if any_number else f"{part}[./]")
        else:
            pieces.append(f"{re.escape(part)}[./]")
    return "".join(pieces) + _OWN.get(last, re.escape(last))
