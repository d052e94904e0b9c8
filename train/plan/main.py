"""The cost of a run before anything of it exists: memory, work and traffic of one step on each device.

    python -m train plan llama_60m --mesh.fsdp 8 --devices 64 --device h200
    python -m train plan --model.preset 7B --model.dtype bfloat16 --data.batch_size 512 --data.length 2048 \\
        --mesh.fsdp 64 --devices 256
    python -m train plan --model.preset 130M --target v5e:2x4      or h100, h200

Shapes and shardings are the trainer's own (`train/step/program.py`), over a mesh that no device belongs to: a 7B on 256
devices is planned on a laptop. Memory of weights and states is exact. Activations, collectives and times are a model,
printed with its assumptions: every matrix is used once forward and twice backward, weights split over fsdp are gathered
for each of the two, and nothing overlaps. Its sums leave out elementwise work and the products of an optimizer.

`--target` compiles the real step for hardware that is not here (ahead_of_time.py), and reports the compiler's figures.
"""

import dataclasses
import math
from typing import Any

import jax

from optax_decay.axes import signatures
from optax_decay.masks import MATRICES
from train.bench import training
from train.cli import parse
from train.config.fields import Config, UserError, nearest
from train.display import say
from train.plan import ahead_of_time, alignment, kernel_model
from train.plan.bytes_report import count, table
from train.plan.collectives import collectives, operations, sent
from train.step import replicas, sharding, tasks
from train.step.memory_needed import size
from train.step.program import Program, describe, real_mesh, sequences


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak figures of one accelerator, from its maker's data sheet."""

    name: str
    flops: float  # of dense bfloat16 products, per second
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    inner: float  # to devices of the same replica, bytes/s in each direction
    source: str


# float32 products run at about half these rates on GPUs (TF32) and at the same on TPUs (bfloat16 passes).
DEVICES = {
    "h100": Device("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, "NVIDIA H100 data sheet"),
    "h200": Device("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, "NVIDIA H200 data sheet"),
    "v5e": Device("TPU v5e", 197e12, 16e9, 0.819e12, 100e9, "Google Cloud, TPU v5e"),
    "v5p": Device("TPU v5p", 459e12, 95e9, 2.765e12, 300e9, "Google Cloud, TPU v5p"),
    "v6e": Device("TPU v6e", 918e12, 32e9, 1.64e12, 224e9, "Google Cloud, TPU v6e"),
}


def planned(config: Config, mesh: sharding.AnyMesh) -> Program:
    """The program of a config over a mesh, without its text.

    Raises:
        UserError: a model of images, or a tokenizer of unknown size.
    """
    tasks.only_language(config, "plan")
    return describe(tasks.complete(config, vocabulary(config)), mesh)


def vocabulary(config: Config) -> int:
    """Tokens of the tokenizer, without learning it."""
    name = config.data.tokenizer
    if config.model.vocab_size is not None or name == "bytes":
        return 257 if config.model.vocab_size is None else 1
    if name.startswith("bpe-") and name[4:].isdecimal():
        return int(name[4:])
    raise UserError(f"How many tokens {name} has is not known here: set --model.vocab_size.")


def parameters(program: Program) -> dict[str, int]:
    """Numbers of weights: in all, and on one device in matrices (hidden and head) and in the rest."""
    found = {"all": 0, "matrix": 0, "other": 0}
    described = signatures(program.axes, program.shapes["params"])
    for signature, s in zip(described.values(), jax.tree.leaves(program.shardings["params"])):
        found["all"] += math.prod(signature.shape)
        kind = "matrix" if signature.role in MATRICES else "other"
        found[kind] += math.prod(s.shard_shape(signature.shape))
    return found


def products(program: Program) -> float:
    """Floating-point operations of a step's matrix products, over all devices."""
    model, data = program.model, program.config.data
    described = signatures(program.axes, program.shapes["params"])
    matrices = sum(math.prod(s.shape) for s in described.values() if s.role in MATRICES)
    if model.tied:
        matrices += model.vocab_size * model.width
    per_token = 2 * matrices + 4 * model.layers * data.length * model.width
    passes = 4 if model.remat == "full" else 3
    return float(passes * per_token * data.batch_size * data.length)


def activations(program: Program) -> float:
    """Bytes that one device keeps for the backward pass, about; of one micro batch."""
    model, config, shape = program.model, program.config, program.mesh.shape
    rows = config.data.batch_size / config.run.micro_batches
    tokens = rows * config.data.length / math.prod(shape[name] for name in sharding.ROWS)
    item = 2 if model.dtype == "bfloat16" else 4
    heads = model.kv_heads or model.heads
    keys = 2 * heads * model.head_width
    inside = model.width + keys + model.width + 3 * model.mlp_width  # query, keys and values, mix
    kept = {
        "none": 4 * model.width + inside / shape["tensor"],
        "dots": 2 * model.width + (inside - model.mlp_width) / shape["tensor"],
        "full": model.width,
    }[model.remat]
    scores = model.heads * config.data.length / shape["tensor"]
    if model.remat == "none" and model.attention == "xla":
        kept += 2 * scores
    logits = 2 * 4 * model.vocab_size / shape["tensor"]
    return tokens * (model.layers * kept * item + logits)


def traffic(program: Program) -> dict[str, float]:
    """Bytes that one device sends per step, by mesh axis and purpose, counted as rings do."""
    config, model, shape = program.config, program.model, program.mesh.shape
    own, sizes = parameters(program), {name: shape[name] for name in sharding.NAMES}
    shard = 4.0 * (own["matrix"] + own["other"])
    ring = {name: (n - 1) / n for name, n in sizes.items()}
    found: dict[str, float] = {}
    if sizes["fsdp"] > 1:
        whole = shard * sizes["fsdp"] * ring["fsdp"]
        found["fsdp: gather weights, forward and backward"] = 2 * whole * config.run.micro_batches
        found["fsdp: reduce gradients"] = whole * config.run.micro_batches
    if sizes["data"] > 1:
        found["data: mean of gradients"] = 2 * ring["data"] * shard
    if sizes["tensor"] > 1:
        rows = config.data.batch_size / math.prod(sizes[name] for name in sharding.ROWS)
        item = 2 if model.dtype == "bfloat16" else 4
        sums = rows * config.data.length * model.width * item * 4 * model.layers
        found["tensor: sums of activations"] = 2 * ring["tensor"] * sums
    if sizes["replica"] > 1 and replicas.used(config):
        found["replica: signs of momenta"] = ring["replica"] * own["matrix"] / 4
        found["replica: mean of other gradients"] = 2 * ring["replica"] * 4.0 * own["other"]
    elif sizes["replica"] > 1:
        found["replica: mean of gradients"] = 2 * ring["replica"] * shard
    return found


def report(program: Program, device: Device, network: float) -> str:
    """The plan as tables; `network` in bytes/s between replicas, per device and direction."""
    config, shape = program.config, program.mesh.shape
    weights, state = size(program, "params"), size(program, "optimizer")
    kept, sent, work = activations(program), traffic(program), products(program) / program.mesh.size
    total = 2 * weights + state + kept
    peak = rate_of_products(program.model, device)
    outer = sum(n for name, n in sent.items() if name.startswith("replica"))
    seconds = {
        "matrix products at peak": work / peak,
        "weights and state through memory": (3 * weights + 2 * state) / device.bandwidth,
        "network inside a replica": (sum(sent.values()) - outer) / device.inner,
        "network between replicas": outer / network,
    }
    longest = max(seconds, key=lambda name: seconds[name])
    tokens = config.data.batch_size * config.data.length
    memory = {
        "weights, float32": weights,
        f"state of {config.optimizer.direction.name} and the decay": state,
        "gradients": weights,
        f"activations, remat {program.model.remat} (estimate)": kept,
        "in all": total,
        f"{device.name} has": device.memory,
    }
    grid = " x ".join(f"{name} {size}" for name, size in shape.items())
    return "\n".join(
        [
            f"{config.model.preset}: {parameters(program)['all'] / 1e6:.4g}M weights; {tokens} tokens a step;"
            f" {program.mesh.size} devices ({grid})",
            f"{products(program):.3g} floating-point operations a step, {work:.3g} on each device",
            "",
            table([["memory of one device", "bytes"], *([k, count(v)] for k, v in memory.items())]),
            "",
            table(
                [["sent by one device, a step", "bytes"]]
                + [[name, count(n)] for name, n in sent.items()]
                + [["in all", count(sum(sent.values()))]]
            ),
            "",
            table(
                [["time of a step, none overlapped", "ms"]]
                + [[name, short(1e3 * t)] for name, t in seconds.items()]
                + [["sum", short(1e3 * sum(seconds.values()))]]
            ),
            "",
            f"{'Fits' if total <= device.memory else 'DOES NOT FIT'}: {total / device.memory:.0%} of the memory."
            f" Longest: {longest}. {short(tokens / sum(seconds.values()))} tokens/s at best.",
            f"Peaks ({device.source}): {peak:.3g} operations/s, memory {count(device.bandwidth)}/s, network inside"
            f" {count(device.inner)}/s; between replicas {count(network)}/s, as given.",
        ]
    )


def rate_of_products(model: Any, device: Device) -> float:
    """Operations per second at the peak, in the type of the model's activations."""
    return device.flops if model.dtype == "bfloat16" or "TPU" in device.name else device.flops / 2


def short(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def compiled(config: Config, target: str) -> str:
    """Figures of the real step from the compiler of hardware that is not here."""
    try:
        devices = ahead_of_time.devices(target)
    except ahead_of_time.NotInstalled as error:
        raise UserError(
            f"--target {target}: {error}. Without it the plan is a model alone."
        ) from None
    program = planned(config, real_mesh(config, devices))
    lowered = program.update.lower(program.placed_shapes(), program.placed_batch())
    seen = ahead_of_time.read(lowered, devices[0])
    found = collectives(seen.text)
    rows = {
        "arguments (state and batch)": count(seen.arguments),
        "temporaries": count(seen.temporary),
        "memory in all": count(seen.arguments + seen.temporary),
        "fused kernels in the entry": str(seen.fusions),
        "bytes accessed": "not said" if seen.bytes_accessed is None else count(seen.bytes_accessed),
        "sent by one device": count(sent(found)),
    }
    head = [f"compiled for {target}", f"{program.mesh.size} devices"]
    note = "Collectives inside a loop or branch count once: " + operations(found)
    said = table([head, *([k, v] for k, v in rows.items())]) + f"\n{note}."
    if target in DEVICES:
        slow = alignment.unaligned(seen.text)
        said += (
            f"\nLarge products with rows of no multiple of 16 bytes: {'; '.join(slow) or 'none'}."
        )
    return said + (least(program, seen.text, DEVICES[target]) if target in DEVICES else "")


def least(program: Program, text: str, device: Device) -> str:
    """Table of the least time that the kernels of a GPU's program can take."""
    tokens = program.config.data.batch_size * program.config.data.length
    peak = rate_of_products(program.model, device)
    seconds = kernel_model.least(text, peak, device.bandwidth)
    total = sum(seconds.values())
    needed = training.operations(
        program.model, program.config.data.batch_size, program.config.data.length
    )
    share = needed / program.mesh.size / peak / total
    rows = [[kind, short(1e3 * t)] for kind, t in seconds.items()]
    return "\n\n" + "\n".join(
        [
            table(
                [["least time of its kernels, a step", "ms"], *rows, ["sum", short(1e3 * total)]]
            ),
            f"That is {short(tokens / total)} tokens/s, {share:.0%} of the peak in products of the model (causal"
            " attention as half of the square, nothing recomputed); without what devices send each other."
            f" {device.source}: {peak:.3g} operations/s, {count(device.bandwidth)}/s. A model"
            " (kernel_model.py), not a measurement.",
        ]
    )


def main(arguments: list[str]) -> int:
    """Prints the plan of a command line; the flags of a run, and those in the example above."""
    flags, rest = _own_flags(arguments)
    config = parse(rest)
    if flags["--target"]:
        say(compiled(config, flags["--target"]))
        return 0
    name = flags["--device"] or "h200"
    if name not in DEVICES:
        raise UserError(
            f"--device {name} is not one of {', '.join(DEVICES)}; nearest: {nearest(name, list(DEVICES))}."
        )
    needed = config.mesh.replica * (config.mesh.data or 1) * config.mesh.fsdp * config.mesh.tensor
    devices = _number("--devices", flags["--devices"] or str(needed), whole=True)
    network = _number("--network", flags["--network"] or "25")
    mesh = sharding.abstract_mesh(config.mesh, sequences(config), int(devices))
    say(report(planned(config, mesh), DEVICES[name], network * 1e9))
    return 0


def _own_flags(arguments: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """--devices N, --device NAME, --network 1e9 BYTES/S, --target TOPOLOGY; and the other words."""
    own: dict[str, str | None] = dict.fromkeys(("--devices", "--device", "--network", "--target"))
    rest, words = [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in own:
            rest.append(word)
            continue
        own[name] = value if equals else next(words, "")
        if not own[name]:
            raise UserError(f"{name} needs a value.")
    return own, rest


def _number(name: str, text: str, whole: bool = False) -> float:
    try:
        value = float(int(text) if whole else float(text))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{name} {text}: allowed is a {'whole ' if whole else ''}number above 0.")
    return value
