"""Tables and numbers to look at: which parameters decay, how fast, and the effect of a decay in its last step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.product import couplings, links, masks
from optax_decay.product.couplings import Coupling, check_coupling, now
from optax_decay.product.product import DecayState


@dataclasses.dataclass(frozen=True)
class DecayRow:
    """One parameter of a `DecayTable`.

    Attributes:
        path, shape, role: from its `Signature`.
        weights: number of weights.
        rate: λ(t) times the mask's number, before the learning rate; 0 where nothing decays.
        shrink: fraction by which one step of l2 decay shrinks a weight, or None if the learning rate is not known.
        steps: 1/shrink, the time scale of the decay in steps; infinite where nothing decays.
        tokens: the time scale in tokens, or None if the tokens per step are not known.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    weights: int
    rate: float
    shrink: float | None
    steps: float | None
    tokens: float | None


@dataclasses.dataclass(frozen=True)
class DecayTable:
    """The resolved decay of every parameter. ``str(table)`` is what to print before a run.

    Attributes:
        rows: one `DecayRow` per parameter.
        step: the step at which schedules were evaluated.
        coupling: of λ to the learning rate.
        source: where the roles come from; ``"name"`` and ``"guess"`` mean that no axes were given.
    """

    rows: tuple[DecayRow, ...]
    step: int
    coupling: Coupling
    source: str

    @property
    def decayed_fraction(self) -> float:
        """Share of the weights that decay."""
        total = sum(row.weights for row in self.rows)
        return sum(row.weights for row in self.rows if row.rate) / max(1, total)

    def __str__(self) -> str:
        header = ("parameter", "shape", "role", "weights", "decay", "per step", "steps", "tokens")
        lines: list[tuple[str, ...]] = [header]
        for row in self.rows:
            lines.append(
                (
                    row.path,
                    "×".join(map(str, row.shape)) or "scalar",
                    row.role,
                    quantity_text(row.weights),
                    f"{row.rate:.3g}" if row.rate else "-",
                    "-" if not row.rate else "?" if row.shrink is None else f"{row.shrink:.2e}",
                    *(
                        "-" if not row.rate else "?" if x is None else quantity_text(x)
                        for x in (row.steps, row.tokens)
                    ),
                )
            )
        empty = {
            i for i in range(5, 8) if all(line[i] in "-?" for line in lines[1:])
        }  # columns that nothing is known of
        keep = [i for i in range(len(header)) if i not in empty]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(line[i].ljust(widths[i]) if i < 3 else line[i].rjust(widths[i]) for i in keep)
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        total = sum(row.weights for row in self.rows)
        summary = (
            f"{quantity_text(total)} weights, {100 * self.decayed_fraction:.1f} % of them decay; "
            f"coupling {self.coupling.name} at step {self.step}"
        )
        if self.source == "name":
            summary += "; roles read from names (pass axes=... to state them)"
        if self.source == "guess":
            summary += "; some roles guessed (pass axes=..., such as axes.infer(model))"
        return "\n".join([text[0], rule, *text[1:], rule, summary])


def quantity_text(x: float) -> str:
    """A count in three digits: 1.34B, 58.1M, 512."""
    if math.isinf(x):
        return "∞"
    x = float(f"{x:.3g}")  # first, so that 999999.9 is a million, not 1e+03 thousand
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def decay_table(
    params: optax.Params,
    weight_decay: optax.ScalarOrSchedule,
    *,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    coupling: Coupling = couplings.learning_rate(),
    learning_rate: optax.ScalarOrSchedule | None = None,
    tokens_per_step: int | None = None,
    step: int = 0,
    optimizer: optax.GradientTransformation | None = None,
) -> DecayTable:
    """Lists which parameters decay and how fast, for the arguments that a decay was built with.

    Args:
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        weight_decay, mask, axes, coupling: as given to `decay`.
        learning_rate: η, a number or schedule; for the shrink per step and its time scale. The coupling
            ``couplings.independent()`` does not need it.
        tokens_per_step: for the time scale in tokens.
        step: where schedules are evaluated. A warm-up starts at 0: take a step on the plateau.
        optimizer: the whole optimizer, to raise if its other links contradict the decay; see also `probe`.

    Raises:
        ValueError: as `decay`; `optimizer` fixes the norm of a parameter that decays in proportion to its weights, or
            holds other links that contradict each other (`product.links`).

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.zeros((9, 4)), "norm": jnp.zeros(4), "up": jnp.zeros((4, 6))}
    >>> rules = (("embed", "V -> D"), ("norm", "D"), ("up", "D -> F"))
    >>> print(decay_table(params, 0.1, mask="hidden", axes=rules, learning_rate=3e-4))
    parameter  shape  role       weights  decay  per step  steps
    ------------------------------------------------------------
    embed      9×4    embedding       36      -         -      -
    norm       4      vector           4      -         -      -
    up         4×6    hidden          24    0.1  3.00e-05  33.3k
    ------------------------------------------------------------
    64 weights, 37.5 % of them decay; coupling learning_rate at step 0
    """
    check_coupling(coupling)
    signatures = axes_lib.signatures(axes, params)
    strength = masks.strengths(mask, params, signatures)
    if optimizer is not None:
        nothing = isinstance(weight_decay, int | float) and weight_decay == 0
        decayed = {path for path, number in strength.items() if number and not nothing}
        _refuse_fixed_norms(links.links_of(optimizer, params), decayed)
    count = jnp.asarray(step, jnp.int32)
    eta = None if learning_rate is None else float(now(learning_rate, count))
    if coupling.after_rate:
        eta = 1.0
    base = float(now(weight_decay, count))
    pulled = float(coupling.rate(weight_decay, count))
    rows = []
    for path, signature in signatures.items():
        shrink = None if eta is None else eta * pulled * strength[path]
        steps = None if shrink is None else 1 / shrink if shrink else math.inf
        rows.append(
            DecayRow(
                path,
                signature.shape,
                signature.role,
                math.prod(signature.shape),
                base * strength[path],
                shrink,
                steps,
                None if steps is None or tokens_per_step is None else steps * tokens_per_step,
            )
        )
    sources = {s.source for s in signatures.values() if len(s.shape) > 1}
    source = next((s for s in ("guess", "name") if s in sources), "rules")
    return DecayTable(tuple(rows), step, coupling, source)


def _refuse_fixed_norms(told: list[links.Link], decayed: set[str]) -> None:
    """Raises ValueError for contradictions, and for decay by links of other libraries where the norm is fixed."""
    links.refuse_contradictions(told)
    known = {path for link in told if link.kind == "pull" for path in link.paths}
    for link in told:
        fixed = [path for path in link.paths if path in decayed - known]
        if link.kind == "sphere" and fixed:
            raise ValueError(
                f"{links.and_more(fixed)} would decay, but {link.name} fixes its norm and undoes that. Remove the "
                "decay, or exclude these leaves with mask=...."
            )


def metrics(state: optax.OptState) -> dict[str, float]:
    """Every number that the decays in an optimizer state keep per parameter, as ``name/path[/slice] -> float``.

    Reads `Metrics` (built with ``metrics=True``) and whatever multipliers and thresholds remember, such as the tail
    exponents of `spectral_alpha`. Finds them in any chain; copies them to the host.
    """
    found: dict[str, float] = {}
    states = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, DecayState))
        if isinstance(s, DecayState)
    ]
    for index, decay_state in enumerate(states):
        prefix = f"{index}/" if len(states) > 1 else ""
        for path, values in _named(decay_state.metrics):
            for name, value in zip(type(values)._fields, values):
                _add(found, f"{prefix}{name}/{path}", value)
        for memory in (decay_state.threshold, *decay_state.multipliers):
            for name, table in _tables(memory):
                for path, value in table.items():
                    _add(found, f"{prefix}{name}/{path}", value)
    return found


def _named(table: object) -> list[tuple[str, Any]]:
    return list(table.items()) if isinstance(table, dict) else []


def _tables(memory: object) -> list[tuple[str, dict[str, Any]]]:
    """The dictionaries by path that a `PerMatrix` remembers, with the names of their fields."""
    if isinstance(memory, dict):
        return [("threshold", memory)]
    return [
        (name, field)
        for name in getattr(memory, "_fields", ())
        if isinstance(field := getattr(memory, name), dict)
    ]


def _add(found: dict[str, float], name: str, value: jax.typing.ArrayLike) -> None:
    array = np.asarray(value)
    if array.ndim == 0:
        found[name] = float(array)
    for index in np.ndindex(array.shape) if array.ndim else ():
        found["/".join([name, *map(str, index)])] = float(array[index])
