"""Paths and files that are not what they seem: each is one message, at once, and nothing is waited for."""

import os
import pathlib
import signal
import socket

import pytest

from train import disk, memory
from train.errors import UserError


@pytest.fixture(autouse=True)
def no_waiting():
    """Ends a test that waits for a FIFO or a device."""

    def end(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert disk.read_file(tmp_path / "file") == b"abc"
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    wrongs = {"fifo": "a FIFO", "socket": "a socket", ".": "a folder", "/dev/zero": "a device"}
    for name, what in wrongs.items():
        assert disk.kind(tmp_path / name) == what
        with pytest.raises(disk.NotRegular, match=f"is {what}; only regular files are read"):
            disk.read_file(tmp_path / name)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        with pytest.raises(disk.NotRegular, match=what):
            disk.read_file(tmp_path / "link")
    assert disk.kind(tmp_path / "nothing") is None
    assert disk.read_file(pathlib.Path("/proc/self/maps")) == b""  # it claims to be empty


def test_sizes_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10_000_000_000_000)
    with pytest.raises(
        UserError, match=r"[Rr]eading .*sparse needs 10,000 GB; there are .* in this machine"
    ):
        disk.read_file(path)
    with pytest.raises(OSError, match="has 10,000,000,000,000 bytes; at most 256,000,000 are read"):
        disk.read_json_text(path)
    monkeypatch.setattr(memory, "of_host", lambda: None)  # a system that does not say
    memory.check(10**18, "anything")


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:   2000 kB\nMemFree: 5 kB\nMemAvailable:  7 kB\n")
    (tmp_path / "max").write_text("max\n")
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "max", tmp_path / "missing"))
    assert (memory.of_host(), memory.free()) == (2_048_000, 7168)
    (tmp_path / "max").write_text("1000000\n")
    assert memory.of_host() == 1_000_000
    with pytest.raises(
        UserError, match=r"^This needs 0.002 GB; there are 0.001 GB in this machine\. Do\."
    ):
        memory.check(2_000_000, "this", "Do.")


def test_paths_as_users_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk.user_path("~/x") == tmp_path / "x"
    assert disk.user_path("./~user") == pathlib.Path("./~user")
    wrongs = {
        "~nosuchuser/x": "no user 'nosuchuser' on this machine",
        "x" * 5000: r"x{60}\.\.\.x{15} holds a name of 5000 bytes; allowed are at most 255",
        "/".join(["é" * 100] * 30): "has 6029 bytes; allowed are at most 4095",
        "a\0b": "zero byte",
    }
    for text, said in wrongs.items():
        with pytest.raises(UserError, match=said) as error:
            disk.user_path(text)
        assert len(str(error.value)) < 250
