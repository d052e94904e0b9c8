"""Whether reading keeps a step fed: batches per second of a core, and steps with and without reading.

The store is made of random tokens in a folder of its own. Every batch is of another step, so that pages are
touched in the order of training. The loader makes the next batch while the devices work on a step, as the
training loop does (`main.loop`): what waits for data is a step that ends before the next batch is there.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from train import main
from train.bench.table import Options, Table, best_times
from train.config.derived import derived
from train.config.fields import Config, Data, Mesh, Model, preset_of
from train.data import batches as data
from train.data import shards, token_store, tokens

BATCH, LENGTH = 512, 256  # of the papers' 60M recipe
SHARDS, DOCUMENT = 10, 400  # of the store; mean length of its documents [tokens]


def make_store(folder: pathlib.Path, megatokens: int) -> None:
    """A store of random bytes in documents of random lengths."""
    rng = np.random.default_rng(0)
    tokenizer = tokens.Bytes()
    sizes = {"train": SHARDS, "held_out": 1}
    made: dict[str, list[token_store.Shard]] = {split: [] for split in sizes}
    for split, count in sizes.items():
        for i in range(count):
            size = megatokens * 1_000_000 // SHARDS
            row = rng.integers(0, 256, size, np.uint16)
            ends = np.unique(np.append(rng.integers(1, size, size // DOCUMENT), size))
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


def ceiling_table(options: Options) -> Table:
    """Tokens per second that one core reads: of a token store, and of text that was encoded at the start."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_store(pathlib.Path(folder), options.megatokens)
        sources = {
            f"store of {options.megatokens}M": (f"{data.STORE}{folder}", None),
            options.text: (options.text, pathlib.Path(Data().cache)),
        }
        for name, (text, cache) in sources.items():
            for documents, kind in ((False, "packed"), (True, "documents")):
                loaded = data.load(
                    text,
                    options.tokenizer,
                    length=LENGTH,
                    batch_size=BATCH,
                    seed=0,
                    documents=documents,
                    cache=cache,
                )
                rate = tokens_per_second(loaded, options.rounds)
                milliseconds = 1e3 * BATCH * LENGTH / rate
                rows.append(
                    {
                        "tokens": f"{name}, {kind}",
                        "Mtokens/s of a core": rate / 1e6,
                        "ms a batch": milliseconds,
                    }
                )
    return Table(f"What one core reads: batches of {BATCH} x {LENGTH} tokens", rows)


def program(options: Options, folder: str) -> main.Program:
    """A run of the preset on a store, before its first step."""
    sequences = max(1, options.tokens // LENGTH)
    model = Model(preset=options.preset)
    config = Config(
        model=dataclasses.replace(model, vocab_size=max(preset_of(model).vocab_size, 257)),
        data=Data(text=f"{data.STORE}{folder}", length=LENGTH, batch_size=sequences),
        mesh=Mesh(data=1),
    )
    return main.assemble(derived(config), main.load(config))


def waited(ready: main.Program, state: Any, steps: int) -> tuple[Any, int, float]:
    """The state after some steps of the training loop, how many ended before the next batch was there, and the
    time that making and placing batches took [s]."""
    batch, late, reading = ready.batch(0), 0, 0.0
    for step in range(1, steps + 1):
        state, noted = ready.update(state, batch)
        loss: Any = noted["loss"]
        start = time.perf_counter()
        batch = jax.block_until_ready(ready.batch(step))
        reading += time.perf_counter() - start
        late += loss.is_ready()
        jax.block_until_ready(state)
    return state, late, reading


def step_table(options: Options) -> Table:
    """A training step with a batch of its own each time, beside the same step on one batch that stays."""
    with tempfile.TemporaryDirectory() as folder:
        make_store(pathlib.Path(folder), options.megatokens)
        ready = program(options, folder)
        state, *_ = waited(ready, ready.init(jax.random.key(0)), 2)
        steps = 2 * options.rounds
        state, late, reading = waited(ready, state, steps)
        numbers, one, carry = itertools.count(), ready.batch(0), [state]

        def stays() -> Any:
            carry[0], noted = ready.update(carry[0], one)
            return noted

        def read() -> Any:
            carry[0], noted = ready.update(carry[0], ready.batch(next(numbers)))
            return noted

        cpu, wall = best_times(options.rounds, {"one batch, kept": stays, "a batch each": read})
    per_step = ready.task.per_step
    rows = [
        {"step": name, "s": wall[name], "CPU s": cpu[name], "tokens/s": per_step / wall[name]}
        for name in wall
    ]
    least = min(wall.values())
    return Table(
        f"A step of {options.preset} on {per_step} tokens of a token store",
        rows,
        f"Making and placing a batch takes {1e3 * reading / steps:.2f} ms,"
        f" {100 * reading / steps / least:.3f} % of a step, beside which it is done;"
        f" {late} of {steps} steps ended before the next batch was there.",
    )
