"""Cost of an optimizer step compared with optax.adamw and optax.contrib.muon: time, compile time, memory, collectives.

Parameters have the shapes of a model of models/; gradients are random. With the layout ``layers`` each layer has its
own leaves, as in most training programs; with ``stacked`` all layers share a leaf, as in the models here.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from optax_decay import newton
from optax_decay.axes import Signature, partition_specs, resolve, signatures
from train.bench.table import Options, Table, best_times
from train.errors import UserError
from train.plan.collectives import collectives, operations
from train.step import families
from train.step.sharding import LETTERS


class Row(NamedTuple):
    """An optimizer to measure.

    Attributes:
        build: makes the optimizer for (axes, shapes of the parameters).
        extra: makes the extra arguments of `update` from (params, gradients); None if it needs none.
    """

    build: Callable[[Any, Any], optax.GradientTransformation]
    extra: Callable[[Any, Any], dict[str, Any]] | None = None


def muon(axes: Any, params: Any) -> optax.GradientTransformation:
    """optax's Muon for the same matrices as ours."""

    def numbers(signature: Signature) -> Any:
        if signature.role != "hidden":
            return None
        return optax.contrib.MuonDimensionNumbers(signature.inputs, signature.outputs)

    tree = jax.tree.map(numbers, resolve(axes, params))
    return optax.contrib.muon(
        1e-3, weight_decay=0.1, adam_weight_decay=0.1, muon_weight_dimension_numbers=tree
    )


def squared_gradients(params: Any, grads: Any) -> dict[str, Any]:
    """A curvature for Sophia that costs almost nothing, since only the optimizer is measured."""
    return {"hessian_fn": lambda params, key: jax.tree.map(jnp.square, grads)}


OPTIMIZERS: dict[str, Row] = {
    "optax.adamw": Row(lambda axes, params: optax.adamw(1e-3, weight_decay=0.1)),
    "optax.contrib.muon": Row(muon),
    "adam_huber_decay": Row(lambda axes, params: optax_decay.adam_huber_decay(1e-3, axes=axes)),
    "adam_huber_decay fixed": Row(
        lambda axes, params: optax_decay.adam_huber_decay(1e-3, threshold=0.05, axes=axes)
    ),
    "exadam": Row(lambda axes, params: optax_decay.exadam(1e-3, weight_decay=0.1, axes=axes)),
    "sophia_g": Row(lambda axes, params: optax_decay.sophia_g(1e-3, axes=axes), squared_gradients),
    "conda": Row(lambda axes, params: optax_decay.conda(0.01, weight_decay=0.1, axes=axes)),
    "conda staggered": Row(
        lambda axes, params: optax_decay.conda(0.01, weight_decay=0.1, axes=axes, staggered=True)
    ),
    "root": Row(lambda axes, params: optax_decay.root(1e-3, axes=axes)),
    "root without clipping": Row(
        lambda axes, params: optax_decay.root(1e-3, threshold=None, axes=axes)
    ),
    "root polar_express": Row(
        lambda axes, params: optax_decay.root(1e-3, coefficients=newton.polar_express(), axes=axes)
    ),
    "root bfloat16": Row(
        lambda axes, params: optax_decay.root(1e-3, iteration_dtype=jnp.bfloat16, axes=axes)
    ),
}


def contract_rows() -> dict[str, Row]:
    """Every row of the contract table, tests/cases.py, for any model's axes.

    Raises:
        UserError: the tests are not there; they belong to the repository, not to the trainer.
    """
    try:
        cases = importlib.import_module("tests.cases").CASES
    except ImportError as error:
        raise UserError(
            "The section contract measures the rows of tests/cases.py, which cannot be imported"
            f" ({error}); run it in the folder of the repository."
        ) from None
    rows = {"optax.adamw": OPTIMIZERS["optax.adamw"]}
    for case in cases:
        rows[case.name] = Row(
            lambda axes, params, case=case: case.build(axes=axes, params=params), case.extra
        )
    return rows


def shapes_and_axes(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and axes of a preset's parameters, as flat trees by path."""
    config = families.PRESETS[options.preset]
    params = jax.eval_shape(lambda: families.of(config).init(config, jax.random.key(0)))
    shapes, axes = {}, {}
    for path, signature in signatures(families.of(config).axes(config), params).items():
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
    """A compiled optimizer step with its own weights and state.

    Attributes:
        run: the compiled program.
        carry: weights and state.
        compile_s: CPU time of tracing and compilation [s].
        state_bytes: size of the optimizer's state.
        moved_bytes: bytes that the program reads and writes, by the compiler's count.
    """

    run: Callable[..., Any]
    carry: Any
    compile_s: float
    state_bytes: int
    moved_bytes: float

    def __call__(self, grads: Any, *extra: Any) -> Any:
        self.carry = self.run(*self.carry, grads, *extra)
        return self.carry


def random_weights(shapes: dict[str, Any], seed: int, scale: float) -> dict[str, jax.Array]:
    """Random weights. They are drawn on the device, since a host takes a minute for those of a 1B model."""

    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return {
            path: scale * jax.random.normal(own, x.shape)
            for own, (path, x) in zip(keys, shapes.items())
        }

    return draw(jax.random.key(seed))


def compile_step(
    row: Row, shapes: Any, axes: Any, grads: Any, refresh_argument: bool = False
) -> Step:
    """Compiles one optimizer step.

    Args:
        row: the optimizer.
        shapes, axes: of the parameters, by path.
        grads: gradients, by path.
        refresh_argument: whether the step takes a bool that decides if Conda refreshes its bases.
    """
    tx = optax.with_extra_args_support(row.build(axes, shapes))
    params = random_weights(shapes, 1, 0.02)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any, *refresh: Any) -> Any:
        extra = {"refresh": refresh[0]} if refresh_argument else {}
        if row.extra is not None:
            extra |= row.extra(params, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, state, grads, *([True] if refresh_argument else [])
    )
    compiled = lowered.compile()
    seconds = time.process_time() - start
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    cost: Any = compiled.cost_analysis() or {}  # GPUs have none
    return Step(compiled, (params, state), seconds, size, cost.get("bytes accessed", float("nan")))


def steps_table(options: Options, rows: dict[str, Row] | None = None) -> Table:
    """One step of every optimizer, compared with AdamW and Muon."""
    rows = rows or OPTIMIZERS
    chosen = options.chosen(["optax.adamw", *(name for name in rows if name != "optax.adamw")])
    shapes, axes = shapes_and_axes(options)
    total = sum(int(np.prod(x.shape)) for x in shapes.values())
    grads = random_weights(shapes, 0, 1e-3)
    measured: list[dict[str, Any]] = []
    adamw = compile_step(OPTIMIZERS["optax.adamw"], shapes, axes, grads)
    batch = [name for name in chosen if name != "optax.adamw"]
    # Only a few at a time, since each holds its own weights and state.
    for some in (batch[i : i + 4] for i in range(0, max(1, len(batch)), 4)):
        built = {"optax.adamw": adamw}
        built |= {name: compile_step(rows[name], shapes, axes, grads) for name in some}
        runs = {name: lambda step=step: step(grads) for name, step in built.items()}
        cpu, wall = best_times(options.rounds, runs)
        for name, step in built.items():
            if name == "optax.adamw" and measured:
                continue
            state = step.state_bytes / total
            measured.append(
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
        measured,
        "least: weights and state are read and written once, and gradients read once. moved: the compiler's count. XLA"
        " for CPUs writes one result per loop, and so reads some arrays again. Loop bodies count once.",
    )


def contract_table(options: Options) -> Table:
    """One step of every row of the contract table."""
    return steps_table(options, contract_rows())


def refresh_table(options: Options) -> Table:
    """Conda's step with and without a refresh of all bases."""
    shapes, axes = shapes_and_axes(options)
    grads = random_weights(shapes, 0, 1e-3)
    step = compile_step(OPTIMIZERS["conda"], shapes, axes, grads, refresh_argument=True)
    runs = {name: lambda n=name: step(grads, n == "refresh") for name in ("step", "refresh")}
    cpu, _ = best_times(max(2, options.rounds // 2), runs)
    extra = cpu["refresh"] - cpu["step"]
    row = {
        "optimizer": "conda",
        "step CPU ms": 1e3 * cpu["step"],
        "refresh of all bases adds ms": 1e3 * extra,
        "per step, refreshed every 2000, ms": 1e3 * extra / 2000,
    }
    return Table(f"Conda's refresh, {options.preset} {options.layout}", [row])


def quantile_table(options: Options) -> Table:
    """The exact 0.9-quantile of one matrix of each shape, by counting and by sorting."""
    shapes, axes = shapes_and_axes(options)
    hidden = [s for s in signatures(axes, shapes).values() if s.role == "hidden"]
    kinds = sorted({s.matrix_shape[1:] for s in hidden})
    rows = []
    for kind in kinds:
        x = jnp.abs(jax.random.normal(jax.random.key(0), kind))
        counting = jax.jit(lambda x: newton.exact_quantile(x, 0.9))
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


def fitting(axis: Any, size: int, mesh: jax.sharding.Mesh) -> Any:
    """The mesh axis that an array axis is split over; None if it does not divide its size, as GPT-2's vocabulary."""
    return axis if axis is None or size % mesh.shape[axis] == 0 else None


def collectives_table(options: Options) -> Table:
    """Collectives of one step on a mesh of four by two devices, with matrices split over both axes."""
    shapes, axes = shapes_and_axes(options)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=kinds)
    known = {name for s in signatures(axes, shapes).values() for name in s.names}
    letters = {name: axis for name, axis in LETTERS.items() if name in known}
    specs = {
        path: jax.P(*(fitting(name, size, mesh) for name, size in zip(spec, shapes[path].shape)))
        for path, spec in partition_specs(axes, shapes, letters).items()
    }
    rows = []
    for name in options.chosen(OPTIMIZERS):
        row = OPTIMIZERS[name]
        tx = optax.with_extra_args_support(row.build(axes, shapes))
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

        def update(g: Any, state: Any, params: Any, tx: Any = tx, row: Row = row) -> Any:
            extra = row.extra(params, g) if row.extra else {}
            return tx.update(g, state, params, **extra)

        arguments = (placed(shapes), placed(state), placed(shapes))
        out = jax.tree.map(lambda x: x.sharding, arguments[:2])
        with jax.set_mesh(mesh):
            compiled = jax.jit(update, out_shardings=out).lower(*arguments).compile()
        counts = operations(collectives(compiled.as_text() or ""))
        rows.append({"optimizer": name, "collectives": counts})
    return Table(
        f"Collectives of one step, {options.preset} {options.layout}, mesh of fsdp 4 x tensor 2",
        rows,
    )
