"""`python -m train tokenise --source TEXT --out FOLDER`: encodes a text once into a token store.

The source is divided into parts. Each part becomes one shard, and several processes encode shards in parallel. A
finished shard gets a seal, a small file of its own, so a command that was interrupted continues with the shards that
have no seal. The store depends only on the source and the arguments, byte for byte: neither on the number of processes
nor on interruptions.
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

from train import disk
from train.config.ranges import Count, Positive
from train.data import text_sources, token_store, tokens
from train.data.shards import ShardJob, make_shards, read_seal, seal_path, write_durably
from train.display import Counter, say
from train.errors import UserError
from train.run.folder import locked

PLAN = "plan.json"  # arguments and source of the store


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Encodes a text once into a token store. Runs read it with --data.text store:FOLDER."""

    out: str
    """Folder of the store. An unfinished store with the same arguments is continued."""
    source: str = "stdlib"
    """Folder, file or glob pattern of text files; stdlib; tfds:NAME/CONFIG:VERSION, such as tfds:c4/en:3.0.1; or
    hf:FOLDER, parquet or arrow files of a Hugging Face data set."""
    tokenizer: str = "bpe-4096"
    """bytes; bpe-N, learned from the source; tokenizer.json; or a folder with it, or with vocab.json and merges.txt."""
    end_of_text: str | None = None
    """Token that ends a document, for a vocabulary file that does not specify it."""
    split: str | None = None
    """Part of a tfds data set to train on, such as 'train[:10%]'; default train."""
    held_out: str | None = None
    """Part of a tfds data set to evaluate on; default validation or test, else 5 % of train."""
    field: str | None = None
    """Field of a tfds data set that holds the text; default the only text field, else text."""
    data_dir: str | None = None
    """Folder of prepared tfds data sets; default TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    workers: Count | None = None
    """Number of processes; default one per core that this process may use."""
    shard_megabytes: Positive = 256.0
    """Approximate size of the source text of a shard [MB]."""
    verify: bool = False
    """Only verify the store at `out`: read it once and compare it with its digests."""


def main(arguments: list[str]) -> int:
    options = tyro.cli(
        Arguments,
        args=arguments,
        prog="python -m train tokenise",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
    )
    if not 0 < options.shard_megabytes < math.inf:
        raise UserError(
            f"--shard_megabytes = {options.shard_megabytes:g} must be above 0 and finite; nearest: 256."
        )
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers = {options.workers} must be at least 1; nearest: 1.")
    folder = disk.user_path(options.out)
    try:
        if options.verify:
            token_store.open_store(folder).verify(say)
            say(f"{folder} matches its manifest.")
            return 0
        store = build(folder, options)
    except KeyboardInterrupt:
        say("\nstopped; finished shards are kept, and the same command continues with the others")
        return 130
    except concurrent.futures.BrokenExecutor:
        raise UserError(
            f"{folder}: a worker process was killed, perhaps because the machine ran out of memory. Finished"
            " shards are kept, and the same command continues with the others; nearest: fewer --workers."
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


def build(folder: pathlib.Path, options: Arguments) -> token_store.Store:
    """Makes the store, or its missing shards."""
    disk.check_folder(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "token store"):
        source = text_sources.read_source(
            options.source,
            shard_bytes=max(1, int(options.shard_megabytes * 1e6)),
            split=options.split,
            held_out=options.held_out,
            field=options.field,
            data_dir=options.data_dir,
        )
        tokenizer, plan = _plan(folder, options, source)
        jobs = {
            split: [
                ShardJob(folder, token_store.shard_name(split, i), part, plan)
                for i, part in enumerate(source.parts[split])
            ]
            for split in token_store.SPLITS
        }
        for stale in folder.glob("*.part"):
            stale.unlink()
        if not (folder / "manifest.json").exists():
            missing = [t for split in jobs.values() for t in split if read_seal(t) is None]
            with Counter("tokenising", source.unit, sum(t.part.size for t in missing)) as counter:
                make_shards(missing, tokenizer, options.workers, counter.advance)
            shards = {s: [seal for t in all if (seal := read_seal(t))] for s, all in jobs.items()}
            for split, seals in shards.items():
                if not any(shard.tokens for shard in seals):
                    raise UserError(
                        f"{source.name} has no text {'to hold out' if split == 'held_out' else 'to train on'};"
                        " give more text, or name other parts of a data set."
                    )
            write_durably(
                folder / "manifest.json", token_store.manifest(source.name, tokenizer, shards)
            )
        # Seals are removed last, so that an interrupted command can always continue.
        for job in (t for split in jobs.values() for t in split):
            seal_path(job).unlink(missing_ok=True)
    return token_store.open_store(folder)


def _plan(
    folder: pathlib.Path, options: Arguments, source: text_sources.Source
) -> tuple[tokens.Tokenizer, str]:
    """The tokenizer, new or from the folder, and the digest of everything that the shards depend on.

    Raises:
        UserError: the folder holds other files, or a store with other arguments or from another source.
    """
    kind = tokens.parse_name(options.tokenizer)
    if options.end_of_text is not None and not isinstance(kind, pathlib.Path):
        raise UserError(
            f"--end_of_text = {options.end_of_text!r} would have no effect, because {options.tokenizer} has"
            " its own separator; leave it out."
        )
    fixed = (
        tokens.read_vocabulary(kind, options.end_of_text)
        if isinstance(kind, pathlib.Path)
        else None
    )
    wanted = {
        "format": token_store.FORMAT,
        "source": source.name,
        "source's files": _digest(source.facts),
        "tokenizer": token_store.tokenizer_facts(fixed)
        if fixed
        else tokens.tokenizer_version(options.tokenizer),
        "shard_megabytes": options.shard_megabytes,
    }
    path, vocabulary = folder / PLAN, folder / "tokenizer.json"
    if path.exists():
        plan = _read_plan(path)
        changed = [name for name in wanted if plan["wanted"].get(name) != wanted[name]]
        if changed:
            lines = "\n".join(f"  {n}: {plan['wanted'].get(n)} -> {wanted[n]}" for n in changed)
            raise UserError(
                f"{folder} was made with other arguments or from other files:\n{lines}\nName another"
                " folder with --out, or remove this one."
            )
        facts = plan["tokenizer"]
        content = disk.read_file(vocabulary, disk.JSON_FILE)
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise UserError(f"{vocabulary} is damaged; remove {folder} and begin again.")
        return tokens.tokenizer_from_json(
            facts["name"], content.decode(), facts["separator"]
        ), _digest(plan)
    ours = ("lock", vocabulary.name)
    names = (p.name for p in folder.iterdir() if p.suffix != ".part")
    if strange := [name for name in names if name not in ours]:
        raise UserError(
            f"{folder} is neither empty nor a token store (it holds {strange[0]}, but no {PLAN}); name"
            " another folder with --out."
        )
    tokenizer = fixed or tokens.learn_tokenizer(options.tokenizer, list(_sample(source, kind)))
    write_durably(vocabulary, tokenizer.to_json().encode())
    plan = {"wanted": wanted, "tokenizer": token_store.tokenizer_facts(tokenizer)}
    write_durably(path, (json.dumps(plan, indent=1) + "\n").encode())
    return tokenizer, _digest(plan)


def _read_plan(path: pathlib.Path) -> dict[str, Any]:
    """A plan of the form that `_plan` writes; raises UserError for anything else."""
    try:
        plan = json.loads(disk.read_json_text(path))
        facts = plan["tokenizer"]
        good = isinstance(plan["wanted"], dict) and set(plan) == {"wanted", "tokenizer"}
        kinds = {"name": str, "vocab_size": int, "separator": int, "sha256": str}
        good = good and {name: type(value) for name, value in facts.items()} == kinds
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        plan, good = {}, False
    if not good:
        raise UserError(
            f"{path} is damaged: it is not what this program wrote. Remove {path.parent} and begin again."
        )
    return plan


def _sample(source: text_sources.Source, kind: Any) -> Iterator[str]:
    """Text to learn byte pairs from: the start of every part."""
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
