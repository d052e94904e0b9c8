"""Compiles for a TPU on a machine that has none: what the compiler says before a device is paid for.

Needs the package libtpu in the version that the installed jax names (``pip install "jax[tpu]"`` brings it). Figures
are the compiler's own, not measurements: buffer sizes, bytes accessed, the compiled program.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax


class NotInstalled(Exception):
    """The compiler of the target is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program on one device.

    Attributes:
        bytes_accessed: memory traffic by the compiler's model, bytes.
        arguments: bytes of what it is given on one device.
        temporary: bytes of buffers beside arguments and results.
        fusions: fused kernels in the program's entry.
        collectives: how often each kind of collective occurs.
        text: the compiled program.
    """

    bytes_accessed: float
    arguments: int
    temporary: int
    fusions: int
    collectives: dict[str, int]
    text: str


def tpu_devices(topology: str = "v5e:2x2") -> list[Any]:
    """Devices of a TPU that is not there, to put into shardings of ``jax.ShapeDtypeStruct``.

    Args:
        topology: such as ``"v5e:2x2"``, ``"v5p:2x2x1"``, ``"v6e:2x2"``.

    Raises:
        NotInstalled: libtpu cannot be found, or does not fit this jax.
    """
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise NotInstalled('the TPU compiler is not installed: pip install "jax[tpu]"')
    os.environ.setdefault("TPU_LIBRARY_PATH", str(pathlib.Path(spec.origin).parent / "libtpu.so"))
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise NotInstalled(f"libtpu does not compile for {topology}: {error}") from error


def report(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Report:
    """Compiles `function` for the devices that its arguments' shardings name.

    Args:
        function: to be jitted.
        arguments: trees of ``jax.ShapeDtypeStruct`` with shardings.
        donate: numbers of the arguments that the result may overwrite.
    """
    return read(jax.jit(function, donate_argnums=donate).lower(*arguments).compile())


def read(compiled: Any) -> Report:
    """What a compiled program says of itself."""
    text = compiled.as_text() or ""
    entry = text[text.index("ENTRY") :]
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return Report(
        cost["bytes accessed"],
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        len(re.findall(r" fusion\(", entry)),
        {name: count for name, count in counts.items() if count},
        text,
    )
