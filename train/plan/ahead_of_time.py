"""Compiles for a TPU, an H100 or an H200 on a machine that has none: what the compiler says before one is paid for.

TPUs need the package libtpu in the version that the installed jax names (``pip install "jax[tpu]"`` brings it). The
GPUs need three: ``pip install --no-deps jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cuda-nvcc-cu12`` with V the
version of the installed jax, and for cuDNN's attention nvidia-cudnn-cu12 besides. Figures are the compiler's own, not
measurements: buffer sizes, bytes accessed, the compiled program. Nothing is tuned by trying it out: on a GPU the
products, and what they need beside their results, may be other ones than those of a real run.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax


class NotInstalled(Exception):
    """The compiler of the target is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program on one device.

    Attributes:
        bytes_accessed: memory traffic by the compiler's model, bytes; None: it has none.
        arguments: bytes of what it is given on one device.
        temporary: bytes of buffers beside arguments and results.
        fusions: fused kernels in the program's entry.
        collectives: how often each kind of collective occurs.
        text: the compiled program.
    """

    bytes_accessed: float | None
    arguments: int
    temporary: int
    fusions: int
    collectives: dict[str, int]
    text: str


# From NVIDIA's data sheets and the limits of compute capability 9.0: bytes of memory, bytes per second.
GPUS = {"h100": (80_000_000_000, 3_350_000_000_000), "h200": (141_000_000_000, 4_800_000_000_000)}
_HOPPER = """
platform_name: "CUDA"
device_description_str: "NVIDIA NAME"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: MEMORY
  memory_bandwidth: BANDWIDTH
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def devices(target: str) -> list[Any]:
    """Devices that are not there, to put into shardings of ``jax.ShapeDtypeStruct``.

    Args:
        target: a TPU topology such as ``"v5e:2x4"``, or one of `GPUS` for the eight of a machine.

    Raises:
        NotInstalled: the compiler of the target cannot be found, or does not fit this jax.
    """
    return gpu_devices(target) if target in GPUS else tpu_devices(target)


def gpu_devices(target: str) -> list[Any]:
    """Eight GPUs of one machine.

    Args:
        target: one of `GPUS`.

    Raises:
        NotInstalled: one of the three packages cannot be found, or does not fit this jax.
    """
    if not (_package("jax_plugins.xla_cuda12") and _cuda()):
        raise NotInstalled(
            f"the compiler of an {target.upper()} is not installed: pip install --no-deps jax-cuda12-plugin"
            f" jax-cuda12-pjrt nvidia-cuda-nvcc-cu12, the first two in version {jax.__version__}"
        )
    _load_cudnn()
    # Without a GPU the plugin's checks of the driver fail; nothing here runs on one.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    config = _HOPPER.replace("NAME", target.upper())
    for word, number in zip(("MEMORY", "BANDWIDTH"), GPUS[target]):
        config = config.replace(word, str(number))
    # The public way to a topology passes an empty name on, and the plugin takes none.
    from jax._src import xla_bridge

    try:
        topology: Any = xla_bridge.make_pjrt_topology(
            "cuda", target, target_config=config, topology="1x1x8"
        )
        return topology._make_compile_only_devices()
    except Exception as error:
        raise NotInstalled(
            f"the CUDA plugin does not compile for {target.upper()}: {error}"
        ) from error


def _package(name: str) -> pathlib.Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return pathlib.Path(places[0]) if places else None


def _load_cudnn() -> None:
    """Its libraries, if they are there: XLA asks cuDNN itself for the plan of a fused attention."""
    folder = _package("nvidia.cudnn")
    for library in sorted(folder.glob("lib/lib*.so*")) if folder else ():
        with contextlib.suppress(OSError):  # some of them want a driver
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _cuda() -> pathlib.Path | None:
    """The folder with ptxas and libdevice."""
    return _package("nvidia.cuda_nvcc")


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
    (device, *_) = jax.tree.leaves(arguments)[0].sharding.device_set
    return read(jax.jit(function, donate_argnums=donate).lower(*arguments), device)


def read(lowered: Any, device: Any) -> Report:
    """Compiles a lowered program for devices like `device`, and says what the compiler says of it."""
    gpu = device.platform in ("gpu", "cuda")
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(_cuda())} if gpu else {}
    with warnings.catch_warnings():
        # Without a device no program comes out of the compilation cache.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text() or ""
    entry = text[text.index("ENTRY") :]
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    return Report(
        cost.get("bytes accessed"),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        len(re.findall(r" fusion\(", entry)),
        {name: count for name, count in counts.items() if count},
        text,
    )
