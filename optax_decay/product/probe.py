"""Measures what an optimizer does to weights besides following the gradient: how much it shrinks each parameter.

No link of a chain can see its neighbours, so a decay behind the learning rate (weights grow), a decay in front of Adam
(its strength is lost), or two decays in one chain go unnoticed. `probe` runs the whole optimizer and measures. A decay
of a matrix whose norm is fixed leaves nothing to measure: it is read from what the links say of themselves (`links`).

With g a random gradient and Δ(g) the update of the whole optimizer from one state, directions of descent are odd
functions of the gradient, Δ(−g) = −Δ(g), and decay is even. So per parameter w::

    Δ̄ = (Δ(g) + Δ(−g)) / 2            what is left of both updates: the decay
    shrink = −⟨Δ̄, w⟩ / ⟨w, w⟩         dimensionless, per step; negative if the weights grow

A parameter whose norm neither update changes is reported as one of fixed norm (rotations, norm rules). EXAdam's and
similar directions that are not odd leave a remainder, of the size of the update; it is random, and mostly orthogonal
to w.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.product.diagnostics import DecayTable, quantity_text
from optax_decay.product.links import contradictions, doubts, listening
from optax_decay.product.product import by_path

_NEAR = 1.5  # factor within which a shrink is what was promised
_TWICE = 1.9  # factor from which two parameters of a role differ; twice is measured as 2 give or take 0.1 %


@dataclasses.dataclass(frozen=True)
class ProbeRow:
    """One parameter of a `ProbeTable`.

    Attributes:
        path, shape, role: from its `Signature`.
        shrink: measured fraction by which a step shrinks it without a gradient; negative if it grows.
        promised: the same as a `DecayTable` states it, or None.
        noise: size below which `shrink` is rounding.
        fixed_norm: no update changes its norm.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    shrink: float
    promised: float | None
    noise: float
    fixed_norm: bool

    @property
    def decays(self) -> bool:
        """Whether the measured shrink is more than rounding."""
        return self.shrink > self.noise


@dataclasses.dataclass(frozen=True)
class ProbeTable:
    """What `probe` measured. ``str(table)`` is what to print before a run.

    Attributes:
        rows: one `ProbeRow` per parameter.
        step: the step at which schedules were evaluated.
        problems: sentences; empty if nothing is wrong.
        doubts: sentences about what is allowed, but hardly meant.
    """

    rows: tuple[ProbeRow, ...]
    step: int
    problems: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("parameter", "shape", "role", "measured", "promised", "steps")
        ]
        for row in self.rows:
            measured = (
                "fixed norm"
                if row.fixed_norm
                else f"{row.shrink:.2e}"
                if abs(row.shrink) > row.noise
                else "-"
            )
            promised = (
                "?" if row.promised is None else f"{row.promised:.2e}" if row.promised else "-"
            )
            steps = quantity_text(1 / row.shrink) if row.decays and not row.fixed_norm else "-"
            shape = "×".join(map(str, row.shape)) or "scalar"
            lines.append((row.path, shape, row.role, measured, promised, steps))
        keep = [i for i in range(6) if i != 4 or any(line[4] != "?" for line in lines[1:])]
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        text = [
            "  ".join(line[i].ljust(widths[i]) if i < 3 else line[i].rjust(widths[i]) for i in keep)
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        end = [f"shrink per step, measured at step {self.step}", *self.problems, *self.doubts]
        return "\n".join([text[0], rule, *text[1:], rule, *end])


class ProbeError(ValueError):
    """An optimizer decays in another way than it should; `table` holds what was measured."""

    def __init__(self, table: ProbeTable) -> None:
        super().__init__("\n".join(table.problems) + f"\n\n{table}")
        self.table = table


def probe(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    axes: axes_lib.Axes = None,
    expected: DecayTable | Any = None,
    step: int = 0,
    raises: bool = True,
    extra: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ProbeTable:
    """Measures by how much a whole optimizer shrinks each parameter per step, and raises if that looks wrong.

    Costs two updates. Call it once before a run, with the optimizer as the run uses it.

    Args:
        tx: the whole optimizer, with decay, learning rate, clipping and wrappers.
        params: weights, or a tree of ``jax.ShapeDtypeStruct``, for which normal weights are drawn.
        axes: what the parameters' axes mean (`axes.signatures`); for the roles in the table.
        expected: a `DecayTable` or `WidthTable` of the same parameters, to compare with.
        step: the step at which schedules are evaluated: every counter named ``count`` in the state is set to it. A
            warm-up starts with a learning rate of 0: take a step on the plateau.
        raises: raise `ProbeError` if there are problems; False only lists them in the table.
        extra: extra arguments of ``update``. By default a constant ``value``, a curvature of ones for Sophia, and the
            gradient itself as ``gradients``.
        seed: of the weights and the gradient.

    Returns:
        A `ProbeTable`.

    Raises:
        ProbeError: a parameter grows; nothing decays although something should; a parameter shrinks by something else
            than `expected` states, by a factor of 1.5 or more, or, without `expected`, twice as much as another of its
            role; `expected` states a shrink where the norm is fixed; links contradict each other on one parameter
            (`product.links`).

    >>> import jax.numpy as jnp, optax, optax_decay
    >>> params = {"w": jnp.full((4, 6), 0.5)}
    >>> late = optax.chain(optax.sgd(0.1), optax_decay.decay(0.1))
    >>> print(optax_decay.probe(late, params, raises=False).problems[0])  # doctest: +NORMALIZE_WHITESPACE
    'w' grows by 1.0e-01 per step: a decay stands behind the learning rate (put it in front), or
    its coefficient is negative.
    """
    keys = jax.random.split(jax.random.key(seed), 2)
    gradient = _normal(params, keys[1], 1e-3)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        params = _normal(params, keys[0], 0.02)
    measure = jax.jit(lambda w, g: _measured(tx, w, g, step, extra))
    with listening() as told:
        measured = jax.device_get(measure(params, gradient))
    promised = {} if expected is None else {row.path: row.shrink for row in expected.rows}
    found = max((abs(float(m.shrink)) for m in measured.values()), default=0.0)
    wanted = max((x for x in promised.values() if x), default=0.0)
    # Clipping is odd only to first order, and leaves this much where nothing decays.
    floor = max(1e-3 * found, 3e-4 * wanted)
    rows = tuple(
        _row(signature, measured[path], promised.get(path), floor)
        for path, signature in axes_lib.signatures(axes, params).items()
    )
    braked = {path for link in told if link.kind == "brake" for path in link.paths}
    free = [
        row for row in rows if row.path not in braked
    ]  # a brake takes growth away, which is no decay
    problems = _beside_promises(free) if expected is not None else _beside_each_other(free)
    problems = contradictions(told) + _growing(rows) + problems
    table = ProbeTable(rows, step, tuple(problems), tuple(doubts(told)))
    if table.problems and raises:
        raise ProbeError(table)
    return table


def _row(
    signature: axes_lib.Signature, found: "_Measured", promised: float | None, floor: float
) -> ProbeRow:
    size, drift = float(found.size), float(found.drift)
    # Errors of rounding are independent between the elements that the shrink averages over.
    rounding = 4 * float(found.eps) * size / math.sqrt(max(1, math.prod(signature.shape)))
    return ProbeRow(
        signature.path,
        signature.shape,
        signature.role,
        float(found.shrink),
        promised,
        max(rounding, floor),
        size > 2e-3 and drift < 0.1 * size**2,
    )


class _Measured(NamedTuple):
    """Of one parameter, relative to its norm: what both updates leave, their size, and how they change its norm."""

    shrink: jax.Array
    size: jax.Array
    drift: jax.Array
    eps: Any  # of the dtype of the update


def _measured(
    tx: optax.GradientTransformation,
    params: optax.Params,
    gradient: Any,
    step: int,
    extra: Mapping[str, Any] | None,
) -> dict[str, _Measured]:
    tx = optax.with_extra_args_support(tx)
    state = _at_step(tx.init(params), step)

    def update(sign: jax.Array) -> dict[str, Any]:
        g = jax.tree.map(lambda x: x * sign.astype(x.dtype), gradient)
        ones = lambda *_, **__: jax.tree.map(jnp.ones_like, params)
        given = {"gradients": g, "value": jnp.zeros([]), "hessian_fn": ones} | dict(extra or {})
        return by_path(tx.update(g, state, params, **given)[0])

    both = jax.lax.map(update, jnp.array([1.0, -1.0]))  # compiles one update, not two
    ahead, back = ({path: x[i] for path, x in both.items()} for i in (0, 1))
    found = {}
    for path, w in by_path(params).items():
        wide = jnp.promote_types(w.dtype, jnp.float32)
        w, a, b = w.astype(wide), ahead[path].astype(wide), back[path].astype(wide)
        square = jnp.maximum(jnp.real(jnp.vdot(w, w)), jnp.finfo(wide).tiny)
        norm = jnp.sqrt(square)
        drift = [jnp.abs(jnp.linalg.norm(w + x) / norm - 1) for x in (a, b)]
        found[path] = _Measured(
            -jnp.real(jnp.vdot(w, (a + b) / 2)) / square,
            jnp.maximum(jnp.linalg.norm(a), jnp.linalg.norm(b)) / norm,
            jnp.maximum(*drift),
            jnp.finfo(ahead[path].dtype).eps.astype(wide),
        )
    return found


def _normal(params: optax.Params, key: jax.Array, std: float) -> Any:
    """Normal numbers of the shapes and dtypes of `params`."""

    def draw(key: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, max(1, len(leaves)))
        drawn = [
            std * jax.random.normal(k, x.shape, jnp.promote_types(x.dtype, jnp.float32))
            for k, x in zip(keys, leaves)
        ]
        return treedef.unflatten([d.astype(x.dtype) for d, x in zip(drawn, leaves)])

    return jax.jit(draw)(key)  # one program, not several for each shape


def _at_step(state: Any, step: int) -> Any:
    """The state with every scalar counter named ``count`` set to `step`."""

    def put(key: jax.tree_util.KeyPath, x: jax.Array) -> Any:
        named = key and getattr(key[-1], "name", None) == "count"
        return jnp.full_like(x, step) if named and jnp.ndim(x) == 0 else x

    return jax.tree_util.tree_map_with_path(put, state)


def _growing(rows: Sequence[ProbeRow]) -> list[str]:
    return [
        f"{row.path!r} grows by {-row.shrink:.1e} per step: a decay stands behind the learning rate (put it in "
        "front), or its coefficient is negative."
        for row in rows
        if row.shrink < -row.noise and not row.fixed_norm
    ]


def _beside_promises(rows: Sequence[ProbeRow]) -> list[str]:
    found = []
    for row in rows:
        if row.promised is None:
            continue
        if row.fixed_norm:
            if row.promised > 2 * row.noise:
                found.append(
                    f"{row.path!r} should shrink by {row.promised:.1e} per step, but no update changes its norm: a "
                    "rule that fixes the norm undoes the decay. Remove one of the two."
                )
            continue
        if row.shrink < -row.noise:
            continue
        if not row.promised and row.decays:
            found.append(
                f"{row.path!r} shrinks by {row.shrink:.1e} per step, but should not decay: its link has no mask, or "
                "another link decays it."
            )
        elif (
            max(row.promised, row.shrink) > 2 * row.noise
            and not 1 / _NEAR < row.shrink / (row.promised or 1.0) < _NEAR
        ):
            found.append(_other_than_promised(row))
    return found


def _other_than_promised(row: ProbeRow) -> str:
    promised = f"{row.promised:.1e} per step is promised"
    if not row.decays:
        return (
            f"{row.path!r} does not decay where {promised}: a mask leaves it out, the learning rate is 0 at this step, "
            "or a link behind the decay cuts it off."
        )
    if row.shrink < (row.promised or 0.0):
        return (
            f"{row.path!r} shrinks by {row.shrink:.1e} where {promised}: a link behind the decay shortens it "
            "(clipping, Adam), or its coefficient belongs to another coupling."
        )
    return (
        f"{row.path!r} shrinks by {row.shrink:.1e} where {promised}: two links decay, the decay stands in front of "
        "Adam, or its coefficient belongs to another coupling."
    )


def _beside_each_other(rows: Sequence[ProbeRow]) -> list[str]:
    decayed = [row for row in rows if row.decays and not row.fixed_norm]
    if not decayed and not any(row.fixed_norm or row.shrink < -row.noise for row in rows):
        return ["no parameter shrinks: nothing decays."]
    found = []
    for role in axes_lib.ROLES:
        peers = sorted((row for row in decayed if row.role == role), key=lambda row: row.shrink)
        if peers and peers[-1].shrink > _TWICE * peers[0].shrink:
            low, high = peers[0], peers[-1]
            found.append(
                f"{high.path!r} shrinks by {high.shrink:.1e} per step and {low.path!r}, also of role {role}, by "
                f"{low.shrink:.1e}: pass expected=decay_table(...) if they should differ."
            )
    return found
