"""What an optimizer step costs: time beside optax.adamw and optax.contrib.muon, compile time, memory, collectives.

Shapes are those of a model of models/; gradients are random. ``layers`` gives each layer its own leaves, as
released programs have them; ``stacked`` is how the models here keep them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from optax_decay.matrices.quantile import quantile
from optax_decay.parameters import axes as axes_lib
from tests.cases import CASES
from train.bench.table import Options, Table, best_times
from train.plan.collectives import collectives, operations
from train.step import families
from train.step.sharding import LETTERS

Build = Callable[[Any, Any], optax.GradientTransformation]


def muon(axes: Any, params: Any) -> optax.GradientTransformation:
    """optax's Muon on the same matrices as ours."""

    def numbers(signature: axes_lib.Signature) -> Any:
        if signature.role != "hidden":
            return None
        return optax.contrib.MuonDimensionNumbers(signature.inputs, signature.outputs)

    tree = jax.tree.map(numbers, axes_lib.resolve(axes, params))
    return optax.contrib.muon(
        1e-3, weight_decay=0.1, adam_weight_decay=0.1, muon_weight_dimension_numbers=tree
    )


OPTIMIZERS: dict[str, Build] = {
    "optax.adamw": lambda axes, params: optax.adamw(1e-3, weight_decay=0.1),
    "optax.contrib.muon": muon,
    "adam_huber_decay": lambda axes, params: optax_decay.adam_huber_decay(1e-3, axes=axes),
    "adam_huber_decay fixed": lambda axes, params: optax_decay.adam_huber_decay(
        1e-3, threshold=0.05, axes=axes
    ),
    "exadam": lambda axes, params: optax_decay.exadam(1e-3, weight_decay=0.1, axes=axes),
    "sophia_g": lambda axes, params: optax_decay.sophia_g(1e-3, axes=axes),
    "conda": lambda axes, params: optax_decay.conda(0.01, weight_decay=0.1, axes=axes),
    "conda staggered": lambda axes, params: optax_decay.conda(
        0.01, weight_decay=0.1, axes=axes, staggered=True
    ),
    "root": lambda axes, params: optax_decay.root(1e-3, axes=axes),
    "root without clipping": lambda axes, params: optax_decay.root(1e-3, quantile=1.0, axes=axes),
    "root polar_express": lambda axes, params: optax_decay.root(
        1e-3, coefficients="polar_express", axes=axes
    ),
    "root bfloat16": lambda axes, params: optax_decay.root(
        1e-3, iteration_dtype=jnp.bfloat16, axes=axes
    ),
}


def contract_rows() -> dict[str, Build]:
    """Every row of the contract table, tests/cases.py, with a model's axes in place of the toy's."""
    rows: dict[str, Build] = {"optax.adamw": OPTIMIZERS["optax.adamw"]}
    for case in CASES:
        own = "axes" in case.options
        rows[case.name] = lambda axes, params, case=case, own=own: case.build(
            **({"axes": axes} if own else {})
        )
    return rows


EXTRA = {case.name: case.extra for case in CASES if case.extra} | {
    "sophia_g": lambda params, grads: {
        "hessian_fn": lambda params, key: jax.tree.map(jnp.square, grads)
    }
}


def shapes_and_axes(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat trees of ``jax.ShapeDtypeStruct`` and of signatures."""
    config = families.PRESETS[options.preset]
    params = jax.eval_shape(lambda: families.of(config).init(config, jax.random.key(0)))
    shapes, axes = {}, {}
    for path, signature in axes_lib.signatures(families.of(config).axes(config), params).items():
        text = " ".join(signature.names[i] for i in signature.inputs)
        text += " -> " if text else ""
        text += " ".join(signature.names[i] for i in signature.outputs)
        if options.layout == "stacked" or not signature.batch:
            batch = " ".join(signature.names[i] for i in signature.batch)
            shapes[path] = jax.ShapeDtypeStruct(signature.shape, jnp.float32)
            axes[path] = f"{batch} | {text}" if batch else text
            continue
        for layer in range(signature.shape[0]):
            name = f"{path}/{layer}"
            shapes[name] = jax.ShapeDtypeStruct(signature.shape[1:], jnp.float32)
            axes[name] = text
    return shapes, axes


@dataclasses.dataclass
class Step:
    """A compiled step with weights and state of its own.

    Attributes:
        compile_s: seconds of CPU to trace and compile.
        state_bytes: of the optimizer's state.
        moved_bytes: that the program reads and writes, by the compiler's count.
    """

    run: Callable[..., Any]
    carry: Any
    compile_s: float
    state_bytes: int
    moved_bytes: float

    def __call__(self, grads: Any, *extra: Any) -> Any:
        self.carry = self.run(*self.carry, grads, *extra)
        return self.carry


def weights(shapes: dict[str, Any], seed: int, scale: float) -> dict[str, jax.Array]:
    """Random ones, drawn on the device: a host takes a minute for those of a 1B."""

    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return {
            path: scale * jax.random.normal(own, x.shape)
            for own, (path, x) in zip(keys, shapes.items())
        }

    return draw(jax.random.key(seed))


def build(
    name: str, make: Build, shapes: Any, axes: Any, grads: Any, own_refresh: bool = False
) -> Step:
    """Compiles one optimizer.

    Args:
        own_refresh: the step takes a bool that decides about renewing Conda's bases.
    """
    tx = optax.with_extra_args_support(make(axes, shapes))
    params = weights(shapes, 1, 0.02)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any, *refresh: Any) -> Any:
        extra = {"refresh": refresh[0]} if own_refresh else {}
        if name in EXTRA:
            extra |= EXTRA[name](params, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, state, grads, *([True] if own_refresh else [])
    )
    compiled = lowered.compile()
    seconds = time.process_time() - start
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    cost: Any = compiled.cost_analysis()
    return Step(compiled, (params, state), seconds, size, cost["bytes accessed"])


def steps_table(options: Options, rows: dict[str, Build] | None = None) -> Table:
    """One step of every optimizer, beside AdamW and Muon."""
    rows = rows or OPTIMIZERS
    chosen = options.chosen(["optax.adamw", *(name for name in rows if name != "optax.adamw")])
    shapes, axes = shapes_and_axes(options)
    total = sum(int(np.prod(x.shape)) for x in shapes.values())
    grads = weights(shapes, 0, 1e-3)
    found: list[dict[str, Any]] = []
    adamw = build("optax.adamw", OPTIMIZERS["optax.adamw"], shapes, axes, grads)
    batch = [name for name in chosen if name != "optax.adamw"]
    # A few at a time: each holds weights and state of its own.
    for some in (batch[i : i + 4] for i in range(0, max(1, len(batch)), 4)):
        built = {"optax.adamw": adamw}
        built |= {name: build(name, rows[name], shapes, axes, grads) for name in some}
        runs = {name: lambda step=step: step(grads) for name, step in built.items()}
        cpu, wall = best_times(options.rounds, runs)
        for name, step in built.items():
            if name == "optax.adamw" and found:
                continue
            state = step.state_bytes / total
            found.append(
                {
                    "optimizer": name,
                    "CPU ms": 1e3 * cpu[name],
                    "CPU / adamw": cpu[name] / cpu["optax.adamw"],
                    "wall / adamw": wall[name] / wall["optax.adamw"],
                    "compile s": step.compile_s,
                    "state B/weight": state,
                    "moved B/weight": step.moved_bytes / total,
                    "least B/weight": 12 + 2 * state,
                }
            )
    return Table(
        f"{options.preset} {options.layout}: {total / 1e6:.3g} M weights, {len(shapes)} leaves",
        found,
        "least: weights and state read and written once, gradients read once. Moved: the compiler's count; XLA for the"
        " CPU writes one result per loop and so reads some arrays again; bodies of loops count once.",
    )


def contract_table(options: Options) -> Table:
    """One step of every row of the contract table."""
    return steps_table(options, contract_rows())


def refresh_table(options: Options) -> Table:
    """Conda's steps with and without renewing all bases."""
    shapes, axes = shapes_and_axes(options)
    grads = weights(shapes, 0, 1e-3)
    step = build("conda", OPTIMIZERS["conda"], shapes, axes, grads, own_refresh=True)
    runs = {name: lambda n=name: step(grads, n == "renewed") for name in ("kept", "renewed")}
    cpu, _ = best_times(max(2, options.rounds // 2), runs)
    extra = cpu["renewed"] - cpu["kept"]
    row = {
        "optimizer": "conda",
        "step CPU ms": 1e3 * cpu["kept"],
        "renewing every basis adds ms": 1e3 * extra,
        "per step every 2000 steps ms": 1e3 * extra / 2000,
    }
    return Table(f"Conda's refresh, {options.preset} {options.layout}", [row])


def quantile_table(options: Options) -> Table:
    """The 0.9-quantile of one matrix of each shape, by counting and by sorting."""
    shapes, axes = shapes_and_axes(options)
    signatures = axes_lib.signatures(axes, shapes)
    kinds = sorted({s.matrix_shape[1:] for s in signatures.values() if s.role == "hidden"})
    rows = []
    for kind in kinds:
        x = jnp.abs(jax.random.normal(jax.random.key(0), kind))
        counting = jax.jit(lambda x: quantile(x, 0.9))
        sorting = jax.jit(lambda x: jnp.quantile(x, 0.9))
        cpu, _ = best_times(
            options.rounds + 1,
            {"counting": functools.partial(counting, x), "sorting": functools.partial(sorting, x)},
        )
        rows.append(
            {
                "matrix": f"{kind[0]}x{kind[1]}",
                "counting ms": 1e3 * cpu["counting"],
                "jnp.quantile ms": 1e3 * cpu["sorting"],
                "ratio": cpu["sorting"] / cpu["counting"],
            }
        )
    return Table("The exact 0.9-quantile of a matrix", rows)


def collectives_table(options: Options) -> Table:
    """Collectives of one step on a mesh of four by two, matrices split over both axes."""
    shapes, axes = shapes_and_axes(options)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=kinds)
    known = {name for s in axes_lib.signatures(axes, shapes).values() for name in s.names}
    letters = {name: axis for name, axis in LETTERS.items() if name in known}
    specs = axes_lib.partition_specs(axes, shapes, letters)
    rows = []
    for name in options.chosen(OPTIMIZERS):
        make = OPTIMIZERS[name]
        tx = optax.with_extra_args_support(make(axes, shapes))
        state = jax.eval_shape(tx.init, shapes)

        def placed(tree: Any) -> Any:
            def place(key: Any, x: Any) -> Any:
                last = str(getattr(key[-1], "key", "")) if key else ""
                fits = last in specs and x.shape == shapes[last].shape
                spec = specs[last] if fits else jax.P()
                return jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)
                )

            return jax.tree_util.tree_map_with_path(place, tree)

        def update(g: Any, state: Any, params: Any, tx: Any = tx, name: str = name) -> Any:
            extra = EXTRA[name](params, g) if name in EXTRA else {}
            return tx.update(g, state, params, **extra)

        arguments = (placed(shapes), placed(state), placed(shapes))
        out = jax.tree.map(lambda x: x.sharding, arguments[:2])
        with jax.set_mesh(mesh):
            compiled = jax.jit(update, out_shardings=out).lower(*arguments).compile()
        found = operations(collectives(compiled.as_text() or ""))
        rows.append({"optimizer": name, "collectives": found})
    return Table(
        f"Collectives of one step, {options.preset} {options.layout}, mesh of fsdp 4 x tensor 2",
        rows,
    )
