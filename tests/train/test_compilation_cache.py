"""Compiled programs on disk: whole entries, whoever is killed; which folder; what the flag says."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from train import compilation_cache
from train.errors import UserError
from train.run.folder import ROOT


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    names += ("jax_persistent_cache_min_compile_time_secs",)
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def entries(folder):
    return sorted(folder.rglob("*-cache"))


def test_without_a_flag_programs_are_kept_beside_the_runs(tmp_path):
    assert compilation_cache.start(["small", "--run.steps", "5"]) == ["small", "--run.steps", "5"]
    expected = tmp_path / compilation_cache.DEFAULT / compilation_cache.machine()
    assert jax.config.jax_compilation_cache_dir == str(expected) and expected.is_dir()
    assert jax.config.jax_enable_compilation_cache
    assert not list(expected.iterdir())


def test_a_flag_names_the_folder_or_switches_off(tmp_path):
    assert compilation_cache.start(["a", "--compilation_cache=x", "b"]) == ["a", "b"]
    folder = tmp_path / "x" / compilation_cache.machine()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compilation_cache.start(["--compilation-cache", "None"]) == []
    assert not jax.config.jax_enable_compilation_cache
    assert compilation_cache.start(["--compilation_cache", "y"]) == []
    assert jax.config.jax_enable_compilation_cache


def test_a_folder_set_for_jax_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation_cache.start([])
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / ".cache").write_text("")
    with pytest.raises(UserError, match=r"--compilation_cache file: .* cannot be written .* None"):
        compilation_cache.start(["--compilation_cache", "file"])
    with pytest.raises(UserError, match="needs a value"):
        compilation_cache.start(["--compilation_cache"])
    compilation_cache.start([])  # the default folder cannot be created: the run goes on
    assert jax.config.jax_compilation_cache_dir is None


def test_old_entries_and_abandoned_files_are_removed(tmp_path):
    now = 1_000_000.0
    for age, size, name in ((30, 40, "a-cache"), (20, 30, "b-cache"), (10, 50, "c-cache")):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, (now - age, now - age))
    for age, name in ((7200, "old.part"), (60, "new.part"), (7200, "other")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    compilation_cache.prune(tmp_path, 120, now)
    assert len(entries(tmp_path)) == 3 and not (tmp_path / "old.part").exists()
    compilation_cache.prune(tmp_path, 99, now)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["b-cache", "c-cache", "new.part", "other"]


SCRIPT = """
import os, pathlib, signal, sys, warnings
from train import compilation_cache
warnings.simplefilter("error")
compilation_cache.start(["--compilation_cache", "kept"])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if sys.argv[1] == "killed":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
x = jnp.arange(7.0)
f = lambda x: jnp.cumsum(jnp.sin(x)) @ x
first = float(jax.jit(f)(x))
found = sorted(pathlib.Path("kept").rglob("*-cache"))
whole = [path.read_bytes() for path in found]
assert len(found) >= 2, found
for path, content in zip(found, whole):
    path.write_bytes(content[: len(content) // 2])
jax.clear_caches()
assert float(jax.jit(f)(jnp.arange(7.0))) == first
mended = [path for path, content in zip(found, whole) if path.read_bytes() != content[: len(content) // 2]]
assert mended == found, (mended, found)
jax.clear_caches()
assert float(jax.jit(f)(jnp.arange(7.0))) == first  # read back, without a warning
print("replaced", len(found))
"""


def run(mode):
    variables = {k: v for k, v in os.environ.items() if "CACHE" not in k} | {
        "PYTHONPATH": str(ROOT)
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], env=variables, capture_output=True, text=True
    )


def test_a_process_killed_while_it_writes_leaves_no_entry_and_damaged_ones_are_replaced(tmp_path):
    killed = run("killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not entries(tmp_path) and len(list(tmp_path.rglob("*.part"))) == 1
    done = run("whole")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("replaced") and len(entries(tmp_path)) >= 2
