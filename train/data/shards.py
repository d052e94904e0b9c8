"""Makes the shards of a token store, in several processes. Imports no JAX: each process would wait for it."""

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

from train.data import text_sources, token_store, tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to be made."""

    folder: pathlib.Path
    name: str
    part: text_sources.Part
    plan: str  # digest of the plan it belongs to


def encode(
    tasks: list[Task],
    tokenizer: tokens.Tokenizer,
    workers: int | None,
    advance: Callable[[int], None],
) -> None:
    """Makes the shards, in processes that end with this one, however it ends."""
    count = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if count <= 1:
        for task in tasks:
            make_shard(task, tokenizer, advance)
        return
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    start = (tokenizer.name, tokenizer.to_json(), tokenizer.separator, done)
    with concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, start) as pool:
        running = {pool.submit(_work, task) for task in tasks}
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
    _worker.update(tokenizer=tokens.restore(name, json, separator), done=done)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(task: Task) -> None:
    make_shard(task, _worker["tokenizer"], _worker["done"].put)


def make_shard(
    task: Task, tokenizer: tokens.Tokenizer, advance: Callable[[int], None]
) -> token_store.Shard:
    """Writes the two files of a shard, and then its seal."""
    bytes_read, lengths, digest = 0, [], hashlib.sha256()
    waiting, every = 0, max(1, task.part.size // 100)

    def texts() -> Iterator[str]:
        nonlocal bytes_read, waiting
        for text, size in task.part.documents():
            waiting += size
            if waiting >= every:
                advance(waiting)
                waiting = 0
            if text:
                bytes_read += len(text.encode())
                yield text

    unfinished = task.folder / f"{task.name}.{os.getpid()}.part"
    with unfinished.open("wb") as file:
        for found in tokenizer.each(texts()):
            content = found.tobytes()
            file.write(content)
            digest.update(content)
            lengths.append(len(found))
        _sync(file)
    os.replace(unfinished, task.folder / f"{task.name}.tokens")
    ends = np.cumsum(lengths, dtype=token_store.ENDS).tobytes()
    put(task.folder / f"{task.name}.ends", ends)
    shard = token_store.Shard(
        tokens=sum(lengths),
        documents=len(lengths),
        bytes=bytes_read,
        tokens_sha256=digest.hexdigest(),
        ends_sha256=hashlib.sha256(ends).hexdigest(),
    )
    put(seal_path(task), json.dumps({"plan": task.plan, "shard": vars(shard)}).encode())
    advance(waiting)
    return shard


def seal_path(task: Task) -> pathlib.Path:
    return task.folder / f"{task.name}.seal"


def sealed(task: Task) -> token_store.Shard | None:
    """What the seal of a shard says; None without one, or with one of another plan."""
    try:
        seal = json.loads(seal_path(task).read_bytes())
    except (OSError, ValueError):
        return None
    return token_store.Shard(**seal["shard"]) if seal["plan"] == task.plan else None


def put(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file whole, and not before its content is on the disk."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    with unfinished.open("wb") as file:
        file.write(content)
        _sync(file)
    os.replace(unfinished, path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
