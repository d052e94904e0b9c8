"""Bytes over the network per step and per run with 1-bit Adam, read off the compiled programs, and when it pays.

    python -m train.plan.bytes_report
    python -m train.plan.bytes_report --preset 1B --workers 8 --fsdp 4 --run-steps 20000 --warmup-steps 3000

Compiled for `workers` devices and searched for collectives: plain means of all gradients, and 1-bit Adam's step in the
warm-up, in the compressed phase, and in that with every leaf compressed. All start from each worker's gradient, already
reduced inside the worker if `fsdp` > 1. Inputs are shapes, so that no model is allocated.

A step pays where ``bytes/bandwidth + codec`` is less than the plain mean's ``bytes/bandwidth``. The codec (packing,
unpacking, summing, error feedback) is timed on one device here, or given.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import optax_decay
from optax_decay import one_bit
from optax_decay.axes import Signature, resolve
from optax_decay.masks import MATRICES
from train.plan.collectives import Collective, collectives, operations, sent
from train.step import families


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile, and the network to compare on."""

    preset: str = "130M"
    """Name of a model, as for --model.preset: 60M, gpt2-124M, ..."""
    workers: int = 8
    """Workers that exchange signs (N)."""
    fsdp: int = 1
    """Devices that the parameters are split over inside each worker."""
    layout: Literal["flat", "joined", "per_leaf"] = "joined"
    """joined: all parameters in one exchange; per_leaf: one for each; flat: one scale for all."""
    run_steps: int = 10_000
    """Steps of a run [steps]."""
    warmup_steps: int = 1_500
    """Of these, with a plain mean [steps]."""
    gigabits: tuple[float, ...] = (1, 10, 25, 100, 400)
    """Bandwidths of one worker in each direction to compare on [Gbit/s]."""
    codec: float | None = None
    """Codec throughput [1e9 parameters/s]; None: measured on one device here."""

    def __post_init__(self) -> None:
        if self.preset not in families.PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(families.PRESETS)}.")
        if self.workers < 2 or self.fsdp < 1:
            raise ValueError(
                f"workers={self.workers}, fsdp={self.fsdp}: allowed are workers >= 2 and fsdp >= 1."
            )
        if not 1 <= self.warmup_steps <= self.run_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be from 1 to run_steps={self.run_steps}."
            )


class Programs:
    """Compiled steps on a (workers, fsdp) mesh of CPU devices; inputs are shapes only."""

    def __init__(self, options: Options):
        self.options = options
        config = families.PRESETS[options.preset]
        self.params = jax.eval_shape(lambda: families.of(config).init(config, jax.random.key(0)))
        self.axes = families.of(config).axes(
            config
        )  # as rules: inside of a shard_map shapes are those of shards
        devices = jax.devices("cpu")[: options.workers * options.fsdp]
        grid = np.array(devices).reshape(options.workers, options.fsdp)
        self.mesh = jax.sharding.Mesh(grid, ("worker", "fsdp"))
        resolved = resolve(self.axes, self.params)
        self.specs = jax.tree.map(lambda x, s: _split(x, s, options.fsdp), self.params, resolved)
        described = jax.tree.leaves(resolved)
        self.roles = [s.role for s in described]
        self.sizes = [math.prod(s.shape) // self._parts(s) for s in described]

    def _parts(self, signature: Signature) -> int:
        x = jax.ShapeDtypeStruct(signature.shape, jnp.float32)
        return self.options.fsdp if any(_split(x, signature, self.options.fsdp)) else 1

    def elements(self, roles: Sequence[str] | None) -> int:
        """Per device, of the parameters with these roles (None: all)."""
        return sum(n for n, role in zip(self.sizes, self.roles) if roles is None or role in roles)

    def _own(self, specs: Any) -> Any:
        """A leading axis with one row per worker: each worker's gradient is its own."""
        return jax.tree.map(
            lambda s: jax.P("worker", *s), specs, is_leaf=lambda x: isinstance(x, jax.P)
        )

    def _gradients(self) -> Any:
        n = self.options.workers
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), self.params)

    def plain(self, dtype: Any) -> list[Collective]:
        """A mean of all gradients in `dtype`."""

        def mean(gradients: Any) -> Any:
            return jax.lax.pmean(jax.tree.map(lambda g: g[0], gradients), "worker")

        step = jax.shard_map(
            mean, mesh=self.mesh, in_specs=(self._own(self.specs),), out_specs=self.specs
        )
        gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), self._gradients())
        return self._read(jax.jit(step).lower(gradients))

    def one_bit(self, phase: str, compress: Any) -> list[Collective]:
        """The step of 1-bit Adam, without the gradient."""
        tx = optax_decay.scale_by_one_bit_adam(
            "worker",
            self.options.warmup_steps,
            layout=self.options.layout,
            compress=compress,
            axes=self.axes,
            param_specs=self.specs,
            mesh=self.mesh,
        )
        state = jax.eval_shape(tx.init, self.params)
        placed = one_bit.state_partition_specs(state, "worker", self.specs)

        def update(gradients: Any, state: Any) -> Any:
            return tx.update(jax.tree.map(lambda g: g[0], gradients), state, phase=phase)

        step = jax.shard_map(
            update,
            mesh=self.mesh,
            in_specs=(self._own(self.specs), placed),
            out_specs=(self.specs, placed),
        )
        return self._read(jax.jit(step).lower(self._gradients(), state))

    def _read(self, lowered: Any) -> list[Collective]:
        return collectives(lowered.compile().as_text())


def _split(x: Any, signature: Signature, parts: int) -> jax.sharding.PartitionSpec:
    """Split the first dimension that is no batch axis and divides evenly, as FSDP does."""
    for i in signature.reduced:
        if parts > 1 and x.shape[i] % parts == 0:
            return jax.P(*(None,) * i, "fsdp")
    return jax.P()


def codec_seconds(size: int, workers: int, repeats: int = 5) -> float:
    """Seconds that one device spends on coding `size` elements for one step, without the network; the median."""
    total = one_bit.padded_size(size, workers)

    def code(z: jax.Array, server_error: jax.Array, scales: jax.Array) -> Any:
        packed, scale, error = one_bit.encode(z)
        shares = scales * scale
        c = one_bit.decode_sum(packed.reshape(workers, 1, -1), shares)
        packed, scale, server_error = one_bit.encode(c + server_error)
        everyone = jnp.tile(packed, (workers, 1))
        return one_bit.decode(everyone, (scales * scale)[:, 0]), error, server_error

    args = (
        jax.random.normal(jax.random.key(0), [1, total]),
        jnp.zeros([1, total // workers]),
        jnp.linspace(0.5, 1.5, workers)[:, None],
    )
    run = jax.jit(code)
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left; a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def count(size: float) -> str:
    """Bytes for reading: 1 MB is 1e6 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return (
                f"{size / scale:.3g} {unit}"
                if size < 999.5 * scale
                else f"{size / scale:.0f} {unit}"
            )
    return f"{size:.0f} B"


ALL = "1-bit Adam, all leaves"
WARM = "1-bit Adam, warm-up"
MATRIX = "1-bit Adam, matrices"
SINGLE = "float32 mean"
HALF = "bfloat16 mean"


@dataclasses.dataclass(frozen=True)
class Phase:
    """The collectives of one program and the bytes that a device sends for them per step."""

    found: list[Collective]
    size: float


def phases(programs: Programs) -> dict[str, Phase]:
    """One `Phase` per program, by the names above."""

    def measured(found: list[Collective]) -> Phase:
        return Phase(found, sent(found))

    half = programs.plain(jnp.bfloat16)
    return {
        SINGLE: measured(programs.plain(jnp.float32)),
        HALF: measured(half) if not widened(half) else Phase(half, sent(half, 2)),
        WARM: measured(programs.one_bit("warmup", MATRICES)),
        MATRIX: measured(programs.one_bit("compressed", MATRICES)),
        ALL: measured(programs.one_bit("compressed", None)),
    }


def widened(found: Sequence[Collective]) -> bool:
    """True where the compiler sums bfloat16 in float32, as it does for CPUs."""
    return not any(dtype == "bf16" for c in found for dtype, _ in c.arrays)


def traffic(options: Options, found: dict[str, Phase]) -> list[list[str]]:
    """Bytes per step and per run of each program."""
    share = options.warmup_steps / options.run_steps
    rows = [["sent per device", "per step", "per run", "float32 /", "bfloat16 /", "collectives"]]
    for name, phase in found.items():
        mean = phase.size
        if name in (MATRIX, ALL):
            mean = share * found[WARM].size + (1 - share) * phase.size
        rows.append(
            [
                name,
                count(phase.size),
                "" if name == WARM else count(mean * options.run_steps),
                f"{found[SINGLE].size / phase.size:.1f}",
                f"{found[HALF].size / phase.size:.1f}",
                operations(phase.found),
            ]
        )
    return rows


def when_it_pays(options: Options, found: dict[str, Phase], codec: float) -> list[list[str]]:
    """Time of the exchange by bandwidth; `codec` in seconds."""
    rows = [["bandwidth", "float32", "bfloat16", "1-bit", "of which codec", "bfloat16 / 1-bit"]]
    for gigabits in options.gigabits:
        seconds = {name: phase.size * 8 / (gigabits * 1e9) for name, phase in found.items()}
        one = seconds[MATRIX] + codec
        times = [f"{1e3 * t:.4g} ms" for t in (seconds[SINGLE], seconds[HALF], one, codec)]
        rows.append([f"{gigabits:g} Gbit/s", *times, f"{seconds[HALF] / one:.2f}"])
    return rows


def codec_time(options: Options, size: int) -> tuple[float, str]:
    """Seconds for `size` elements, and where that number comes from."""
    if options.codec is not None:
        return size / (options.codec * 1e9), f"{options.codec:g}e9 parameters/s, as given"
    timed = min(size, 2**24)
    seconds = codec_seconds(timed, options.workers)
    kind = jax.devices()[0].device_kind
    return seconds * size / timed, f"{timed / seconds / 1e9:.3g}e9 parameters/s on one {kind} here"


def report(options: Options) -> str:
    """The tables, as text."""
    programs = Programs(options)
    found = phases(programs)
    packed = programs.elements(MATRICES)
    codec, source = codec_time(options, packed)
    even = {
        name: f"{(found[name].size - found[MATRIX].size) / codec * 8e-9:.3g} Gbit/s"
        for name in (SINGLE, HALF)
    }
    lines = [
        f"{options.preset}: {programs.elements(None) / 1e6:.4g}M parameters per device, of them "
        f"{packed / 1e6:.4g}M in hidden matrices and head;",
        f"{options.workers} workers x fsdp {options.fsdp}, layout {options.layout}.",
        "",
        table(traffic(options, found)),
        "",
        f"Per run: {options.run_steps} steps, of them {options.warmup_steps} warm-up.",
        "float32 /, bfloat16 /: how many times less a step sends than the plain mean.",
    ]
    if widened(found[HALF].found):
        lines.append(
            "This host's compiler sums bfloat16 in float32: counted as 2 bytes an element."
        )
    lines += [
        "",
        f"Codec of the matrices: {codec * 1e3:.3g} ms ({source}).",
        "Time of the exchange, matrices compressed, without latency or overlap:",
        "",
        table(when_it_pays(options, found, codec)),
        "",
        f"Faster than a float32 mean below {even[SINGLE]} per device, than a bfloat16 mean below "
        f"{even[HALF]}.",
        f"Memory for errors: {count(4 * packed * (1 + 1 / options.workers))} per device.",
    ]
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_num_cpu_devices", options.workers * options.fsdp)
    print(report(options))


if __name__ == "__main__":
    main()
