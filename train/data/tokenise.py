"""Encodes a text once into a token store: python -m train tokenise --source TEXT --out FOLDER

The source is cut into parts, each of which becomes one shard, encoded by one of several processes.
A finished shard is sealed by a file of its own; a command that was stopped, by whatever, goes on with
the shards that have no seal. What comes out depends on the source and on the arguments alone, byte for
byte: not on the number of processes, nor on how often it was stopped.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import tyro

from train.config.ranges import Count, Positive
from train.data import text_sources, token_store, tokens
from train.data.shards import Task, encode, put, seal_path, sealed
from train.display import Counter, say
from train.errors import UserError
from train.run.folder import locked

PLAN = "plan.json"  # what was asked for


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Encodes a text once into a token store, which runs then read with --data.text store:FOLDER."""

    out: str
    """Folder of the store; one that was begun with the same arguments is continued."""
    source: str = "stdlib"
    """Folder, file or glob of text files, stdlib, or tfds:NAME/CONFIG:VERSION, such as tfds:c4/en:3.0.1."""
    tokenizer: str = "bpe-4096"
    """bytes, bpe-N (learned from the source), a tokenizer.json, or a folder with that or vocab.json and merges.txt."""
    end_of_text: str | None = None
    """Token that ends a document, of a given vocabulary that does not say so itself."""
    split: str | None = None
    """Of a tfds data set: what to train on; train, or a part such as 'train[:10%]'."""
    held_out: str | None = None
    """Of a tfds data set: what to evaluate on; default validation or test, else 5 % of train."""
    field: str | None = None
    """Of a tfds data set: the field that holds the text."""
    data_dir: str | None = None
    """Of a tfds data set: the folder of prepared data; default TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    workers: Count | None = None
    """Processes; default one per core that this process may use."""
    shard_megabytes: Positive = 256.0
    """Source text per shard, about [MB]."""
    verify: bool = False
    """Instead: read the store at `out` once and compare it with its digests."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Arguments,
        args=arguments,
        prog="python -m train tokenise",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
    )
    if not 0 < asked.shard_megabytes < math.inf:
        raise UserError(
            f"--shard_megabytes = {asked.shard_megabytes:g} must be above 0 and finite."
        )
    if asked.workers is not None and asked.workers < 1:
        raise UserError(f"--workers = {asked.workers} must be at least 1; nearest: 1.")
    folder = pathlib.Path(asked.out).expanduser()
    try:
        if asked.verify:
            token_store.open_store(folder).verify(say)
            say(f"{folder} is as its manifest says.")
            return 0
        store = build(folder, asked)
    except KeyboardInterrupt:
        say("\nstopped; the finished shards are kept, and the same command goes on with the others")
        return 130
    except concurrent.futures.BrokenExecutor:
        raise UserError(
            f"{folder}: a worker was ended from outside, as a machine short of memory does. The finished"
            " shards are kept, and the same command goes on with the others; nearest: fewer --workers."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}.") from None
    report(store)
    return 0


def report(store: token_store.Store) -> None:
    train, held_out = store.train, store.held_out
    say(
        f"{store.folder}: {len(train):,} tokens of {train.documents:,} documents to train on,"
        f" {len(held_out):,} of {held_out.documents:,} held out;"
        f" {store.train_bytes / max(1, len(train)):.2f} bytes per token; vocabulary"
        f" {store.tokenizer.name} of {store.tokenizer.vocab_size}; digest {store.digest[:16]}\n"
        f"train on it with  python -m train --data.text store:{store.folder}"
    )


def build(folder: pathlib.Path, asked: Arguments) -> token_store.Store:
    """Makes the store, or what of it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "token store"):
        source = text_sources.read_source(
            asked.source,
            shard_bytes=max(1, int(asked.shard_megabytes * 1e6)),
            split=asked.split,
            held_out=asked.held_out,
            field=asked.field,
            data_dir=asked.data_dir,
        )
        tokenizer, plan = _plan(folder, asked, source)
        tasks = {
            split: [
                Task(folder, token_store.shard_name(split, i), part, plan)
                for i, part in enumerate(source.parts[split])
            ]
            for split in token_store.SPLITS
        }
        for stale in folder.glob("*.part"):
            stale.unlink()
        if not (folder / "manifest.json").exists():
            missing = [t for split in tasks.values() for t in split if sealed(t) is None]
            with Counter("tokenising", source.unit, sum(t.part.size for t in missing)) as counter:
                encode(missing, tokenizer, asked.workers, counter.advance)
            shards = {s: [seal for t in all if (seal := sealed(t))] for s, all in tasks.items()}
            for split, found in shards.items():
                if not any(shard.tokens for shard in found):
                    raise UserError(
                        f"{source.name} has no text {'held out' if split == 'held_out' else 'to train on'}:"
                        " nothing could be learned or measured with this store; give more text, or other"
                        " parts of a data set."
                    )
            put(folder / "manifest.json", token_store.manifest(source.name, tokenizer, shards))
        # Kept until here, so that whatever stops this command finds it again.
        for task in (t for split in tasks.values() for t in split):
            seal_path(task).unlink(missing_ok=True)
    return token_store.open_store(folder)


def _plan(
    folder: pathlib.Path, asked: Arguments, source: text_sources.Source
) -> tuple[tokens.Tokenizer, str]:
    """The tokenizer, made or found, and the digest of everything that the shards depend on.

    Raises:
        UserError: the folder holds a store, or the beginning of one, that was asked for differently.
    """
    kind = tokens.check(asked.tokenizer)
    if asked.end_of_text is not None and not isinstance(kind, pathlib.Path):
        raise UserError(
            f"--end_of_text = {asked.end_of_text!r} would have no effect: {asked.tokenizer} has a"
            " separator of its own; leave it out."
        )
    fixed = tokens.given(kind, asked.end_of_text) if isinstance(kind, pathlib.Path) else None
    wanted = {
        "format": token_store.FORMAT,
        "source": source.name,
        "source's files": _digest(source.facts),
        "tokenizer": token_store.tokenizer_facts(fixed)
        if fixed
        else tokens.version(asked.tokenizer),
        "shard_megabytes": asked.shard_megabytes,
    }
    path, vocabulary = folder / PLAN, folder / "tokenizer.json"
    if path.exists():
        found = json.loads(path.read_bytes())
        changed = [name for name in wanted if found["wanted"].get(name) != wanted[name]]
        if changed:
            lines = "\n".join(f"  {n}: {found['wanted'].get(n)} -> {wanted[n]}" for n in changed)
            raise UserError(
                f"{folder} was made with other arguments or from other files:\n{lines}\nName another"
                " folder with --out, or remove this one."
            )
        said = found["tokenizer"]
        content = vocabulary.read_bytes()
        if hashlib.sha256(content).hexdigest() != said["sha256"]:
            raise UserError(f"{vocabulary} is damaged; remove {folder} and begin again.")
        return tokens.restore(said["name"], content.decode(), said["separator"]), _digest(found)
    ours = ("lock", vocabulary.name)
    names = (p.name for p in folder.iterdir() if p.suffix != ".part")
    if strange := [name for name in names if name not in ours]:
        raise UserError(
            f"{folder} is not empty and no token store (it holds {strange[0]}, but no {PLAN});"
            " name another folder with --out."
        )
    tokenizer = fixed or tokens.learn(asked.tokenizer, list(_sample(source, kind)))
    put(vocabulary, tokenizer.to_json().encode())
    plan = {"wanted": wanted, "tokenizer": token_store.tokenizer_facts(tokenizer)}
    put(path, (json.dumps(plan, indent=1) + "\n").encode())
    return tokenizer, _digest(plan)


def _sample(source: text_sources.Source, kind: Any) -> Iterator[str]:
    """Text to learn byte pairs from: the beginning of every part."""
    parts = source.parts["train"] if isinstance(kind, int) else []
    for part in parts:
        room = tokens.LEARN_FROM // len(parts)
        for text, _ in part.documents():
            yield text[:room]
            room -= len(text)
            if room <= 0:
                break


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
