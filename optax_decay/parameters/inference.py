"""Finds the axes of a model's parameters, as rules that can be printed, corrected and passed as ``axes``.

What a parameter's axes mean is read from the first of these that knows it:

1. the module that owns it: Flax NNX (`Linear`, `LinearGeneral`, `Einsum`, `Conv`, `Embed`, norms, LoRA), Equinox and
   haliax (`Linear`, `Conv`, `Embedding`, norms), whose attributes say how many input and output features there are;
2. labels of its axes that say what they are, such as ("embed", "mlp"): Linen's ``nn.with_partitioning``, the sharding
   metadata of NNX, haliax's named axes;
3. its name, as Flax Linen, Haiku, MaxText and transformers name parameters: ``kernel`` and ``w`` are stored
   [inputs, outputs], ``weight`` [outputs, inputs], ``scale`` and ``bias`` are vectors, ``embedding`` is
   [tokens, features]. Where the sizes of its neighbours contradict that order (a bias, the width of the
   embedding), they decide: transformers' GPT-2 for Flax stores its kernels [outputs, inputs].

Axes that a module or a name does not explain are stacked layers, if all parameters of a subtree share them. Roles
follow from how sizes connect: features that one matrix puts out and another takes in grow with the width; a size that
only enters the model (patches, features of the data) or only leaves it (vocabulary, classes) does not. The rules state
such roles in brackets.

Nothing is guessed: a parameter that cannot be explained raises, with the descriptions that are possible.
"""

import collections
import re
from typing import Any

from optax_decay.parameters.labelled_axes import by_labels, is_fixed, labels_of
from optax_decay.parameters.module_axes import (
    equinox_parameters,
    is_module,
    leaf_shapes,
    nnx_parameters,
    of_equinox,
    of_nnx,
)
from optax_decay.parameters.named_axes import KnownAxes, candidates, named
from optax_decay.parameters.sizes import Sizes
from optax_decay.parameters.words import is_expert

_KERNEL_POSITIONS = {1: ("KW",), 2: ("KH", "KW"), 3: ("KD", "KH", "KW")}
_LETTERS = tuple("FGIJMNOQRSUWXYZAB")


class InferredAxes(tuple):
    """Rules ``((pattern, signature), ...)``, to be passed as ``axes``. Printing gives the text to paste.

    Attributes:
        basis: what the description of each parameter rests on, by path.
    """

    basis: dict[str, str]

    def __str__(self) -> str:
        patterns = [f'r"{p}",' if '"' not in p else f"{p!r}," for p, _ in self]
        width = max(map(len, patterns), default=0)
        lines = [f'    ({p:{width}} "{s}"),' for p, (_, s) in zip(patterns, self)]
        return "\n".join(["AXES = (", *lines, ")"])


def infer(model: Any) -> InferredAxes:
    """Finds the axes of a model's parameters.

    Args:
        model: the whole model: a Flax NNX module, an Equinox or haliax module, or a tree of parameters (arrays or
            ``jax.ShapeDtypeStruct``) named as Flax Linen, Haiku, MaxText or transformers name them.

    Returns:
        `InferredAxes`: rules for the parameters that an optimizer sees, ``nnx.state(model, nnx.Param)``,
        ``eqx.filter(model, eqx.is_array)`` or the tree itself.

    Raises:
        ValueError: a parameter that neither its module nor its name explains; the message gives what it could be.

    >>> import jax.numpy as jnp
    >>> params = {
    ...     "embed": {"embedding": jnp.zeros((9, 4))},
    ...     "up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)},
    ...     "down": {"kernel": jnp.zeros((6, 4))},
    ...     "head": {"kernel": jnp.zeros((4, 9))},
    ... }
    >>> print(infer(params))
    AXES = (
        (r"down/kernel",     "F -> D"),
        (r"embed/embedding", "V -> D"),
        (r"head/kernel",     "D -> V"),
        (r"up/bias",         "F"),
        (r"up/kernel",       "D -> F"),
    )
    """
    found = described(model)
    known = {path: axes for path, axes in found.items() if axes is not None}
    for path, axes in found.items():
        if axes is None:
            shape = leaf_shapes(parameters(model))[path]
            possible = candidates(len(shape))
            raise ValueError(
                f"the axes of {path!r} with shape {shape} are not known from its name; it could be "
                f"{', '.join(possible)}. Describe it with axes=..., such as axes=(({path!r}, {possible[0]}), "
                "*rules of the other parameters), or leave it out of the tree that you pass to infer."
            )
    return _rules(known)


def parameters(model: Any) -> Any:
    """The tree of parameters that an optimizer sees of a model."""
    if is_module("flax.nnx", model):
        return nnx_parameters(model)
    return equinox_parameters(model)


def described(model: Any) -> dict[str, KnownAxes | None]:
    """What is known of each parameter of a model, by path: from modules, labels, names and sizes, in this order."""
    tree = parameters(model)
    shapes = leaf_shapes(tree)
    known = of_nnx(model) if is_module("flax.nnx", model) else of_equinox(tree)
    for path, labels in labels_of(tree).items():
        if path in shapes and path not in known:
            axes = by_labels(path, shapes[path], labels)
            if axes is not None:
                known[path] = axes
    return named(shapes, known)


def _rules(found: dict[str, KnownAxes]) -> InferredAxes:
    letters = _Letters(found)
    texts = {path: letters.text(path, axes) for path, axes in found.items()}
    of_form: dict[str, set[str]] = collections.defaultdict(set)
    for path, text in texts.items():
        for form in _forms(path):
            of_form[form].add(text)
    rules = {}
    for path, text in texts.items():
        form = next((form for form in _forms(path) if len(of_form[form]) == 1), _pattern(path))
        rules[form] = text
    # A longer pattern first: a rule matches the end of a path.
    ordered = sorted(rules.items(), key=lambda rule: (-rule[0].count("/"), rule[0]))
    result = InferredAxes(ordered)
    result.basis = {path: axes.basis for path, axes in found.items()}
    return result


def _forms(path: str) -> list[str]:
    """Patterns for a path in which numbers stand for any number: all of them, and fewer and fewer from the right."""
    pieces = re.split(r"(?:(?<=[/._])|(?<=^))(\d+)(?=[/.]|$)", path)
    numbers = len(pieces) // 2
    return [
        "".join(
            _pattern(piece) if i % 2 == 0 or i // 2 >= kept else r"\d+"
            for i, piece in enumerate(pieces)
        )
        for kept in range(numbers, -1, -1)
    ]


def _pattern(text: str) -> str:
    return re.sub(r"\\([-_~#& ])", r"\1", re.escape(text))


def _sides(axes: KnownAxes) -> list[tuple[int, ...]]:
    """The sizes of the inputs, and those of the outputs."""
    return [tuple(axes.shape[i] for i in group) for group in (axes.inputs, axes.outputs)]


class _Letters:
    """Names of axes: one letter for one size among the features that grow, and fixed ones at the ends of the model."""

    def __init__(self, found: dict[str, KnownAxes]) -> None:
        self.sizes = Sizes(found)
        groups = [g for a in found.values() if a.kind != "vector" for g in _sides(a)]
        alone = collections.Counter(g[0] for g in groups if len(g) == 1)
        embedded = [a.size(a.outputs) for a in found.values() if a.kind == "embedding"]
        # The width of the model is D, for it is embedded or else what most matrices take in or put out.
        order = [*embedded[:1], *(size for size, _ in alone.most_common())]
        self.features = set(order)
        self.layers = {a.shape[i] for a in found.values() if a.kind == "vector" for i in a.batch}
        self.size_of: dict[str, int] = {}
        self.names: dict[int, str] = {}
        for size in [*order, *(size for g in groups for size in g)]:
            if size not in self.names:
                n = len(self.names)
                self.names[size] = (
                    "D" if n == 0 else _LETTERS[n - 1] if n <= len(_LETTERS) else f"A{n}"
                )
        self.size_of |= {name: size for size, name in self.names.items()}

    def text(self, path: str, axes: KnownAxes) -> str:
        """The signature of one parameter."""
        names: dict[int, str] = {}

        def name(i: int, letter: str) -> None:
            names[i] = self._name(letter, axes.shape[i], set(names.values()))

        for i in axes.batch:
            layers = axes.shape[i] in self.layers if self.layers else not is_expert(path)
            name(i, "L" if layers else "E")
        names |= dict(zip(axes.kernel, _KERNEL_POSITIONS.get(len(axes.kernel), ())))
        if axes.kind == "vector":
            sizes = [axes.shape[i] for i in axes.outputs]
            heads = len(sizes) == 2 and not set(sizes) <= self.features
            for place, i in enumerate(axes.outputs):
                vocabulary = axes.shape[i] in self.sizes.vocabulary - self.sizes.taken
                own = self.names.get(axes.shape[i], str(axes.shape[i]))
                name(i, "V" if vocabulary else "HK"[place] if heads else own)
            batch = " ".join(names[i] for i in axes.batch)
            body = " ".join(names[i] for i in axes.outputs) or "1"
            return self._ordered(
                [names[i] for i in sorted(names)], f"{batch} | {body}" if batch else body
            )
        fixed_in, fixed_out = self._ends(path, axes)
        for group, fixed in ((axes.inputs, fixed_in), (axes.outputs, fixed_out)):
            for place, i in enumerate(group):
                name(i, fixed or ("HK"[place] if len(group) == 2 else self.names[axes.shape[i]]))
        sides = [" ".join(names[i] for i in g) for g in (axes.inputs, axes.outputs)]
        batch = " ".join(names[i] for i in (*axes.batch, *axes.kernel))
        body = f"{batch} | {sides[0]} -> {sides[1]}" if batch else " -> ".join(sides)
        grows = [any(self._grows(names[i]) for i in g) for g in (axes.inputs, axes.outputs)]
        role = self.sizes.role(path, axes)
        said = {"hidden": [True, True], "embedding": [False, True], "head": [True, False]}[role]
        stated = "" if grows == said else f" [{role}]"
        return self._ordered([names[i] for i in sorted(names)], body) + stated

    @staticmethod
    def _grows(name: str) -> bool:
        return not (name.isdigit() or is_fixed(name))

    def _name(self, letter: str, size: int, used: set[str]) -> str:
        """The letter, with a number where this parameter uses it already or where it has another size elsewhere."""
        if letter.isdigit() or (size == 1 and letter not in "PV"):
            return str(size)
        name, n = letter, 2
        while name in used or self.size_of.setdefault(name, size) != size:
            name, n = f"{letter}{n}", n + 1
        return name

    @staticmethod
    def _ordered(array: list[str], body: str) -> str:
        flat = [name for name in re.split(r"[\s|>-]+", body) if name]
        return body if flat == array else f"{' '.join(array)} : {body}"

    def _ends(self, path: str, axes: KnownAxes) -> tuple[str | None, str | None]:
        """Letters of the sides that do not grow with the width, or None."""
        if axes.kind in ("embedding", "positions"):
            return "V" if axes.kind == "embedding" else "T", None
        role = self.sizes.role(path, axes)
        if role == "head":
            return None, "V" if axes.size(axes.outputs) in self.sizes.vocabulary else "C"
        return ("P" if role == "embedding" else None), None
