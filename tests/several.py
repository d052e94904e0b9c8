"""One run in several processes on this machine, with fake devices: what its tests share."""

import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(count: int, devices: int, arguments: list[str]) -> list[subprocess.Popen]:
    """`python -m train` in `count` processes with `devices` each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "COLUMNS": "120"}
    # Compilers' remarks on toy shapes, and on the speed of a busy machine, are not what the program says.
    variables |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    variables |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    join = ["--coordinator", address, "--processes", str(count), "--process"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "train", *join, str(i), *arguments],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Exit codes and what was said, less the greetings of the library that connects processes."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in text.splitlines() if "[Gloo]" not in line] for text in said]
    return [(p.returncode, "\n".join(own)) for p, own in zip(processes, lines, strict=True)]
