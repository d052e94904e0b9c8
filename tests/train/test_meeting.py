"""How processes meet, and notice that one has ended: threads in place of processes, real sockets."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from train import meeting
from train.errors import UserError


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(meeting, "GRACE", 0.05)
    monkeypatch.setattr(meeting, "BEAT", 0.1)


def together(address, numbers, count, seconds=10.0):
    """What `meet` gives to each process: a meeting, or the text of its error."""

    def one(number):
        try:
            return meeting.meet(address, count, number, seconds)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(enumerate(pool.map(one, numbers)))


def test_all_meet_and_part_in_peace(address):
    met = together(address, [2, 0, 1], 3)
    assert {m.number for m in met.values()} == {0, 1, 2}
    heard = []
    for m in met.values():
        m.watch(heard.append)
    for m in met.values():
        m.finish()
    for m in met.values():
        m.close()
    time.sleep(0.3)
    assert heard == []


def test_who_is_missing_is_named_in_every_process(address):
    begun = time.monotonic()
    met = together(address, [0, 1, 3], 5, seconds=1.0)
    assert time.monotonic() - begun < 5
    for text in met.values():
        assert (
            "Processes 2, 4 of 5 did not arrive within 1 s" in text and "--connect_seconds" in text
        )


def test_a_missing_first_process_is_named(address):
    (text,) = together(address, [1], 2, seconds=0.5).values()
    assert f"Process 1 of 2 cannot reach process 0 at {address} within 0.5 s" in text
    assert "refused" in text


@pytest.mark.parametrize(
    ("numbers", "says"),
    [([0, 1, 1], "Two processes were started with --process 1"), ([0, 7], "--process 7")],
)
def test_numbers_that_do_not_fit_are_named(address, numbers, says):
    assert all(says in text for text in together(address, numbers, 3, seconds=5.0).values())


def test_different_counts_are_named(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(together, address, [0], 2, 5.0)
        other = pool.submit(together, address, [1], 3, 5.0)
        texts = [*first.result().values(), *other.result().values()]
    says = "Process 1 was started with --processes 3, and process 0 with --processes 2"
    assert all(says in text for text in texts), texts


def test_a_stranger_at_the_port_changes_nothing(address):
    host, port = address.split(":")

    def knock():
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as link:
                    link.sendall(b"GET / HTTP/1.1\r\n\r\n\xff\n[1]\n")
                return
            except OSError:
                time.sleep(0.02)

    stranger = threading.Thread(target=knock)
    stranger.start()
    stranger.join(0.3)
    met = together(address, [0, 1], 2)
    stranger.join()
    assert all(isinstance(m, meeting.Meeting) for m in met.values())
    for m in met.values():
        m.close()


def test_the_end_of_one_is_told_to_all(address):
    met = together(address, [0, 1, 2], 3)
    heard = {0: [], 1: []}
    for number in heard:
        met[number].watch(heard[number].append)
    met[2].close()
    for _ in range(100):
        if all(heard.values()):
            break
        time.sleep(0.05)
    assert heard == {0: ["Process 2 of 3 has ended"], 1: ["Process 2 of 3 has ended"]}
    for number in (0, 1):
        met[number].close()


def test_a_process_that_falls_silent_counts_as_ended(address, monkeypatch):
    monkeypatch.setattr(meeting, "SILENCE", 0.5)
    met, heard = together(address, [0, 1], 2), []
    met[0].watch(heard.append)  # the other never says a word
    for _ in range(100):
        if heard:
            break
        time.sleep(0.05)
    assert heard == ["Process 1 of 2 has not been heard of for 0 s"]
    for m in met.values():
        m.close()


def test_clocks_that_differ_are_named(address, monkeypatch):
    said, plain = [], time.time
    monkeypatch.setattr(meeting, "say", said.append)

    def clock():
        return plain() + (100 if threading.current_thread().name == "ahead" else 0)

    monkeypatch.setattr(meeting.time, "time", clock)
    found = []
    ahead = threading.Thread(
        target=lambda: found.append(meeting.meet(address, 2, 1, 5.0)), name="ahead"
    )
    ahead.start()
    found.append(meeting.meet(address, 2, 0, 5.0))
    ahead.join()
    assert said == [
        "the clock of process 1 is 100 s ahead; times in its log and of its files will be off"
    ]
    for m in found:
        m.close()


WAITS = """
import sys, time
from train import meeting
met = meeting.meet(sys.argv[1], 2, int(sys.argv[2]), 20.0)
met.watch(meeting.end_at_once)
print("met", flush=True)
time.sleep(60)  # as in a collective operation that never ends
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_of_two_processes_the_survivor_ends_with_a_message(address, killed):
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for i in range(2)
    ]
    try:
        assert [p.stdout.readline() for p in pair] == ["met\n"] * 2
        pair[killed].send_signal(signal.SIGKILL)
        _, said = pair[1 - killed].communicate(timeout=20)
    finally:
        for process in pair:
            process.kill()
    assert pair[1 - killed].returncode == 2
    assert f"Process {killed} of 2 has ended before its work was done" in said
    assert "last checkpoint is safe" in said and "Traceback" not in said
