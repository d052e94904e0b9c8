"""Eight fake CPU devices, a persistent compilation cache, and what keeps a long run healthy.

Every program that XLA compiles for the CPU holds a few memory mappings for as long as JAX's caches hold the
program, and Linux allows 65530 of them per process: thousands of tests in one process end in failures to
compile and then in an abort. So the caches are emptied when they have grown to half of that.

With `-n 2` tests that share compiled programs run in one process: those of a file, and of one row of the
contract.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads for eight devices to wait in, train/__init__.py

import jax
import pytest

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
collect_ignore = ["hugging_face_logits.py"]  # run by test_hugging_face.py, where torch is
_MAPPINGS = pathlib.Path("/proc/self/maps")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        row = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        group = f"{item.path.name} {row.name}" if hasattr(row, "name") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _bounded_mappings():
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def quickly_compiled():
    """Programs that run a few times only: a quarter to half of their time is the compiler's care for their speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
