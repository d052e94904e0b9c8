"""Benchmarks data loading: the speed of one core, and whether a training step ever waits for its batch.

A token store of random tokens is written into a temporary folder. Every batch belongs to another step, so that memory
pages are accessed in the order of training. Like the training loop (`main.loop`), the benchmark makes the next batch
while the devices work on a step; the devices wait if the step ends before the batch is ready.
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
from train.data import batches, shards, token_store, tokens

BATCH, LENGTH = 512, 256  # of the 60M recipe in papers [sequences, tokens]
SHARDS, DOCUMENT = 10, 400  # number of shards; mean length of a document [tokens]


def make_store(folder: pathlib.Path, megatokens: int) -> None:
    """Writes a token store of random bytes, in documents of random lengths."""
    rng = np.random.default_rng(0)
    tokenizer = tokens.Bytes()
    sizes = {"train": SHARDS, "held_out": 1}
    made: dict[str, list[token_store.Shard]] = {split: [] for split in sizes}
    for split, count in sizes.items():
        for i in range(count):
            size = megatokens * 1_000_000 // SHARDS
            sequence = rng.integers(0, 256, size, np.uint16)
            ends = np.unique(np.append(rng.integers(1, size, size // DOCUMENT), size))
            sequence[ends - 1] = tokenizer.separator
            content, places = sequence.tobytes(), ends.astype(token_store.ENDS).tobytes()
            name = token_store.shard_name(split, i)
            shards.write_durably(folder / f"{name}.tokens", content)
            shards.write_durably(folder / f"{name}.ends", places)
            digests = [hashlib.sha256(part).hexdigest() for part in (content, places)]
            made[split].append(token_store.Shard(size, len(ends), size - len(ends), *digests))
    shards.write_durably(folder / "tokenizer.json", b"")
    shards.write_durably(folder / "manifest.json", token_store.manifest("random", tokenizer, made))


def tokens_per_second(loaded: batches.TokenBatches, seconds: float) -> float:
    """Speed of making batches, in CPU time, which does not depend on the load of the machine."""
    loaded.batch(0)
    start, step = time.process_time(), 0
    while (passed := time.process_time() - start) < seconds:
        step += 1
        loaded.batch(step)
    return step * loaded.batch_size * loaded.length / passed


def ceiling_table(options: Options) -> Table:
    """Tokens per second that one core loads, from a token store and from text that is encoded at the start."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_store(pathlib.Path(folder), options.megatokens)
        sources = {
            f"store of {options.megatokens}M": (f"{batches.STORE}{folder}", None),
            options.text: (options.text, pathlib.Path(Data().cache)),
        }
        for name, (text, cache) in sources.items():
            for documents, kind in ((False, "packed"), (True, "documents")):
                loaded = batches.load_text(
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
    return Table(f"Data loading by one core, in batches of {BATCH} x {LENGTH} tokens", rows)


def program(options: Options, folder: str) -> main.Run:
    """The run of the preset on a token store, before its first step."""
    sequences = max(1, options.tokens // LENGTH)
    model = Model(preset=options.preset)
    config = Config(
        model=dataclasses.replace(model, vocab_size=max(preset_of(model).vocab_size, 257)),
        data=Data(text=f"{batches.STORE}{folder}", length=LENGTH, batch_size=sequences),
        mesh=Mesh(data=1),
    )
    config = derived(config)
    return main.assemble(config, main.read_data(config))


def waited(ready: main.Run, state: Any, steps: int) -> tuple[Any, int, float]:
    """Trains for some steps.

    Returns:
        The state; the number of steps that ended before the next batch was ready; and the time that making and placing
        batches took [s].
    """
    batch, late, reading = ready.batch(0), 0, 0.0
    for step in range(1, steps + 1):
        state, scalars = ready.program.update(state, batch)
        loss: Any = scalars["loss"]
        start = time.perf_counter()
        batch = jax.block_until_ready(ready.batch(step))
        reading += time.perf_counter() - start
        late += loss.is_ready()
        jax.block_until_ready(state)
    return state, late, reading


def step_table(options: Options) -> Table:
    """A training step that loads a new batch each time, compared with the same step on one batch."""
    with tempfile.TemporaryDirectory() as folder:
        make_store(pathlib.Path(folder), options.megatokens)
        ready = program(options, folder)
        state, *_ = waited(ready, ready.program.init(jax.random.key(0)), 2)
        steps = 2 * options.rounds
        state, late, reading = waited(ready, state, steps)
        numbers, one, carry = itertools.count(), ready.batch(0), [state]

        def same_batch() -> Any:
            carry[0], scalars = ready.program.update(carry[0], one)
            return scalars

        def new_batch() -> Any:
            carry[0], scalars = ready.program.update(carry[0], ready.batch(next(numbers)))
            return scalars

        runs = {"the same batch": same_batch, "a new batch": new_batch}
        cpu, wall = best_times(options.rounds, runs)
    per_step = ready.program.task.per_step
    rows = [
        {"step": name, "s": wall[name], "CPU s": cpu[name], "tokens/s": per_step / wall[name]}
        for name in wall
    ]
    least = min(wall.values())
    return Table(
        f"A step of {options.preset} on {per_step} tokens of a token store",
        rows,
        f"Making and placing a batch takes {1e3 * reading / steps:.2f} ms,"
        f" {100 * reading / steps / least:.3f} % of a step, and runs in parallel with it;"
        f" {late} of {steps} steps ended before the next batch was ready.",
    )
