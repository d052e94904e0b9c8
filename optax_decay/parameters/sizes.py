"""Where sizes put a matrix: at the entrance of a model, at its exit, or between them.

A size that one matrix puts out and another takes in grows with the width. A size that no matrix puts out comes from the
data, and a size that no matrix takes in is a result: a vocabulary, or classes. Features that are joined or flattened on
their way, such as those of a U-Net, are sums and multiples of sizes that are put out.
"""

import collections
import re

from optax_decay.parameters.named_axes import KnownAxes
from optax_decay.parameters.words import is_embedding, is_head, is_inward, is_outward

IMAGE = 4  # channels that an image has at most


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
        if axes.batch or repeated or is_inward(path):
            return "hidden"
        size_in, size_out = axes.size(axes.inputs), axes.size(axes.outputs)
        if axes.kind == "conv":
            if axes.grouped or (axes.grouped is None and self._is_grouped(size_in, size_out)):
                return "hidden"
            if (size_in <= IMAGE) != (size_out <= IMAGE):
                return "embedding" if size_in <= IMAGE else "head"
        if self._leaves(size_out):
            return "head"
        return "embedding" if self._enters(size_in) and not is_outward(path) else "hidden"

    @property
    def connect(self) -> bool:
        """Whether some matrix takes in what another one puts out; if none does, this is no model."""
        return bool(self.given & self.taken)

    def is_vocabulary(self, axes: KnownAxes) -> bool:
        """Whether a matrix puts out one number per token of an embedding, and no other matrix takes them in."""
        return not axes.batch and axes.size(axes.outputs) in self.vocabulary - self.taken

    def _is_grouped(self, size_in: int, size_out: int) -> bool:
        """Whether a convolution seems to take in one group of its channels at a time, such as one channel."""
        divides = any(g % size_in == 0 and g > size_in for g in self.given)
        return divides and self.outputs[size_out] > 1 and (size_in == 1 or size_in > IMAGE)

    def _enters(self, size: int) -> bool:
        between = self.given & self.taken
        flattened = any(size % g == 0 and size > g > 1 for g in self.pixels | between)
        joined = any(size - g in self.given for g in between)
        return not (size in self.given or flattened or joined)

    def _leaves(self, size: int) -> bool:
        unexplained, between = self.taken - self.given, self.given & self.taken
        flattened = size in self.pixels and any(t % size == 0 for t in unexplained)
        joined = any(t - size in between for t in unexplained)
        # Such as queries, keys and values in one matrix, or the gates of a recurrent cell.
        split = any(size in (2 * t, 3 * t, 4 * t, 6 * t) for t in self.taken & self.given)
        return not (size in self.taken or flattened or joined or split)
