"""Eight fake CPU devices, a persistent compilation cache, and nothing else shared."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
