"""The table of `by_role`: which parameter has which optimizer, learning rate, decay and sphere.

Parameters and entries follow from the arguments. The rest is what the links of this library say of themselves when they
are initialised (`product.links`); of other optimizers only the names of their states are known.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.optimizers.by_role import Transforms, assigned, by_role, entries_of, name_of
from optax_decay.optimizers.muon import ScaleByMuonState
from optax_decay.parameters import axes as axes_lib
from optax_decay.product.couplings import now
from optax_decay.product.links import Link, listening


@dataclasses.dataclass(frozen=True)
class RoleRow:
    """One parameter of a `RoleTable`.

    Attributes:
        path, shape, role: from its `Signature`.
        entry: the name of the entry it belongs to.
        rule: the pattern that chose the entry; empty where the role did.
        frozen: whether it stays as it is.
        optimizer: rules for the direction in the entry, such as ``"muon"``; empty where its state does not show them.
        learning_rate: η at the step of the table; None where the entry does not say.
        weight_decay: λ at the step of the table, 0 without decay; None where the entry does not say.
        sphere: what shares a sphere, and its axes, such as ``"matrix D F"``; empty off the sphere.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    entry: str
    rule: str
    frozen: bool
    optimizer: str
    learning_rate: float | None
    weight_decay: float | None
    sphere: str


@dataclasses.dataclass(frozen=True)
class RoleTable:
    """Which parameter belongs to which entry. ``str(table)`` is what to print before a run.

    Attributes:
        rows: one `RoleRow` per parameter.
        step: the step at which schedules were evaluated.
    """

    rows: tuple[RoleRow, ...]
    step: int

    def __str__(self) -> str:
        names = (
            "parameter",
            "shape",
            "role",
            "entry",
            "optimizer",
            "η",
            "λ",
            "sphere",
            "chosen by",
        )
        lines = [names, *(_texts(row) for row in self.rows)]
        keep = [i for i in range(len(names)) if i not in (4, 7) or any(x[i] for x in lines[1:])]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        text = ["  ".join(line[i].ljust(widths[i]) for i in keep).rstrip() for line in lines]
        rule = "-" * max(map(len, text))
        weights: dict[str, int] = {}
        for row in self.rows:
            weights[row.entry] = weights.get(row.entry, 0) + math.prod(row.shape)
        end = ["weights: " + ", ".join(f"{n} {name}" for name, n in weights.items())]
        if any("?" in line[5:7] for line in lines):
            end.append("?: an optimizer of another library, which does not say")
        return "\n".join([text[0], rule, *text[1:], rule, *end])


def _texts(row: RoleRow) -> tuple[str, ...]:
    """The cells of a row."""

    def number(value: float | None) -> str:
        return "-" if row.frozen or value == 0 else "?" if value is None else f"{value:.3g}"

    return (
        row.path,
        "×".join(map(str, row.shape)) or "scalar",
        row.role,
        f"{row.entry} (frozen)" if row.frozen else row.entry,
        row.optimizer,
        number(row.learning_rate),
        number(row.weight_decay),
        row.sphere,
        f"rule {row.rule!r}" if row.rule else "role",
    )


def role_table(
    params: optax.Params,
    transforms: Transforms,
    *,
    axes: axes_lib.Axes = None,
    rules: axes_lib.Rules = (),
    step: int = 0,
) -> RoleTable:
    """Which parameter belongs to which entry, for the arguments that `by_role` is built with.

    Args:
        params: tree of arrays or ``jax.ShapeDtypeStruct``; the shapes are enough, and nothing is computed.
        transforms, axes, rules: as given to `by_role`.
        step: where schedules are evaluated. A warm-up starts at 0: take a step on the plateau.

    Raises:
        ValueError: as `by_role`, at once.

    >>> import jax.numpy as jnp, optax, optax_decay
    >>> params = {"embed": jnp.ones((9, 4)), "norm": jnp.ones(4), "up": jnp.ones((4, 6))}
    >>> axes = (("embed", "V -> D"), ("norm", "D"), ("up", "D -> F"))
    >>> matrices = optax_decay.muon_hyperball(0.02, axes=axes)
    >>> print(role_table(params, {"hidden": matrices, "vector": optax.adam(1e-3), "embedding": None}, axes=axes))
    parameter  shape  role       entry               optimizer  η     λ  sphere      chosen by
    ------------------------------------------------------------------------------------------
    embed      9×4    embedding  embedding (frozen)             -     -              role
    norm       4      vector     vector              adam       ?     ?              role
    up         4×6    hidden     hidden              muon       0.02  -  matrix D F  role
    ------------------------------------------------------------------------------------------
    weights: 36 embedding, 4 vector, 24 hidden
    ?: an optimizer of another library, which does not say
    """
    entries = entries_of(transforms, rules)
    heard: dict[str, tuple[list[Link], Any]] = {}

    def noting(name: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        def init(params: optax.Params) -> Any:
            with listening() as told:
                state = tx.init(params)
            heard[name] = told + _injected(tx, state), state
            return state

        return optax.GradientTransformation(init, tx.update)

    noted: Transforms = {k: tx and noting(name_of(k), tx) for k, tx in transforms.items()}
    whole = by_role(noted, axes=axes, rules=rules)
    jax.eval_shape(lambda p: whole.init(p), params)
    rows = []
    for path, (signature, entry, pattern) in assigned(params, entries, axes, rules).items():
        told, state = heard.get(entry, ([], ()))
        mine = [link for link in told if link.kind == "injected" or path in link.paths]
        rows.append(
            RoleRow(
                path,
                signature.shape,
                signature.role,
                entry,
                pattern,
                entry not in heard,
                " + ".join(_directions(state, path)),
                _last_known([link.learning_rate for link in mine], step),
                _decay(mine, step),
                _sphere(mine, signature),
            )
        )
    return RoleTable(tuple(rows), step)


def _directions(state: Any, path: str) -> list[str]:
    """Names of the rules for the direction of one parameter, from the states in a state, in their order."""
    kind = type(state).__name__
    if isinstance(state, ScaleByMuonState):
        return ["normuon" if path in state.outputs else "adam" if path in state.nu else "muon"]
    if kind.startswith("ScaleBy") and kind != "ScaleByScheduleState":
        return [kind.removeprefix("ScaleBy").removesuffix("State").lower()]
    inside = state.values() if isinstance(state, dict) else state
    found: list[str] = []
    for part in inside if isinstance(state, tuple | list | dict) else ():
        found += _directions(part, path)
    return list(dict.fromkeys(found))


def _injected(tx: optax.GradientTransformation, state: Any) -> list[Link]:
    """The learning rate that ``optax.inject_hyperparams`` keeps in the state of its optimizer."""
    if not hasattr(state, "hyperparams"):
        return []
    with jax.ensure_compile_time_eval():  # those of `state` are traced
        rate = tx.init({}).hyperparams.get("learning_rate")  # type: ignore[attr-defined]
    return [] if rate is None else [Link("inject_hyperparams", "injected", (), rate)]


def _last_known(values: list[Any], step: int) -> float | None:
    """The last number of a list of numbers and schedules, of which some are None; None for traced ones."""
    known = [x for x in values if x is not None]
    if not known:
        return None
    value = now(known[-1], jnp.asarray(step, jnp.int32))
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _decay(links: list[Link], step: int) -> float | None:
    """λ of all decays together; None where links of other libraries may decay too."""
    pulls = [link.weight_decay for link in links if link.kind == "pull"]
    if not pulls and not any(link.kind == "rate" for link in links):
        return None
    values = [_last_known([value], step) for value in pulls]
    return None if None in values else sum(x for x in values if x is not None)


def _sphere(links: list[Link], signature: axes_lib.Signature) -> str:
    """What shares a sphere, and the letters of its axes."""
    for link in links:
        if link.kind == "sphere":
            axes = signature.names or [str(i) for i in range(len(signature.shape))]
            return " ".join([link.per, *(axes[i] for i in link.slices[signature.path])])
    return ""
