"""Where sizes put a matrix: at the entrance of a model, at its exit, or between them.

A size that one matrix puts out and another takes in grows with the width. A size that no matrix puts out comes from the
data, and a size that no matrix takes in is a result: a vocabulary, or classes. Features that are joined or flattened on
their way, such as those of a U-Net, are sums and multiples of sizes that are put out.
"""

import collections
import re

from optax_decay.parameters.named_axes import KnownAxes, is_embedding, is_head, is_inside


class Sizes:
    """The sizes that the matrices of a whole model take in and put out."""

    def __init__(self, found: dict[str, KnownAxes]) -> None:
        matrices = {p: a for p, a in found.items() if a.kind in ("linear", "conv")}
        self.taken = {a.size(a.inputs) for a in matrices.values()}
        self.outputs = collections.Counter(
            a.size(a.outputs) for a in found.values() if a.kind != "vector"
        )
        self.given = set(self.outputs)
        self.vocabulary = {a.size(a.inputs) for a in found.values() if a.kind == "embedding"}
        self.pixels = {a.size(a.outputs) for a in matrices.values() if a.kind == "conv"}
        places = (re.sub(r"\d+", "0", p) + str(a.shape) for p, a in matrices.items())
        self.often = collections.Counter(places)

    @staticmethod
    def role_by_name(path: str, axes: KnownAxes) -> str:
        """The role without regard to sizes."""
        if axes.kind == "vector":
            return "vector"
        table = axes.kind in ("embedding", "positions")
        if table or (axes.kind == "conv" and is_embedding(path)):
            return "embedding"
        return "head" if is_head(path) else "hidden"

    def role(self, path: str, axes: KnownAxes) -> str:
        """The role of a parameter in a whole model: hidden, embedding, head or vector."""
        named = self.role_by_name(path, axes)
        if named != "hidden":
            return named
        if self.is_vocabulary(axes):
            return "head"
        repeated = self.often[re.sub(r"\d+", "0", path) + str(axes.shape)] > 1
        if axes.batch or repeated or is_inside(path):
            return "hidden"
        if axes.kind == "conv" and self._is_grouped(axes):
            return "hidden"
        enters, leaves = self._enters(axes.size(axes.inputs)), self._leaves(axes.size(axes.outputs))
        return "head" if leaves else "embedding" if enters else "hidden"

    @property
    def connect(self) -> bool:
        """Whether some matrix takes in what another one puts out; if none does, this is no model."""
        return bool(self.given & self.taken)

    def is_vocabulary(self, axes: KnownAxes) -> bool:
        """Whether a matrix puts out one number per token of an embedding, and no other matrix takes them in."""
        return not axes.batch and axes.size(axes.outputs) in self.vocabulary - self.taken

    def _is_grouped(self, axes: KnownAxes) -> bool:
        """Whether a convolution takes in one group of channels at a time; 2 to 4 channels are those of an image."""
        size, out = axes.size(axes.inputs), axes.size(axes.outputs)
        divides = any(g % size == 0 and g > size for g in self.given)
        return divides and self.outputs[out] > 1 and (size == 1 or size > 4)

    def _enters(self, size: int) -> bool:
        between = self.given & self.taken
        flattened = any(size % g == 0 and size > g > 1 for g in self.pixels | between)
        joined = any(size - g in self.given for g in between)
        return not (size in self.given or flattened or joined)

    def _leaves(self, size: int) -> bool:
        unexplained, between = self.taken - self.given, self.given & self.taken
        flattened = size in self.pixels and any(t % size == 0 for t in unexplained)
        joined = any(t - size in between for t in unexplained)
        return not (size in self.taken or flattened or joined)
