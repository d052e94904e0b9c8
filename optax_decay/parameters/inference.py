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

from optax_decay.parameters.labelled_axes import by_labels, labels_of
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

_KERNEL_POSITIONS = {1: ("KW",), 2: ("KH", "KW"), 3: ("KD", "KH", "KW")}
_LETTERS = tuple("FGIJMNOQRSUWXYZAB")


class InferredAxes(tuple):
    """Rules ``((pattern, signature), ...)``, to be passed as ``axes``. Printing gives the text to paste.

    Attributes:
        basis: what the description of each parameter rests on, by path.
    """

    basis: dict[str, str]

    def __str__(self) -> str:
        patterns = [f'r"{pattern}",' for pattern, _ in self]
        width = max(map(len, patterns), default=0)
        lines = [f'    ({p:{width}} "{s}"),' for p, (_, s) in zip(patterns, self)]
        return "\n".join(["AXES = (", *lines, ")"])


def infer(model: Any) -> InferredAxes:
    """Finds the axes of a model's parameters.

    Args:
        model: a Flax NNX module, an Equinox module, or a tree of parameters (arrays or ``jax.ShapeDtypeStruct``)
            named as Flax Linen, Haiku, MaxText or transformers name them.

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
                f"{', '.join(possible)}. Describe it with a rule, such as axes = (({path!r}, {possible[0]}), *the "
                "rules of the other parameters), or leave it out of the tree that you pass to infer."
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
    grouped: dict[str, dict[str, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for path, text in texts.items():
        grouped[re.sub(r"(?<![^/])\d+(?![^/])", "0", path)][text].add(path)
    rules = []
    for general, by_text in grouped.items():
        if len(by_text) == 1:
            pattern = (
                re.escape(general).replace("/0/", r"/\d+/").replace(r"\-", "-").replace(r"\_", "_")
            )
            pattern = re.sub(r"^0/", r"\\d+/", pattern)
            rules.append((pattern, next(iter(by_text))))
        else:
            rules += [(re.escape(p), t) for t, paths in by_text.items() for p in sorted(paths)]
    # A longer pattern first: a rule matches the end of a path.
    rules.sort(key=lambda rule: (-rule[0].count("/"), rule[0]))
    result = InferredAxes(rules)
    result.basis = {path: axes.basis for path, axes in found.items()}
    return result


class _Letters:
    """Names of axes: one letter for one size among the features that grow, and fixed ones at the ends of the model."""

    def __init__(self, found: dict[str, KnownAxes]) -> None:
        self.sizes = Sizes(found)
        sizes = collections.Counter(
            a.shape[i]
            for a in found.values()
            for i in (*a.inputs, *a.outputs)
            if a.kind != "vector"
        )
        embedded = [a.size(a.outputs) for a in found.values() if a.kind == "embedding"]
        order = embedded[:1] + [size for size, _ in sizes.most_common()]
        self.names: dict[int, str] = {}
        self.others: dict[str, list[int]] = collections.defaultdict(list)
        for size in order:
            if size not in self.names:
                n = len(self.names)
                self.names[size] = (
                    "D" if n == 0 else _LETTERS[n - 1] if n <= len(_LETTERS) else f"A{n}"
                )

    def text(self, path: str, axes: KnownAxes) -> str:
        """The signature of one parameter."""
        names: dict[int, str] = {}
        for i, letter in zip(axes.batch, ("L", "E", "M2", "M3")):
            size = axes.shape[i]
            names[i] = self._sized(letter, size) if size > 1 else "1"
        names |= dict(zip(axes.kernel, _KERNEL_POSITIONS.get(len(axes.kernel), ())))
        if axes.kind == "vector":
            heads = len(axes.outputs) == 2 and 1 not in axes.shape
            for place, i in enumerate(axes.outputs):
                size = axes.shape[i]
                letter = self.names.get(size, str(size))
                if size in self.sizes.vocabulary - self.sizes.taken:
                    letter = self._sized("V", size)
                elif heads:
                    letter = self._sized("HK"[place], size)
                names[i] = self._free(letter, names)
            batch = " ".join(names[i] for i in axes.batch)
            body = " ".join(names[i] for i in axes.outputs) or "1"
            ordered = [names[i] for i in sorted(names)]
            return self._ordered(ordered, f"{batch} | {body}" if batch else body)
        fixed_in, fixed_out, role = self._ends(path, axes)
        for group, fixed in ((axes.inputs, fixed_in), (axes.outputs, fixed_out)):
            for place, i in enumerate(group):
                if fixed:
                    letter = self._sized(fixed, axes.shape[i])
                elif len(group) == 2:
                    letter = self._sized("HK"[place], axes.shape[i])
                else:
                    letter = self.names[axes.shape[i]]
                names[i] = self._free(letter, names)
        sides = [" ".join(names[i] for i in g) for g in (axes.inputs, axes.outputs)]
        batch = " ".join(names[i] for i in (*axes.batch, *axes.kernel))
        body = f"{batch} | {sides[0]} -> {sides[1]}" if batch else " -> ".join(sides)
        return self._ordered([names[i] for i in sorted(names)], body) + role

    def _sized(self, letter: str, size: int) -> str:
        """The letter for its first size, and the letter with a number for each further size."""
        sizes = self.others[letter]
        if size not in sizes:
            sizes.append(size)
        n = sizes.index(size)
        return letter if n == 0 else f"{letter}{n + 1}"

    @staticmethod
    def _free(letter: str, names: dict[int, str]) -> str:
        """The letter, or the letter with a number where one parameter has two axes of one size."""
        used, new, n = set(names.values()), letter, 2
        while new in used and not new.isdigit():
            new, n = f"{letter}{n}", n + 1
        return new

    @staticmethod
    def _ordered(array: list[str], body: str) -> str:
        flat = [name for name in re.split(r"[\s|>-]+", body) if name]
        return body if flat == array else f"{' '.join(array)} : {body}"

    def _ends(self, path: str, axes: KnownAxes) -> tuple[str | None, str | None, str]:
        """Letters of the sides that do not grow with the width, or None; and the role, where letters do not say it."""
        if axes.kind == "embedding":
            return "V", None, ""
        if axes.kind == "positions":
            return "T", None, " [embedding]"
        role = self.sizes.role(path, axes)
        vocabulary = axes.size(axes.outputs) in self.sizes.vocabulary
        if role == "head":
            return None, "V" if vocabulary else "C", "" if vocabulary else " [head]"
        return ("P", None, " [embedding]") if role == "embedding" else (None, None, "")
