"""The axes of a parameter and their meaning, written once by the model and read by everything else.

A signature is a line such as ``"L | D -> H E"``: batch axes ``|`` input axes ``->`` output axes, one name per array
dimension in array order. ``L`` stacks layers, ``D`` is contracted with the activations, ``H E`` is what comes out.
Parameters without an arrow (``"L | D"``: norm scales, biases) are vectors. An integer stands for an axis of exactly
that size. If the array stores its axes in another order, that order goes first:
``"D S F : S | D -> F"`` is a fused gate-and-up kernel ``[D, 2, F]`` that holds ``S`` separate matrices.

From a signature follow the matrix view ``[batch, inputs, outputs]``, fan-in and fan-out, the role, masks and
shardings:

========== ========================================================= =========================
role       rule                                                      example
========== ========================================================= =========================
hidden     both sides hold a name that grows with width              ``L | D -> H E``
embedding  only the output side does                                 ``V -> D``
head       only the input side does                                  ``D -> V``
vector     everything else                                           ``L | D``, ``C``
========== ========================================================= =========================

Integers do not grow with width, nor do the letter ``V`` (with or without a number) and words for a vocabulary, classes
or positions (`is_fixed`): ``vocab -> embed`` is an embedding. Every other name does; ``C`` may well be channels. Where
that is not what a matrix is, the signature states the role behind it, in brackets: ``P -> D [embedding]`` for patches,
``T -> D [embedding]`` for positions, ``D -> C [head]`` for classes.

A model's description is an ordered list of rules, ``AXES = ((path pattern, signature), ...)``. A pattern is a regular
expression for the end of the ``/``-joined path, starting at a path component; the first match wins. A parameter that
no rule matches raises, and so does a rule that matches no parameter: a silent miss is how exclusions get lost. One name
has one size in all input and output axes: two sizes raise, for then a matrix is described the wrong way round, or two
different axes share a name.
"""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters.arguments import one_of
from optax_decay.parameters.inference import InferredAxes as InferredAxes
from optax_decay.parameters.inference import described
from optax_decay.parameters.inference import infer as infer
from optax_decay.parameters.labelled_axes import is_fixed
from optax_decay.parameters.meshes import inside_shard_map
from optax_decay.parameters.module_axes import leaf_shapes
from optax_decay.parameters.named_axes import named
from optax_decay.parameters.paths import match_rules, path_string, shapes
from optax_decay.parameters.sizes import Sizes

ROLES = ("hidden", "embedding", "head", "vector")

Rules = Sequence[tuple[str, str]]
Axes = Any  # what `signatures` accepts


@dataclasses.dataclass(frozen=True)
class Signature:
    """The axes of one parameter.

    Attributes:
        path: ``/``-joined path in the parameter tree.
        shape: the array's shape.
        names: one name per dimension, in array order (empty when only axis numbers are known).
        batch: dimensions that index independent matrices (or vectors).
        inputs: dimensions contracted with the activations; empty for vectors.
        outputs: the remaining dimensions.
        role: one of `ROLES`.
        source: where the description came from: ``"rules"``, ``"tree"`` or ``"muon"``; without `axes`, ``"name"`` where
            modules, labels or names say it (`infer` lists them), and ``"guess"`` where only the number of dimensions
            does, or where sizes make another role likely.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    role: str
    source: str

    @functools.cached_property
    def text(self) -> str:
        """The notation, without a stated role; ``?`` where only axis numbers are known."""
        if not self.names:
            return "?"
        sides = [" ".join(self.names[i] for i in g) for g in (self.inputs, self.outputs) if g]
        batch = " ".join(self.names[i] for i in self.batch)
        return (f"{batch} | " if batch else "") + " -> ".join(sides)

    @functools.cached_property
    def is_matrix(self) -> bool:
        return bool(self.inputs) and bool(self.outputs)

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.batch)

    @functools.cached_property
    def fan_in(self) -> int:
        return math.prod(self.shape[i] for i in self.inputs)

    @functools.cached_property
    def fan_out(self) -> int:
        return math.prod(self.shape[i] for i in self.outputs)

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(batch, fan_in, fan_out)``, the shape of the matrix view."""
        return math.prod(self.batch_shape), self.fan_in, self.fan_out

    @functools.cached_property
    def reduced(self) -> tuple[int, ...]:
        """The dimensions of one slice: all but the batch axes."""
        return tuple(i for i in range(len(self.shape)) if i not in self.batch)

    def spread(self, value: jax.Array) -> jax.Array:
        """Reshapes a per-slice `value` of shape `batch_shape` so that it broadcasts against the parameter."""
        return jnp.expand_dims(value, self.reduced) if self.batch else value


def as_matrix(x: jax.Array, signature: Signature) -> jax.Array:
    """The parameter (or anything of its shape) as ``[batch, inputs, outputs]``.

    Raises:
        ValueError: the signature describes a vector.
    """
    if not signature.is_matrix:
        raise ValueError(
            f"{signature.path} of shape {signature.shape} is not a matrix: its signature "
            f"{' '.join(signature.names)!r} has no '->'."
        )
    order = signature.batch + signature.inputs + signature.outputs
    return jnp.transpose(x, order).reshape(signature.matrix_shape)


def from_matrix(m: jax.Array, signature: Signature) -> jax.Array:
    """Inverse of `as_matrix`: ``[batch, inputs, outputs]`` back to the parameter's shape."""
    order = signature.batch + signature.inputs + signature.outputs
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    return jnp.transpose(m.reshape([signature.shape[i] for i in order]), inverse)


def parse(text: str, path: str, shape: tuple[int, ...], *, source: str = "rules") -> Signature:
    """Reads one signature for a parameter of the given path and shape.

    Raises:
        ValueError: the text is malformed, or does not have one name per dimension.
    """

    def fail(why: str) -> ValueError:
        return ValueError(f"signature {text!r} of {path!r} with shape {shape}: {why}.")

    stated = re.search(r"\[([^\[\]]*)\]\s*$", text)
    order_text, colon, body = (text[: stated.start()] if stated else text).rpartition(":")
    batch_text, bar, rest = body.rpartition("|")
    inputs_text, arrow, outputs_text = rest.partition("->")
    if not arrow:
        inputs_text, outputs_text = "", rest
    groups = [batch_text.split(), inputs_text.split(), outputs_text.split()]
    if "->" in outputs_text or "|" in batch_text or (bar and not batch_text.strip()):
        raise fail("expected 'batch | inputs -> outputs' with at most one '|' and one '->'")
    if arrow and not (groups[1] and groups[2]):
        raise fail("both sides of '->' need a name")
    flat = [name for group in groups for name in group]
    names = order_text.split() if colon else flat
    for name in names:
        if not re.fullmatch(r"[A-Za-z]\w*|[0-9]+", name):
            raise fail(f"{name!r} is neither a name nor a size")
    repeated = sorted({n for n in names if names.count(n) > 1 and not n.isdigit()})
    if repeated:
        raise fail(f"the name {repeated[0]!r} occurs twice")
    if sorted(names) != sorted(flat):
        raise fail("the order before ':' must hold the same names as the signature after it")
    if len(names) != len(shape):
        raise fail(f"{len(names)} names for {len(shape)} dimensions")
    for name, size in zip(names, shape):
        if name.isdigit() and int(name) != size:
            raise fail(f"an axis of size {size} is described as {name}")

    free = list(range(len(names)))

    def take(group: list[str]) -> tuple[int, ...]:
        found = []
        for name in group:
            found.append(next(i for i in free if names[i] == name))
            free.remove(found[-1])
        return tuple(found)

    batch, inputs, outputs = (take(group) for group in groups)
    batch = tuple(
        sorted(batch)
    )  # so that reducing a slice leaves values in the order of batch_shape

    def grows(axes: tuple[int, ...]) -> bool:
        return any(not names[i].isdigit() and not is_fixed(names[i]) for i in axes)

    role = "vector"
    if inputs:
        role = {(True, True): "hidden", (False, True): "embedding", (True, False): "head"}.get(
            (grows(inputs), grows(outputs)), "vector"
        )
    if stated:
        role = stated.group(1).strip()
        one_of(f"the role of {path!r} in {text!r}", role, ROLES)
        if role != "vector" and not inputs:
            raise fail(f"a parameter of role {role!r} is a matrix and needs a '->'")
    return Signature(path, shape, tuple(names), batch, inputs, outputs, role, source)


def _without_axes(params: optax.Params, whole: bool) -> dict[str, Signature]:
    """What modules, labels and names say; where they say nothing, two dimensions are guessed to be a hidden matrix.

    In a `whole` tree, sizes mark an output layer by its vocabulary, and roles that they put in doubt are guesses.
    """
    try:
        found = described(params)
    except ValueError:  # a module whose attributes contradict its arrays: their names remain
        found = named(leaf_shapes(params), {})
    known = {path: axes for path, axes in found.items() if axes is not None}
    sizes, signatures = Sizes(known), {}
    whole = whole and sizes.connect
    for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path, shape = path_string(key), tuple(leaf.shape)
        rest = tuple(range(len(shape)))
        if path not in known:
            matrix = len(shape) == 2
            inputs, outputs = (rest[:1], rest[1:]) if matrix else ((), rest)
            role = "hidden" if matrix else "vector"
            signatures[path] = Signature(path, shape, (), (), inputs, outputs, role, "guess")
            continue
        axes = known[path]
        role, by_size = sizes.role_by_name(path, axes), sizes.role(path, axes)
        if whole and sizes.is_vocabulary(axes) and by_size == "head":
            role = "head"
        source = "guess" if whole and role != by_size else "name"
        batch = tuple(sorted((*axes.batch, *axes.kernel)))
        signatures[path] = Signature(
            path, shape, (), batch, axes.inputs, axes.outputs, role, source
        )
    return signatures


def _from_muon(
    spec: optax.contrib.MuonDimensionNumbers, path: str, shape: tuple[int, ...]
) -> Signature:
    def numbers(axes: int | Sequence[int]) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"axis {axis} of {spec} is out of range for {path!r} of shape {shape}."
                )
        return tuple(axis % len(shape) for axis in axes)

    inputs, outputs = numbers(spec.reduction_axis), numbers(spec.output_axis)
    if set(inputs) & set(outputs):
        raise ValueError(f"{spec} of {path!r} uses an axis as input and as output.")
    batch = tuple(i for i in range(len(shape)) if i not in inputs + outputs)
    return Signature(path, shape, (), batch, inputs, outputs, "hidden", "muon")


def _is_rules(axes: object) -> bool:
    return (
        isinstance(axes, tuple | list)
        and len(axes) > 0
        and all(
            isinstance(r, tuple | list) and len(r) == 2 and all(isinstance(x, str) for x in r)
            for r in axes
        )
    )


def _describe(spec: object, path: str, shape: tuple[int, ...]) -> Signature:
    if isinstance(spec, Signature):
        if (spec.path, spec.shape) != (path, shape):
            raise ValueError(
                f"axes: the signature of {spec.path!r} with shape {spec.shape} stands where the parameters hold"
                f" {path!r} with shape {shape}; resolve the axes of these parameters."
            )
        return spec
    if isinstance(spec, str):
        return parse(spec, path, shape, source="tree")
    if isinstance(spec, optax.contrib.MuonDimensionNumbers):
        return _from_muon(spec, path, shape)
    if spec is None:
        return Signature(path, shape, (), (), (), tuple(range(len(shape))), "vector", "tree")
    raise ValueError(
        f"axes of {path!r}: expected a signature string, MuonDimensionNumbers or None, got {spec!r}."
    )


def signatures(axes: Axes, params: optax.Params) -> dict[str, Signature]:
    """The `Signature` of every leaf of `params`, by path, in flattening order.

    Args:
        axes: rules ``((pattern, signature), ...)``; or a tree like `params` of signature strings,
            ``optax.contrib.MuonDimensionNumbers`` or None (not a matrix), of which any prefix will do; or the tree of
            `Signature` that `resolve` returns for these parameters, of which only paths and shapes are checked; or a
            function from a tree of ``jax.ShapeDtypeStruct`` to such a tree; or None: what modules, labels and names
            say (`infer` explains them), and where they say nothing, exactly two dimensions are taken for a hidden
            matrix whose axis 0 is the input and everything else for a vector. `inferred` reads sizes as well.
        params: a tree of arrays or ``jax.ShapeDtypeStruct``. Empty trees give an empty dictionary.

    Raises:
        ValueError: a leaf without a rule, a rule without a leaf, a malformed signature, a name with two sizes, or two
            leaves on one path.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    items = [(path_string(key), tuple(leaf.shape)) for key, leaf in leaves]
    if len({path for path, _ in items}) != len(items):
        raise ValueError(
            "two parameters have the same path; name the axes of a tree with unique paths."
        )
    if not items:  # such as the placeholder that optax.tree.map_params calls init with
        return {}
    if isinstance(axes, types.FunctionType):
        axes = axes(shapes(params))
    if axes is None:
        holes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        return _without_axes(params, whole=len(holes) == len(items))
    if _is_rules(axes):
        texts = match_rules(axes, params, "axes")
        return _consistent({path: parse(texts[path], path, shape) for path, shape in items})
    return _consistent(_from_tree(axes, params, items))


def _consistent(found: dict[str, Signature]) -> dict[str, Signature]:
    """The signatures.

    Raises:
        ValueError: a name of an input or output axis has two sizes. A name that vectors alone give to several sizes,
            such as in a rule for all biases, stands for no axis in particular.
    """
    if inside_shard_map():  # where each device sees its part of an axis
        return found
    named = [(s, i) for s in found.values() if s.names for i in (*s.inputs, *s.outputs)]
    of_vectors: dict[str, set[int]] = {}
    for signature, i in named:
        if not signature.inputs:
            of_vectors.setdefault(signature.names[i], set()).add(signature.shape[i])
    sizes: dict[str, tuple[int, Signature]] = {}
    for signature, i in named:
        name, size = signature.names[i], signature.shape[i]
        if signature.inputs or len(of_vectors[name]) == 1:
            first, other = sizes.setdefault(name, (size, signature))
            if first != size and not name.isdigit():
                raise ValueError(
                    f"the axis {name!r} has size {first} in {other.path!r} ({other.text}, shape {other.shape}) and "
                    f"size {size} in {signature.path!r} ({signature.text}, shape {signature.shape}). If one of them is "
                    "stored [outputs, inputs], put the stored order in front, such as 'F D : D -> F'; if the axes "
                    f"differ, give one another name, such as {name + '2'!r}."
                )
    return found


def _from_tree(
    axes: Axes, params: optax.Params, items: list[tuple[str, tuple[int, ...]]]
) -> dict[str, Signature]:
    """Signatures from a tree of descriptions, or a prefix of one."""
    one_rule = isinstance(axes, tuple | list) and len(axes) == 2
    if one_rule and all(isinstance(x, str) for x in axes):
        raise ValueError(
            f"axes={axes!r} is one rule; rules are a tuple of pairs: axes=({axes!r},), with the comma."
        )
    specs: list[Any] = []
    try:
        jax.tree.map(
            lambda spec, part: specs.extend([spec] * len(jax.tree.leaves(part))),
            axes,
            params,
            is_leaf=lambda x: (
                x is None or isinstance(x, str | Signature | optax.contrib.MuonDimensionNumbers)
            ),
        )
    except (ValueError, TypeError) as error:
        why = "is neither rules nor a tree like the parameters"
        if isinstance(axes, Mapping) and all(isinstance(x, str) for x in axes.values()):
            rules = tuple(axes.items())[:1]
            why += (
                f": its keys {sorted(axes)[:3]} are not those of the parameters. If they are patterns, write pairs, in "
                f"the order in which they apply: axes=({rules[0]!r}, ...)"
                if rules
                else ": it is an empty dictionary"
            )
        else:
            why += f": {error}"
        raise ValueError(f"axes of type {type(axes).__name__} {why}.") from error
    return {
        path: _describe(spec, path, shape) for spec, (path, shape) in zip(specs, items, strict=True)
    }


def inferred(params: optax.Params) -> Any:
    """The axes that `infer` finds for a tree of parameters, as a tree of `Signature`: a value for ``axes``.

    Raises:
        ValueError: a parameter that is not known, or a tree of which `optax.masked` or `optax.partition` hide a part,
            in which sizes do not tell where a matrix stands.
    """
    holes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(x, optax.MaskedNode) for x in holes):
        raise ValueError(
            "the roles of parameters cannot be read from sizes where optax.masked or optax.partition hide some of "
            "them: pass axes=optax_decay.axes.infer(model) of the whole model."
        )
    return resolve(infer(params), params)


def resolve(axes: Axes, params: optax.Params) -> Any:
    """Like `signatures`, as a tree of the structure of `params`."""
    return jax.tree.unflatten(jax.tree.structure(params), signatures(axes, params).values())
