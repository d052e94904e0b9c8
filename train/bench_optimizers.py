"""What an optimizer step costs: time beside optax.adamw and optax.contrib.muon, compile time, memory, collectives.

    python -m train.bench_optimizers
    python -m train.bench_optimizers --preset 20M --layout stacked --rounds 5
    python -m train.bench_optimizers --section collectives

Shapes are those of a model of models/; gradients are random. All optimizers of one table run in one process,
in turns, and the best of the rounds counts, so that ratios hold on a busy machine where times do not. CPU time is that
of all threads. ``--layout layers`` gives each layer its own leaves, as released programs have them; ``stacked`` is how
the models here keep them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optax_decay
from optax_decay import axes as axes_lib
from optax_decay.quantile import quantile
from train import families
from train.collectives import collectives, operations
from train.sharding import LETTERS

Sections = Literal["steps", "refresh", "quantile", "collectives"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    preset: str = "60M"
    """Name of a model, as for --model.preset: 60M, gpt2-124M, ..."""
    layout: Literal["layers", "stacked"] = "layers"
    """One leaf per layer, or one leaf for all layers."""
    rounds: int = 5
    """Timed steps of each optimizer."""
    section: tuple[Sections, ...] = ("steps", "refresh", "quantile")
    """Tables to print. Collectives are counted for eight devices, so not in the process that takes times."""
    only: tuple[str, ...] = ()
    """Names of optimizers; none: all."""

    def __post_init__(self) -> None:
        if self.preset not in families.PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(families.PRESETS)}.")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1.")
        unknown = set(self.only) - set(OPTIMIZERS)
        if unknown:
            raise ValueError(
                f"only={sorted(unknown)[0]!r} is not one of {', '.join(sorted(OPTIMIZERS))}."
            )
        if "collectives" in self.section and len(self.section) > 1:
            raise ValueError("section=collectives must stand alone: it needs eight devices.")


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


OPTIMIZERS: dict[str, Callable[[Any, Any], optax.GradientTransformation]] = {
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
    """

    run: Callable[..., Any]
    carry: Any
    compile_s: float
    state_bytes: int

    def time(self, grads: Any, *extra: Any) -> tuple[float, float]:
        """CPU and wall seconds of one step."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.carry = jax.block_until_ready(self.run(*self.carry, grads, *extra))
        return time.process_time() - cpu, time.perf_counter() - wall


def weights(shapes: dict[str, Any], seed: int, scale: float) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(scale * rng.standard_normal(x.shape, np.float32))
        for path, x in shapes.items()
    }


def build(name: str, shapes: Any, axes: Any, grads: Any, own_refresh: bool = False) -> Step:
    """Compiles one optimizer.

    Args:
        own_refresh: the step takes a bool that decides about renewing Conda's bases.
    """
    tx = optax.with_extra_args_support(OPTIMIZERS[name](axes, shapes))
    params = weights(shapes, 1, 0.02)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any, *refresh: Any) -> Any:
        extra = {"refresh": refresh[0]} if own_refresh else {}
        if name == "sophia_g":
            extra["hessian_fn"] = lambda params, key: jax.tree.map(jnp.square, grads)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, state, grads, *([True] if own_refresh else [])
    )
    compiled = lowered.compile()
    seconds = time.process_time() - start
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return Step(compiled, (params, state), seconds, size)


def steps_table(options: Options) -> None:
    shapes, axes = shapes_and_axes(options)
    total = sum(int(np.prod(x.shape)) for x in shapes.values())
    grads = weights(shapes, 0, 1e-3)
    names = [n for n in OPTIMIZERS if not options.only or n in options.only]
    built = {name: build(name, shapes, axes, grads) for name in names}
    for step in built.values():
        step.time(grads)  # Conda's first step decomposes everything
    best = {name: (np.inf, np.inf) for name in names}
    for _ in range(options.rounds):
        for name, step in built.items():
            best[name] = tuple(np.minimum(best[name], step.time(grads)))
    print(
        f"\n{options.preset} {options.layout}: {total / 1e6:.1f} M parameters, {len(shapes)} leaves"
    )
    print(
        f"{'':24}{'CPU ms':>9}{'wall ms':>9}{'/ adamw':>9}{'/ muon':>9}{'compile s':>11}{'B/param':>9}"
    )
    for name, step in built.items():
        ratios = [
            f"{best[name][0] / best[other][0]:9.2f}" if other in best else f"{'-':>9}"
            for other in ("optax.adamw", "optax.contrib.muon")
        ]
        print(
            f"{name:24}{1e3 * best[name][0]:9.0f}{1e3 * best[name][1]:9.0f}{ratios[0]}{ratios[1]}"
            f"{step.compile_s:11.1f}{step.state_bytes / total:9.2f}"
        )


def refresh_table(options: Options) -> None:
    """Conda's steps with and without renewing all bases."""
    shapes, axes = shapes_and_axes(options)
    grads = weights(shapes, 0, 1e-3)
    step = build("conda", shapes, axes, grads, own_refresh=True)
    step.time(grads, True)
    best = {True: np.inf, False: np.inf}
    for _ in range(max(2, options.rounds // 2)):
        for renew in best:
            best[renew] = min(best[renew], step.time(grads, renew)[0])
    extra = best[True] - best[False]
    print(
        f"\nConda, {options.preset}: a step {1e3 * best[False]:.0f} ms of CPU; renewing every basis"
    )
    print(f"adds {1e3 * extra:.0f} ms, {1e3 * extra / 2000:.2f} ms per step every 2000 steps")


def quantile_table(options: Options) -> None:
    """The 0.9-quantile of one matrix of each shape, by counting and by sorting."""
    shapes, axes = shapes_and_axes(options)
    signatures = axes_lib.signatures(axes, shapes)
    kinds = sorted({s.matrix_shape[1:] for s in signatures.values() if s.role == "hidden"})
    print(f"\n{'quantile, CPU ms':24}{'counting':>10}{'sorting':>10}{'ratio':>8}")
    for kind in kinds:
        x = jnp.abs(jax.random.normal(jax.random.key(0), kind))
        forms = {
            "counting": jax.jit(lambda x: quantile(x, 0.9)),
            "sorting": jax.jit(lambda x: jnp.quantile(x, 0.9)),
        }
        best = dict.fromkeys(forms, np.inf)
        for _ in range(options.rounds + 1):
            for form, function in forms.items():
                start = time.process_time()
                function(x).block_until_ready()
                best[form] = min(best[form], time.process_time() - start)
        a, b = best["counting"], best["sorting"]
        print(f"{kind!s:24}{1e3 * a:10.2f}{1e3 * b:10.2f}{b / a:8.1f}")


def collectives_table(options: Options) -> None:
    """Collectives of one step on a mesh of four by two, matrices split over both axes."""
    shapes, axes = shapes_and_axes(options)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=kinds)
    known = {name for s in axes_lib.signatures(axes, shapes).values() for name in s.names}
    letters = {name: axis for name, axis in LETTERS.items() if name in known}
    specs = axes_lib.partition_specs(axes, shapes, letters)
    print(f"\ncollectives of one step, {options.preset} {options.layout}, (fsdp 4, tensor 2)")
    for name, make in OPTIMIZERS.items():
        if options.only and name not in options.only:
            continue
        tx = optax.with_extra_args_support(make(axes, shapes))
        extra: dict[str, Any] = {}
        if name == "sophia_g":
            extra["hessian_fn"] = lambda params, key: jax.tree.map(jnp.square, params)
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

        def update(g: Any, state: Any, params: Any, tx: Any = tx, extra: Any = extra) -> Any:
            return tx.update(g, state, params, **extra)

        arguments = (placed(shapes), placed(state), placed(shapes))
        out = jax.tree.map(lambda x: x.sharding, arguments[:2])
        with jax.set_mesh(mesh):
            compiled = jax.jit(update, out_shardings=out).lower(*arguments).compile()
        print(f"{name:24}{operations(collectives(compiled.as_text() or ''))}")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if "collectives" in options.section:
        jax.config.update("jax_num_cpu_devices", 8)
    else:
        jax.config.update("jax_enable_compilation_cache", False)
    tables = {
        "steps": steps_table,
        "refresh": refresh_table,
        "quantile": quantile_table,
        "collectives": collectives_table,
    }
    for section in options.section:
        tables[section](options)


if __name__ == "__main__":
    main()
