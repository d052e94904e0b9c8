"""Finds the axes of a model's parameters, as rules that can be printed, corrected and passed as ``axes``.

What a parameter's axes mean is read from the first of these that knows it:

1. the module that owns it: Flax NNX (`Linear`, `LinearGeneral`, `Conv`, `Embed`, norms, LoRA) and Equinox (`Linear`,
   `Conv`, `Embedding`, norms), whose attributes say how many input and output features there are;
2. its name, as Flax Linen, Haiku, MaxText and transformers name parameters: ``kernel`` and ``w`` are stored
   [inputs, outputs], ``weight`` [outputs, inputs], ``scale`` and ``bias`` are vectors, ``embedding`` is
   [tokens, features].

Axes that a module or a name does not explain are stacked layers, if all parameters of a subtree share them. Roles
follow from how sizes connect: features that one matrix puts out and another takes in grow with the width; a size that
only enters the model (patches, features of the data) or only leaves it (vocabulary, classes) does not.

Nothing is guessed: a parameter that cannot be explained raises, with the descriptions that are possible.
"""

import collections
import re
from typing import Any

from optax_decay.parameters.module_axes import is_module, leaf_shapes, of_equinox, of_nnx
from optax_decay.parameters.named_axes import KnownAxes, is_head, is_inside, named

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
    if is_module("flax.nnx", model):
        return _rules(of_nnx(model))
    if is_module("equinox", model):
        return _rules(of_equinox(model))
    return _rules(named(leaf_shapes(model), {}))


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
        self.found = found
        matrices = {p: a for p, a in found.items() if a.kind in ("linear", "conv")}
        self.taken = {a.size(a.inputs) for a in matrices.values()}
        self.given = {a.size(a.outputs) for p, a in found.items() if a.kind != "vector"}
        self.vocabulary = {a.size(a.inputs) for a in found.values() if a.kind == "embedding"}
        places = (re.sub(r"\d+", "0", p) + str(a.shape) for p, a in matrices.items())
        self.often = collections.Counter(places)
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
        stacked = ("L", "E", "M2", "M3")
        for i, letter in zip(axes.batch, stacked):
            names[i] = self._sized(letter, axes.shape[i])
        names |= dict(zip(axes.kernel, _KERNEL_POSITIONS.get(len(axes.kernel), ())))
        if axes.kind == "vector":
            heads = len(axes.outputs) == 2 and 1 not in axes.shape
            for place, i in enumerate(axes.outputs):
                size = axes.shape[i]
                letter = self.names.get(size, str(size))
                if size in self.vocabulary - self.taken:
                    letter = self._sized("V", size)
                elif heads:
                    letter = self._sized("HK"[place], size)
                names[i] = self._free(letter, names)
            batch = " ".join(names[i] for i in axes.batch)
            body = " ".join(names[i] for i in axes.outputs) or "1"
            ordered = [names[i] for i in sorted(names)]
            return self._ordered(ordered, f"{batch} | {body}" if batch else body)
        fixed_in, fixed_out = self._ends(path, axes)
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
        return self._ordered([names[i] for i in sorted(names)], body)

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

    def _ends(self, path: str, axes: KnownAxes) -> tuple[str | None, str | None]:
        """Letters of the sides that do not grow with the width, or None."""
        if axes.kind == "embedding":
            return "V", None
        if axes.kind == "positions":
            return "T", None
        repeated = bool(axes.batch) or self.often[re.sub(r"\d+", "0", path) + str(axes.shape)] > 1
        size_in, size_out = axes.size(axes.inputs), axes.size(axes.outputs)
        if repeated:
            return None, None
        known = size_out in self.vocabulary - self.taken or is_head(path)
        inside = is_inside(path)
        leaves = known or (size_out not in self.taken and not inside)
        enters = size_in not in self.given and not inside
        out = None if not leaves else "V" if size_out in self.vocabulary else "C"
        return ("P" if enters else None), out
