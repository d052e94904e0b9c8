"""One optimizer per role or per rule: which parameter gets which, in words, before the first step.

    tx = by_role({"hidden": muon, "head": adamw, ("embedding", "vector"): adam, "router": None},
                 rules=((r"router/kernel", "router"),), axes=AXES)

Every parameter belongs to exactly one entry: to that of the first rule that matches its path, or else to that of its
role (`axes.signatures`). Rules match whole components at the end of a path: ``attn_gate`` takes ``blocks/attn_gate``
and not ``blocks/attn_gated_norm``. An entry of None freezes its parameters.

Each entry sees only its own parameters, and keeps its own state under the name of its key. Norms over all parameters
are therefore norms of one entry inside of it: clip gradients outside, before `by_role`. Extra arguments of ``update``
go to all entries. Links of this library that contradict each other on one parameter, such as a decay and a sphere
(`product.links` has the list), raise at ``init``; links of other libraries cannot be seen.

Reference: ``optax.partition``, which does the work. Published divisions: Marin's hero run has MuonH for matrices, AdamH
for the head and output projections, Adam for the rest; Jordan's Muon has Adam for everything but hidden matrices.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import nearest
from optax_decay.parameters.paths import matches, path_string
from optax_decay.product import masks
from optax_decay.product.links import doubts, listening, refuse_contradictions

Key = str | tuple[str, ...]
Transforms = Mapping[Key, optax.GradientTransformation | None]


def name_of(key: Key) -> str:
    return key if isinstance(key, str) else "+".join(key)


def _parts(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def entries_of(transforms: Transforms, rules: axes_lib.Rules) -> dict[str, str]:
    """Roles and names of rules to the name of their entry.

    Raises:
        ValueError: a name in two entries, a name that is neither a role nor used by a rule, a rule without an entry.
    """
    entries: dict[str, str] = {}
    for key in transforms:
        for part in _parts(key):
            if part in entries:
                raise ValueError(
                    f"{part!r} stands in two entries, {entries[part]!r} and {name_of(key)!r}."
                )
            entries[part] = name_of(key)
    targets = {target for _, target in rules}
    for part in entries:
        if part not in axes_lib.ROLES and part not in targets:
            raise ValueError(
                f"{part!r} is neither a role ({', '.join(axes_lib.ROLES)}; did you mean "
                f"{nearest(part, axes_lib.ROLES)!r}?) nor the target of a rule."
            )
    for pattern, target in rules:
        if target not in entries:
            raise ValueError(
                f"the rule {pattern!r} sends parameters to {target!r}, which has no entry (did you mean "
                f"{nearest(target, entries or axes_lib.ROLES)!r}?)."
            )
    return entries


def assigned(
    params: optax.Params, entries: dict[str, str], axes: axes_lib.Axes, rules: axes_lib.Rules
) -> dict[str, tuple[axes_lib.Signature, str, str]]:
    """Signature, entry and pattern of every parameter, by path.

    Raises:
        ValueError: a parameter whose role has no entry.
    """
    found, signatures = {}, axes_lib.signatures(axes, params)
    masks.warn_of_guesses("by_role", signatures)
    for path, signature in signatures.items():
        pattern, target = next(
            ((pattern, target) for pattern, target in rules if matches(pattern, path)),
            ("", signature.role),
        )
        if target not in entries:
            raise ValueError(
                f"{path!r} of shape {signature.shape} has the role {target!r}, for which there is no entry; entries "
                f"are for {', '.join(map(repr, entries))}. Add one (None freezes), or a rule for this path."
            )
        found[path] = signature, entries[target], pattern
    return found


def _check_nothing_is_left_over(
    params: optax.Params, found: Any, entries: dict[str, str], rules: axes_lib.Rules
) -> None:
    """Raises ValueError for rules and entries without a parameter.

    Parameters that ``optax.masked`` hides count for rules, and make it unknowable whether an entry is in use.
    """
    hole = lambda x: x is None or isinstance(x, optax.MaskedNode)
    items = jax.tree_util.tree_flatten_with_path(params, is_leaf=hole)[0]
    paths = [path_string(key) for key, _ in items]
    used = set()
    for path in paths:
        used |= set([pattern for pattern, _ in rules if matches(pattern, path)][:1])
    for pattern, _ in rules:
        if pattern not in used:
            shadowed = any(matches(pattern, path) for path in paths)
            raise ValueError(
                f"the rule {pattern!r} matches no parameter"
                + (" that an earlier rule leaves over" if shadowed else "")
                + f"; the nearest path is {nearest(pattern, paths)!r}."
            )
    empty = set(entries.values()) - {entry for _, entry, _ in found.values()}
    if empty and not any(hole(leaf) for _, leaf in items):
        raise ValueError(
            f"no parameter belongs to the entry {sorted(empty)[0]!r}; roles of the parameters are "
            f"{sorted({signature.role for signature, _, _ in found.values()})}."
        )


def by_role(
    transforms: Transforms, *, axes: axes_lib.Axes = None, rules: axes_lib.Rules = ()
) -> optax.GradientTransformationExtraArgs:
    """Updates each parameter with the optimizer of its role, or of the first rule that matches its path.

    Args:
        transforms: a role, or a name that `rules` use, or a tuple of them, to a whole optimizer; None freezes.
        axes: what the parameters' axes mean (`axes.signatures`), from which the roles follow: ``"hidden"``, ``"head"``,
            ``"embedding"`` and ``"vector"``.
        rules: ``((path pattern, role or name), ...)``, exceptions that come before the roles; the first match wins.

    Returns:
        A transformation with the state of ``optax.partition``. Print `role_table` of the same arguments to see what
        it does.

    Raises:
        ValueError: a name in two entries, a name that is neither a role nor used by a rule, a rule without an entry; at
            ``init``, a role without an entry, an entry or a rule without a parameter, links that contradict each
            other on one parameter.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.clip_by_global_norm(1.0),
    ...     optax_decay.by_role(
    ...         {
    ...             "hidden": optax_decay.muon_hyperball(0.02),
    ...             "head": optax.adamw(1e-3, weight_decay=0.1),
    ...             ("embedding", "vector"): optax.adam(1e-3),
    ...         }
    ...     ),
    ... )
    """
    entries = entries_of(transforms, rules)
    partition = optax.partition(
        {name_of(key): optax.set_to_zero() if tx is None else tx for key, tx in transforms.items()},
        lambda params: _labels(params, assigned(params, entries, axes, rules)),
    )

    def init(params: optax.Params) -> Any:
        if jax.tree.leaves(params):
            found = assigned(params, entries, axes, rules)
            _check_nothing_is_left_over(params, found, entries, rules)
        with listening() as told:
            state = partition.init(params)
        refuse_contradictions(told)
        for sentence in doubts(told):
            warnings.warn(sentence, UserWarning, stacklevel=2)
        return state

    return optax.GradientTransformationExtraArgs(init, partition.update)


def _labels(params: optax.Params, found: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda key, _: found[path_string(key)][1], params)
