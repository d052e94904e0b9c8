"""Eight fake CPU devices, a persistent compilation cache, and what keeps a long run healthy.

Every program that XLA compiles for the CPU holds a few memory mappings for as long as JAX's caches hold the
program, and Linux allows 65530 of them per process: thousands of tests in one process end in failures to
compile and then in an abort. And of 8192 calls that a cache of JAX holds, a full one counts those of a new function
as none. So the caches are emptied long before, by the number of mappings.

Compiling is most of what the tests cost, and their programs are small and run a few times: so here, and in processes
that the tests start, XLA optimizes little. A test of what XLA makes of a program for users asks for `as_for_users`.

With `-n 2` tests that share compiled programs run in one process: those of a file, and of one row of the
contract. The files that take longest are first, so that neither process ends long before the other.
"""

import gc
import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads for eight devices to wait in, train/__init__.py
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import jax
import jax.experimental
import pytest
from jax._src import compiler

# Under nohup, or in the background of a script, these arrive ignored, and so they would in every process of a test.
for _name, _default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, _name, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _default)

# Before XLA reads them; it ends a process that sets what it does not know, as later versions do the first.
QUICK = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
if jax.__version_info__ >= (0, 11):
    del QUICK["xla_cpu_use_fusion_emitters"]
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{k}={v}" for k, v in QUICK.items()))

if not hasattr(jax, "enable_x64"):  # before jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
collect_ignore = ["support/hugging_face_logits.py"]  # run by test_hugging_face.py, where torch is
_LONGEST = ("test_notebooks.py", "test_processes.py", "test_fields.py", "test_main.py")
_MAPPINGS = pathlib.Path("/proc/self/maps")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
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
    # Rows of the contract are many and short.
    items.sort(
        key=lambda item: (item.path.name not in _LONGEST, item.path.name == "test_contract.py")
    )


def pytest_collection_finish():
    """What tracing makes are many small objects: looking for cycles among all of them is a twelfth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def _bounded_mappings():
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


@pytest.fixture
def as_for_users(monkeypatch):
    """Programs of this test are compiled with XLA's own settings."""
    plain = compiler.get_compile_options
    own = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
    own = {name: value for name, value in own.items() if name in QUICK}

    def unasked(*arguments, env_options_overrides, **more):
        return plain(*arguments, env_options_overrides=own | env_options_overrides, **more)

    monkeypatch.setattr(compiler, "get_compile_options", unasked)
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
