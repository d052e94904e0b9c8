"""What the links of a chain say about themselves, and which of them contradict each other on one parameter.

A link sees updates and weights, and never its neighbours. But every link of this library says in its ``init`` what it
does to which parameters (`tell`), and ``init`` of a chain calls those of its links in their order. So whoever calls
``init`` can read the chain (`listening`), through ``optax.chain``, ``optax.masked``, ``optax.partition`` and any other
wrapper. Links of other libraries say nothing.

================================================= ====================================================================
on one parameter                                  verdict
================================================= ====================================================================
decay ∝ w, then a sphere                          error: the sphere undoes it
sphere, then any decay                            error: leaves the sphere
relative update or floor, and a sphere            error: the sphere sets the length of the step
two of sphere, rotation and radial brake          error: two links set one norm
decay, then a relative update or floor            error: the decay is scaled with the update
two of relative update and floor                  error: the second undoes or repeats the first
decay ∝ w, then a brake with inward < 1           doubt: the brake keeps that share of the decay
pull towards the initial weights, and decay ∝ w   doubt: published without
other decay, then a sphere                        allowed: changes the direction
================================================= ====================================================================

Decay ∝ w is the pull l2 (and whatever equals it) without a cautious gate. With a multiplier that differs between the
slices of one sphere it changes the direction, and is allowed.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optax_decay.product.product import by_path

SETS_NORM = ("sphere", "brake")


class Link(NamedTuple):
    """What one link says about itself.

    Attributes:
        name: of its public factory.
        kind: ``"rate"``, ``"pull"``, ``"sphere"``, ``"brake"`` or ``"scale"``.
        paths: of the parameters that it acts on.
        learning_rate: η, a number or schedule; None if the link has none.
        weight_decay: λ, a number or schedule; None if the link has none.
        proportional: of a pull: whether it is proportional to the weights of every matrix.
        uneven: of a pull: whether its strength may differ between matrices of one stack.
        initial: of a pull: whether it points to the initial weights.
        per: of spheres: `norms.slices`.
        inward: of a brake: the share of a shrinking norm that it keeps.
        slices: of spheres: the dimensions of one sphere, by path.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    learning_rate: Any = None
    weight_decay: Any = None
    proportional: bool = False
    uneven: bool = False
    initial: bool = False
    per: str = ""
    inward: Any = 1.0
    slices: Any = ()


_told: contextvars.ContextVar[list[Link] | None] = contextvars.ContextVar("told", default=None)


def tell(link: Link) -> None:
    """Says what a link is, to whoever is listening; called from ``init``."""
    told = _told.get()
    if told is not None:
        told.append(link)


@contextlib.contextmanager
def listening() -> Iterator[list[Link]]:
    """Collects what links say while transformations are initialised. What is heard inside is heard outside too."""
    before, own = _told.get(), []
    token = _told.set(own)
    try:
        yield own
    finally:
        _told.reset(token)
        if before is not None:
            before.extend(own)


@contextlib.contextmanager
def directed() -> Iterator[None]:
    """What decays inside says that its pull is not proportional to the weights, for a rule that changes it."""
    before, token = _told.get(), _told.set([])
    try:
        yield
    finally:
        own = _told.get() or []
        _told.reset(token)
        if before is not None:
            before.extend(link._replace(proportional=False) for link in own)


def links_of(tx: optax.GradientTransformation, params: optax.Params) -> list[Link]:
    """The links of a transformation in their order, for parameters of which the shapes suffice."""
    with listening() as told:
        jax.eval_shape(lambda p: tx.init(p), params)
    return told


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """``optax.scale_by_learning_rate`` that says its learning rate."""
    link = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> Any:
        tell(Link("scale_by_learning_rate", "rate", tuple(by_path(params)), learning_rate))
        return link.init(params)

    return optax.GradientTransformation(init, link.update)


def contradictions(links: Sequence[Link]) -> list[str]:
    """A sentence for every contradiction, with the parameters that it is about; empty if there is none."""
    return _found(links, _error)


def doubts(links: Sequence[Link]) -> list[str]:
    """A sentence for everything that is allowed, but hardly meant."""
    return _found(links, _doubt)


def refuse_contradictions(links: Sequence[Link]) -> None:
    """Raises ValueError if two of the links contradict each other."""
    found = contradictions(links)
    if found:
        raise ValueError("\n".join(found))


def and_more(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    rest = len(names) - 1
    return f"{names[0]} (and {rest} more)" if rest else names[0]


def _found(links: Sequence[Link], rule: Any) -> list[str]:
    where: dict[str, list[str]] = {}
    acting = [link for link in links if link.kind != "rate"]
    for i, first in enumerate(acting):
        for second in acting[i + 1 :]:
            sentence = rule(first, second)
            if sentence:
                inside = set(second.paths)
                where.setdefault(sentence, []).extend(p for p in first.paths if p in inside)
    return [
        sentence.format(and_more(list(dict.fromkeys(paths))))
        for sentence, paths in where.items()
        if paths
    ]


def _undone(pull: Link, sphere: Link) -> bool:
    """Whether a sphere undoes a pull before it."""
    shared = sphere.per in ("layer", "leaf") and pull.uneven
    return pull.kind == "pull" and pull.proportional and not shared


def _error(first: Link, second: Link) -> str:
    a, b, kinds = first.name, second.name, (first.kind, second.kind)
    if kinds == ("pull", "sphere") and _undone(first, second):
        return (
            f"{{}} would decay in proportion to its weights, by {a}, while it is on the sphere of {b}: the sphere "
            "fixes the norm and undoes that. Remove the decay, exclude these leaves with mask=..., or use a pull that "
            "changes the direction, such as pulls.huber()."
        )
    if kinds == ("sphere", "pull"):
        return (
            f"{{}} would leave the sphere of {a}, because {b} moves it afterwards. Put {b} in front of {a}, exclude "
            "these leaves from one of the two, or use radial_brake, behind which a decay may stand."
        )
    if set(kinds) == {"scale", "sphere"}:
        scale, sphere = (a, b) if first.kind == "scale" else (b, a)
        return (
            f"{{}} gets steps whose length {sphere} sets, so that {scale} has no effect before it and breaks it "
            f"behind: remove {scale}, or exclude these leaves."
        )
    if all(kind in SETS_NORM for kind in kinds):
        return f"{{}} has its norm set by two links, {a} and {b}: keep one of them."
    if kinds == ("pull", "scale"):
        return (
            f"{{}} has a decay, {a}, in front of {b}, which would scale the decay with the update: put {a} behind "
            f"{b}."
        )
    if kinds == ("brake", "scale"):
        return f"{{}} has {b} behind {a}: a scale of the update stands before the learning rate."
    if kinds == ("scale", "scale"):
        return f"{{}} has its update scaled by two links, {a} and {b}: keep one of them."
    return ""


def _doubt(first: Link, second: Link) -> str:
    a, b = first.name, second.name
    if first.kind == "pull" and second.kind == "brake" and first.proportional:
        inward = second.inward
        if isinstance(inward, int | float) and inward < 1:
            return (
                f"{{}} keeps {inward:g} of what {a} does to its norm, because {b} stands behind it with "
                f"inward={inward:g}."
            )
    if first.kind == second.kind == "pull":
        initial, other = (first, second) if first.initial else (second, first)
        if initial.initial and not other.initial and other.proportional:
            return (
                f"{{}} is pulled towards its initial weights by {initial.name} and towards zero by {other.name}; "
                "published rules have the first alone."
            )
    return ""
