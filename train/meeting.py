"""How the processes of a run meet, and how each notices that another one has ended.

Process 0 listens on the coordinator's port. Every other process connects and says its number; once all are there, all
go on, and JAX's coordinator takes over the port. Who is missing when the time is up is named, in every process. The
connections stay open. A process that ends takes its connection with it, and process 0 tells the others, so that they
end with a message instead of waiting for it in a collective operation.

A message is one line of JSON: ``{"process": 1, "of": 2, "clock": seconds}`` at first; then ``go``, ``refused``,
``ended``, ``finished`` or ``alive``.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from train.display import say
from train.errors import UserError

WORD_EVERY = 15.0  # s between two lines that say who is waited for
BEAT = 5.0  # s between two signs of life
SILENCE = 90.0  # s without a sign of life after which a process counts as ended
CLOCKS = 30.0  # s by which clocks may differ without a word
GRACE = 2.0  # s in which a process may end by itself, with the error that it shares with the one that ended


class Peer:
    """The connection with another process."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.rest, self.seen = link, b"", time.monotonic()
        self.number: int | None = None
        self.finished = False

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # one that has ended is noticed when it is read
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None at the end of the connection."""
        try:
            data = self.link.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.seen = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None  # something else that knocks at ports
        return found if all(isinstance(message, dict) for message in found) else None


class Meeting:
    """The connections of one process, once all have met."""

    def __init__(self, number: int, count: int, peers: list[Peer]) -> None:
        self.number, self.count, self.peers = number, count, peers
        self.over = False  # whether this process is done with the others
        self._thread = threading.Thread(target=self._watch_until_over, name="meeting", daemon=True)

    def watch(self, ended: Callable[[str], None]) -> None:
        """Calls `ended` with a sentence, in a thread, if another process ends before it has finished."""
        self._ended = ended
        self._thread.start()

    def finish(self) -> None:
        """Says that this process has done its work, so that its end is none to be noticed."""
        self.over = True
        for peer in self.peers:
            peer.send(finished=self.number)

    def close(self) -> None:
        """Ends the connections, which the others notice at once."""
        self.over = True
        if self.number == 0:
            time.sleep(
                GRACE
            )  # the others, who may end with the same error, need JAX's coordinator until then
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.link.shutdown(socket.SHUT_RDWR)
            peer.link.close()

    def _watch_until_over(self) -> None:
        try:
            self._watch()
        except (OSError, ValueError):  # a connection that this process has closed
            if not self.over:
                raise

    def _watch(self) -> None:
        with selectors.DefaultSelector() as ready:
            for peer in self.peers:
                peer.link.setblocking(True)
                peer.link.settimeout(BEAT)
                ready.register(peer.link, selectors.EVENT_READ, peer)
            beaten = time.monotonic()
            while not self.over and ready.get_map():
                for key, _ in ready.select(min(BEAT, 1.0)):
                    self._hear(key.data, ready)
                now = time.monotonic()
                if now - beaten > BEAT:
                    beaten = now
                    for peer in self.peers:
                        peer.send(alive=self.number)
                for peer in [k.data for k in list(ready.get_map().values())]:
                    if now - peer.seen > SILENCE and not peer.finished:
                        self._gone(peer, f"has not been heard of for {SILENCE:.0f} s")

    def _hear(self, peer: Peer, ready: selectors.BaseSelector) -> None:
        messages = peer.read()
        if messages is None:
            ready.unregister(peer.link)
            if not peer.finished:
                self._gone(peer, "has ended")
            return
        for message in messages:
            if "finished" in message:
                peer.finished = True
            if "ended" in message:
                self._tell(str(message["ended"]), 0.0)  # process 0 has waited, and is about to end

    def _gone(self, peer: Peer, how: str) -> None:
        # Without its coordinator, which is in process 0, JAX aborts this process in a moment.
        self._tell(f"Process {peer.number} of {self.count} {how}", GRACE if peer.number else 0.0)

    def _tell(self, text: str, pause: float = GRACE) -> None:
        time.sleep(pause)  # what ended it may be ending this one too, with a better message
        if self.over:
            return
        self.over = True
        for peer in self.peers:
            peer.send(ended=text)
        self._ended(text)


def meet(address: str, count: int, number: int, seconds: float) -> Meeting:
    """Waits until all processes of a run are there.

    Args:
        address: HOST:PORT of the coordinator.
        count: of processes.
        number: of this one.
        seconds: to wait.

    Raises:
        UserError: some are missing when the time is up, or two do not fit together; all that are there raise it.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    if number == 0:
        return Meeting(0, count, _gather(int(port), count, seconds, end))
    return Meeting(
        number, count, [_arrive(host.strip("[]"), int(port), count, number, end, seconds)]
    )


def _gather(port: int, count: int, seconds: float, end: float) -> list[Peer]:
    _allow_files(count)
    found: dict[int, Peer] = {}
    with _listen(port) as door, selectors.DefaultSelector() as ready:
        door.setblocking(False)
        ready.register(door, selectors.EVENT_READ)
        said = time.monotonic()
        while len(found) < count - 1:
            for key, _ in ready.select(0.2):
                if key.data is None:
                    with contextlib.suppress(OSError):
                        link = door.accept()[0]
                        link.setblocking(False)
                        ready.register(link, selectors.EVENT_READ, Peer(link))
                else:
                    _welcome(key.data, ready, found, count)
            now = time.monotonic()
            if now > end:
                text = (
                    f"{_names(_missing(found, count))} of {count} did not arrive within {seconds:g} s; the others"
                    " are here. See why, or wait longer with --connect_seconds."
                )
                raise _refused(text, found)
            if now - said > WORD_EVERY:
                said = now
                say(f"waiting for {_names(_missing(found, count)).lower()} of {count} ...")
    for peer in found.values():
        peer.send(go=True)
    return list(found.values())


def _welcome(peer: Peer, ready: selectors.BaseSelector, found: dict[int, Peer], count: int) -> None:
    messages = peer.read()
    if messages is None:
        ready.unregister(peer.link)
        if peer.number is not None and found.get(peer.number) is peer:
            del found[peer.number]  # it ended, and may be started again
        peer.link.close()
        return
    for message in messages:
        number, of = message.get("process"), message.get("of")
        if not isinstance(number, int):
            continue
        if of != count:
            text = f"Process {number} was started with --processes {of}, and process 0 with --processes {count}."
            raise _refused(text, found | {-1: peer})
        if number in found or not 0 < number < count:
            text = f"Two processes were started with --process {number}; each needs a number of its own."
            raise _refused(text, found | {-1: peer})
        peer.number, found[number] = number, peer
        apart = float(message.get("clock", time.time())) - time.time()
        if abs(apart) > CLOCKS:
            say(
                f"the clock of process {number} is {abs(apart):.0f} s {'ahead' if apart > 0 else 'behind'}; times in"
                " its log and of its files will be off"
            )


def _refused(text: str, peers: dict[int, Peer]) -> UserError:
    for peer in peers.values():
        peer.send(refused=text)
        peer.link.close()
    return UserError(text)


def _arrive(host: str, port: int, count: int, number: int, end: float, seconds: float) -> Peer:
    peer = Peer(_connect(host, port, end, seconds, number, count))
    peer.number = 0
    peer.send(process=number, of=count, clock=time.time())
    peer.link.settimeout(1.0)
    said, missing = time.monotonic(), f"Process 0 at {host}:{port}"
    while True:
        messages = peer.read()
        if messages is None:
            raise UserError(f"{missing} ended before all {count} processes had met.")
        for message in messages:
            if "refused" in message:
                raise UserError(str(message["refused"]))
            if "go" in message:
                return peer
        now = time.monotonic()
        if now > end + 10:  # process 0, which knows who is missing, speaks first
            raise UserError(f"{missing} does not answer; it may be another program.")
        if now - said > WORD_EVERY:
            said = now
            say(f"process {number} of {count} is connected, and waits for the others ...")


def _connect(
    host: str, port: int, end: float, seconds: float, number: int, count: int
) -> socket.socket:
    said = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            now = time.monotonic()
            if now > end:
                raise UserError(
                    f"Process {number} of {count} cannot reach process 0 at {host}:{port} within {seconds:g} s:"
                    f" {error.strerror or error}. Start process 0 on that machine, check --coordinator, or wait longer"
                    " with --connect_seconds."
                ) from None
            if now - said > WORD_EVERY:
                said = now
                say(f"process {number} of {count} waits for process 0 at {host}:{port} ...")
            time.sleep(0.3)


def _listen(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # JAX's coordinator will listen on this port while the connections are still open.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("", port))
        door.listen(4096)
    except OSError as error:
        door.close()
        raise UserError(
            f"Process 0 cannot listen on port {port}: {error.strerror or error}. Choose another port in --coordinator,"
            " in all processes."
        ) from None
    return door


def _allow_files(count: int) -> None:
    """Raises the limit of open files for one connection per process, as far as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 512
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _missing(found: dict[int, Peer], count: int) -> list[int]:
    return [number for number in range(1, count) if number not in found]


def _names(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (
        f" and {len(numbers) - 8} more" if numbers[8:] else ""
    )
    return f"Process{'es' if len(numbers) > 1 else ''} {shown}"


def end_at_once(text: str) -> None:
    """Ends this process, whatever it waits for: with a message, and with exit code 2."""
    print(
        f"\n{text} before its work was done, and this process cannot go on without it. Everything up to the last"
        " checkpoint is safe: start all processes again with the same command.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
