"""How fast batches come out of a token store: python -m train.bench_loader

Makes a store of random tokens in a folder of its own, reads batches from it at the shapes of the papers'
60M recipe (512 sequences of 256) and prints tokens per second of one core's time: the ceiling that data sets
to training. Every batch is of another step, so that pages are touched in the order of training.
"""

import dataclasses
import hashlib
import pathlib
import tempfile
import time

import numpy as np
import tyro

from train import data, shards, token_store, tokens


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read."""

    megatokens: int = 100
    """Size of the store [million tokens]; each takes two bytes."""
    shards: int = 10
    """Shards of the store."""
    document: int = 400
    """Mean length of a document [tokens]."""
    batch_size: int = 512
    """Sequences in a batch."""
    length: int = 256
    """Length of a sequence [tokens]."""
    seconds: float = 5.0
    """How long each kind of batch is timed [s of one core]."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")


def make_store(folder: pathlib.Path, options: Options) -> None:
    """A store of random bytes in documents of random lengths."""
    rng = np.random.default_rng(0)
    tokenizer = tokens.Bytes()
    sizes = {"train": options.shards, "held_out": 1}
    made: dict[str, list[token_store.Shard]] = {split: [] for split in sizes}
    for split, count in sizes.items():
        for i in range(count):
            size = options.megatokens * 1_000_000 // options.shards
            row = rng.integers(0, 256, size, np.uint16)
            ends = np.unique(np.append(rng.integers(1, size, size // options.document), size))
            row[ends - 1] = tokenizer.separator
            content, places = row.tobytes(), ends.astype(token_store.ENDS).tobytes()
            name = token_store.shard_name(split, i)
            shards.put(folder / f"{name}.tokens", content)
            shards.put(folder / f"{name}.ends", places)
            digests = [hashlib.sha256(part).hexdigest() for part in (content, places)]
            made[split].append(token_store.Shard(size, len(ends), size - len(ends), *digests))
    shards.put(folder / "tokenizer.json", b"")
    shards.put(folder / "manifest.json", token_store.manifest("random", tokenizer, made))


def tokens_per_second(loaded: data.Data, seconds: float) -> float:
    """Of making batch after batch. In CPU time, which a busy machine does not change."""
    loaded.batch(0)
    start, step = time.process_time(), 0
    while (passed := time.process_time() - start) < seconds:
        step += 1
        loaded.batch(step)
    return step * loaded.batch_size * loaded.length / passed


def main(options: Options) -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_store(pathlib.Path(folder), options)
        for documents, kind in ((False, "packed"), (True, "documents")):
            loaded = data.load(
                f"{data.STORE}{folder}",
                length=options.length,
                batch_size=options.batch_size,
                seed=0,
                documents=documents,
            )
            found[kind] = tokens_per_second(loaded, options.seconds)
            print(
                f"{kind:10} {options.batch_size} x {options.length}: {found[kind] / 1e6:.1f}M tokens/s"
            )
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
