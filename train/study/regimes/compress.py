"""What trained weights are worth when they are made smaller: pruned by size, rounded to 8 or 4 bits, compressed.

Nothing is trained: the weights are those of the runs that count of `compare repeated`. Hidden matrices and the head are
changed; embeddings and vectors stay.

    pruned     the smallest share of every matrix becomes 0
    int8, int4 every row is rounded to 255 or 15 levels between -max and max of the row
    bits       the int8 levels of all matrices, packed by zlib, in bits per weight
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config.fields import UserError
from train.study.compare.tuning import FIRST_SEED
from train.study.regimes import kept_weights, texts
from train.study.regimes.repeated import Repeated, program
from train.study.regimes.shared import check_ranges
from train.study.regimes.work import Record, known
from train.study.results import RESULTS, read
from train.study.small_runs import SmallProgram, SmallTask

LEVELS = {"int8": 127, "int4": 7}


@dataclasses.dataclass(frozen=True)
class Compress:
    """The weights of `compare repeated`, pruned, rounded and compressed. It trains nothing."""

    source: str = "runs/compare-repeated-cpu"
    """Folder of `compare repeated` whose weights are taken."""
    shares: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of every matrix that are pruned."""
    fresh_seeds: int = 0
    """Another number takes the folder of that repetition, whose name it ends with."""
    minutes: float = float("inf")
    """Time for this start. The same command goes on where it stopped."""
    processes: int = 0
    """Processes that work; 0: one per core, and one alone on an accelerator."""
    folder: str = "runs/compare-compress"
    """Where the results go."""

    @property
    def from_folder(self) -> pathlib.Path:
        name = f"{self.source}-seeds-{self.fresh_seeds}" if self.fresh_seeds else self.source
        return pathlib.Path(name).expanduser()

    def check(self) -> None:
        """Raises UserError for a field that is out of its range, and without weights."""
        check_ranges(self, (("shares", 0.0, 0.999), ("fresh_seeds", 0, 900)))
        if sorted(set(self.shares)) != list(self.shares) or not self.shares:
            raise UserError(f"shares = {self.shares} must rise, such as 0.25 0.5 0.75.")
        if not weights_of(self.from_folder):
            raise UserError(
                f"{self.from_folder} holds no finished runs of compare repeated; run that first, or name its"
                " folder with --source."
            )

    def units(self) -> list[str]:
        return list(dict.fromkeys(f"{r['arm']} {r['text']}" for r in weights_of(self.from_folder)))

    def expected(self) -> float:
        """Number of weights."""
        return len(weights_of(self.from_folder))

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """One list: all weights of an arm on a text."""
        arm, _, text = unit.partition(" ")
        names = ("arm", "text", "seed", "weights")
        yield [
            {name: r[name] for name in names}
            for r in weights_of(self.from_folder)
            if (r["arm"], r["text"]) == (arm, text)
        ]

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """Measures weights, one file after the other."""
        before = regime_of(self.from_folder)
        data = texts.read(before.task, jobs[0]["text"], before.unique)
        small = program(before.task, "l2", data.vocab_size, before.steps)
        held_out = jnp.asarray(np.stack(data.held_out(before.task.eval_batches)))
        for job in jobs:
            began = time.perf_counter()
            params = kept_weights.load(small, self.from_folder / "weights", job["weights"])
            yield (
                job
                | measure(small, params, held_out, self.shares)
                | {"seconds": round(time.perf_counter() - began, 3)}
            )


@functools.lru_cache(maxsize=4)
def regime_of(folder: pathlib.Path) -> Repeated:
    """The fields of a folder of `compare repeated`.

    Raises:
        UserError: it is none.
    """
    try:
        fields = json.loads((folder / "comparison.json").read_text())
        fields["task"] = SmallTask(**fields["task"])
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return Repeated(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is no folder of compare repeated ({error}); run that first, or name its folder with --source."
        ) from None


@functools.lru_cache(maxsize=4)
def weights_of(folder: pathlib.Path) -> list[Record]:
    """The runs that count whose weights are there."""
    regime = regime_of(folder)
    found = known(regime, read(folder / RESULTS)).records
    return [r for r in found if r["seed"] < FIRST_SEED and "weights" in r]


def measure(
    small: SmallProgram, params: Any, held_out: jax.Array, shares: Sequence[float]
) -> dict[str, Any]:
    """Losses on held-out text of the weights as they are and of what is left of them, and bits per weight."""
    loss = _loss(small)
    changed = functools.partial(on_matrices, small, params)
    codes = [
        np.asarray(jnp.round(levels(w, LEVELS["int8"])[0])).astype(np.int8).tobytes()
        for w in matrices(small, params)
    ]
    weights = sum(map(len, codes))
    return {
        "loss": _finite(loss(params, held_out)),
        "pruned": [_finite(loss(changed(lambda w, s=s: prune(w, s)), held_out)) for s in shares],
        **{
            name: _finite(loss(changed(lambda w, m=m: rounded(w, m)), held_out))
            for name, m in LEVELS.items()
        },
        "bits": 8 * len(zlib.compress(b"".join(codes), 9)) / weights,
    }


@functools.lru_cache(maxsize=2)
def _loss(small: SmallProgram) -> Any:
    plain = dataclasses.replace(small, workers=1)
    return jax.jit(lambda params, held_out: plain.held_out_loss({"params": params}, held_out))


def _finite(x: Any) -> float:
    return float(x) if math.isfinite(float(x)) else math.inf


def matrices(small: SmallProgram, params: Any) -> list[jax.Array]:
    """Hidden matrices and the head."""
    roles = [signature.role for signature in jax.tree.leaves(small.axes)]
    leaves = jax.tree.leaves(params)
    return [w for w, role in zip(leaves, roles, strict=True) if role in ("hidden", "head")]


def on_matrices(small: SmallProgram, params: Any, function: Any) -> Any:
    """The weights with hidden matrices and the head changed."""
    roles = [signature.role for signature in jax.tree.leaves(small.axes)]
    leaves, treedef = jax.tree.flatten(params)
    new = [
        function(w) if role in ("hidden", "head") else w
        for w, role in zip(leaves, roles, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def prune(w: jax.Array, share: float) -> jax.Array:
    """Without the smallest share of its weights; a stack of layers has one threshold for each."""
    flat = jnp.abs(w.reshape(w.shape[0], -1) if w.ndim > 2 else w.reshape(1, -1))
    cut = jnp.quantile(flat, share, axis=1)
    return jnp.where(jnp.abs(w) <= cut.reshape(-1, *[1] * (w.ndim - 1)), 0.0, w)


def levels(w: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
    """A matrix in units of its rows' steps, and the steps; rows are the last axis."""
    step = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / largest
    step = jnp.where(step > 0, step, 1.0)
    return w / step, step


def rounded(w: jax.Array, largest: int) -> jax.Array:
    """A matrix with every row rounded to multiples of its largest weight over `largest`."""
    units, step = levels(w, largest)
    return jnp.round(units) * step
