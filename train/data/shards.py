"""Encodes the shards of a token store in several processes. It does not import JAX, which would delay each of them."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from train import cores, disk
from train.data import text_sources, token_store, tokens


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to be encoded."""

    folder: pathlib.Path
    name: str
    part: text_sources.Part
    plan: str  # digest of the store's plan


def make_shards(
    jobs: list[ShardJob],
    tokenizer: tokens.Tokenizer,
    workers: int | None,
    advance: Callable[[int], None],
) -> None:
    """Encodes the shards in parallel. The worker processes end when this process ends, even if it is killed."""
    count = min(workers or cores.usable(), len(jobs))
    if count <= 1:
        for job in jobs:
            make_shard(job, tokenizer, advance)
        return
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    start = (tokenizer.name, tokenizer.to_json(), tokenizer.separator, done)
    with concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, start) as pool:
        running = {pool.submit(_work, job) for job in jobs}
        try:
            while running:
                try:
                    advance(done.get(timeout=0.2))
                except queue.Empty:
                    finished = {future for future in running if future.done()}
                    running -= finished
                    for future in finished:
                        future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_worker: dict[str, Any] = {}


def _start_worker(name: str, json: str, separator: int, done: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=tokens.tokenizer_from_json(name, json, separator), done=done)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(job: ShardJob) -> None:
    make_shard(job, _worker["tokenizer"], _worker["done"].put)


def make_shard(
    job: ShardJob, tokenizer: tokens.Tokenizer, advance: Callable[[int], None]
) -> token_store.Shard:
    """Writes the two files of a shard, and its seal last."""
    bytes_read, lengths, digest = 0, [], hashlib.sha256()
    waiting, every = 0, max(1, job.part.size // 100)

    def texts() -> Iterator[str]:
        nonlocal bytes_read, waiting
        for text, size in job.part.documents():
            waiting += size
            if waiting >= every:
                advance(waiting)
                waiting = 0
            if text:
                bytes_read += len(text.encode())
                yield text

    unfinished = job.folder / f"{job.name}.{os.getpid()}.part"
    with unfinished.open("wb") as file:
        for encoded in tokenizer.each(texts()):
            content = encoded.tobytes()
            file.write(content)
            digest.update(content)
            lengths.append(len(encoded))
        _sync(file)
    os.replace(unfinished, job.folder / f"{job.name}.tokens")
    ends = np.cumsum(lengths, dtype=token_store.ENDS).tobytes()
    write_durably(job.folder / f"{job.name}.ends", ends)
    shard = token_store.Shard(
        tokens=sum(lengths),
        documents=len(lengths),
        bytes=bytes_read,
        tokens_sha256=digest.hexdigest(),
        ends_sha256=hashlib.sha256(ends).hexdigest(),
    )
    write_durably(seal_path(job), json.dumps({"plan": job.plan, "shard": vars(shard)}).encode())
    advance(waiting)
    return shard


def seal_path(job: ShardJob) -> pathlib.Path:
    return job.folder / f"{job.name}.seal"


def read_seal(job: ShardJob) -> token_store.Shard | None:
    """The facts in a shard's seal; None if there is no seal, or if it belongs to another plan."""
    try:
        seal = json.loads(disk.read_json_text(seal_path(job)))
        shard = token_store.Shard(**seal["shard"])
        ours = seal["plan"] == job.plan
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    kinds = {field.name: type(value) for field, value in _fields(shard)}
    wanted = {field.name: field.type for field, _ in _fields(shard)}
    return shard if ours and kinds == wanted else None


def _fields(shard: token_store.Shard) -> Iterator[tuple[Any, Any]]:
    return ((field, getattr(shard, field.name)) for field in dataclasses.fields(shard))


def write_durably(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file atomically, after its content is on the disk."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    with unfinished.open("wb") as file:
        file.write(content)
        _sync(file)
    os.replace(unfinished, path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
