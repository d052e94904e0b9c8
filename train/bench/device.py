"""Compares the training step and optimizer steps with the limits of the device, an accelerator or a CPU.

    python -m train bench device device-step --preset 1B --tokens 32768 --layout stacked

The limits are measured in the same process: the speed of a large matrix product, and of a copy in memory. All times are
wall times until the result is ready.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.bench import training
from train.bench.optimizers import OPTIMIZERS, compile_step, random_weights, shapes_and_axes
from train.bench.table import Options, Table, best_times
from train.plan.main import DEVICES
from train.step import families

LENGTH = 1024  # longest sequence [tokens]
SIZES = {"cpu": (1024, 2**24)}  # side of the matrices in a product, elements of a copy
LARGE = (8192, 2**28)  # the same, on accelerators
BYTES = 28  # moved by AdamW per weight: it reads weight, gradient and two moments, and writes all but the gradient


@functools.cache
def ceilings(rounds: int) -> dict[str, float]:
    """Speed of matrix products by type [operations/s], and of reading and writing a large array, "copy" [bytes/s]."""
    side, elements = SIZES.get(jax.default_backend(), LARGE)
    kinds = ("bfloat16", "float32")
    speeds = {dtype: training.matmul_peak(rounds, side, dtype) for dtype in kinds}
    carry = [jax.random.normal(jax.random.key(0), (elements,))]
    negate = jax.jit(
        jnp.negative, donate_argnums=0
    )  # in place, since the first access to new memory is slow

    def copy() -> Any:
        carry[:] = [negate(*carry)]
        return carry

    seconds = best_times(rounds, {"copy": copy})[1]["copy"]
    return speeds | {"copy": 2 * carry[0].nbytes / seconds}


def data_sheet() -> float | None:
    """Speed of bfloat16 products according to the data sheet of this device [operations/s]; None if unknown."""
    kind = jax.devices()[0].device_kind.lower()
    return next((device.flops for name, device in DEVICES.items() if name in kind), None)


def limits_table(options: Options) -> Table:
    """The measured limits of the device, and the memory traffic of optimizer steps as a share of a copy's."""
    shapes, axes = shapes_and_axes(options)
    total = sum(int(np.prod(x.shape)) for x in shapes.values())
    best = ceilings(options.rounds)
    rows: list[dict[str, Any]] = [
        {"what": f"{dtype} product", "Tflop/s": best[dtype] / 1e12, "GB/s": None, "/ copy": None}
        for dtype in ("bfloat16", "float32")
    ]
    rows.append({"what": "copy", "Tflop/s": None, "GB/s": best["copy"] / 1e9, "/ copy": 1.0})
    grads = random_weights(shapes, 0, 1e-3)
    for name in ("optax.adamw", "adam_huber_decay fixed", "adam_huber_decay"):
        step = compile_step(OPTIMIZERS[name], shapes, axes, grads)
        _, wall = best_times(options.rounds, {name: functools.partial(step, grads)})
        rate = BYTES * total / wall[name]
        row = {"what": name, "Tflop/s": None, "GB/s": rate / 1e9, "/ copy": rate / best["copy"]}
        rows.append(row)
    return Table(
        f"Limits, and optimizer steps of {options.preset} {options.layout}: {total / 1e6:.1f} M weights",
        rows,
        f"Every optimizer step counts as {BYTES} bytes per weight, the memory traffic of AdamW.",
    )


def training_table(options: Options) -> Table:
    """Tokens per second of the training step, by attention kernel and by rematerialisation."""
    preset = families.PRESETS[options.preset]
    length = min(LENGTH, options.tokens, getattr(preset, "positions", LENGTH))
    batch = max(1, options.tokens // length)
    shape = (batch, length + 1)
    tokens = np.random.default_rng(0).integers(0, preset.vocab_size, shape, np.int32)
    peak, promised = ceilings(options.rounds)["bfloat16"], data_sheet()
    kernels = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    rows, failed = [], ""
    for attention, remat in itertools.product(kernels, ("none", "dots", "full")):
        model = dataclasses.replace(preset, dtype="bfloat16", attention=attention, remat=remat)
        name, rate = f"{attention} attention, remat {remat}", None
        if not options.only or name in options.only:
            try:
                run = {name: training.ours(model, tokens)}
                rate = batch * length / best_times(options.rounds, run)[1][name]
            except jax.errors.JaxRuntimeError as error:
                failed += f" {name}: {str(error).splitlines()[0][:120]}."
            work = training.operations(model, batch, length) / (batch * length)
            rows.append(
                {
                    "step": name,
                    "tokens/s": rate,
                    "of bfloat16 products %": rate and 100 * work * rate / peak,
                    "of the data sheet %": rate and promised and 100 * work * rate / promised,
                }
            )
    return Table(
        f"A training step of {options.preset}, AdamW included: {batch} x {length} tokens",
        rows,
        f"Products of bfloat16 reach {peak / 1e12:.3g} Tflop/s here. Causal attention counts as half of the square,"
        f" and recomputed work does not count.{failed}",
    )
