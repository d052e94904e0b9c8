"""One description of a run: everything that follows from its config and a mesh.

    config, mesh → model → axes → parameters → optimizer → state → step

The mesh may be real, abstract, or of devices that are not there. The trainer adds data (`train/main.py`), the plan
reads shapes and shardings (`train/plan/`), and a compiler for other hardware lowers `Program.update`. Nothing is
allocated here, and only shapes are traced: every function is compiled when it is first called.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optax_decay.axes import resolve, signatures
from train.config.fields import Config, model_config
from train.step import families, observe, optimizer, replicas, sharding, tasks, update
from train.step.sharding import AnyMesh
from train.step.update import State


@dataclasses.dataclass(frozen=True)
class Program:
    """A run before it has data; nothing of it changes while it trains.

    Attributes:
        config: complete (`tasks.complete`).
        task: of the model.
        mesh: the devices in a grid.
        model: a Config of a file of `models/`.
        axes: a `Signature` for each parameter, in a tree like the parameters.
        tx: the optimizer.
        shapes: of the state, as `jax.ShapeDtypeStruct`.
        shardings: of the state.
    """

    config: Config
    task: tasks.Task
    mesh: AnyMesh
    model: Any
    axes: Any
    tx: optax.GradientTransformationExtraArgs
    shapes: State
    shardings: State

    @property
    def forward(self) -> families.Forward:
        return families.Forward(self.model, sharding.Activations(self.mesh))

    @functools.cached_property
    def update(self) -> Any:
        """The compiled step, (state, batch) -> (state, scalars to note); it overwrites the state it is given."""
        config = self.config
        step = functools.partial(
            self.task.train_step,
            self.forward,
            self.tx,
            optimizer.schedule(config.optimizer),
            config.run.micro_batches,
            needs_curvature(config),
        )
        return update.compiled(step, self.shardings, replicas.used(config))

    @functools.cached_property
    def fresh_params(self) -> Callable[[jax.Array], Any]:
        """Weights from a key."""
        init = functools.partial(families.of(self.model).init, self.model)
        return jax.jit(init, out_shardings=self.shardings["params"])

    @functools.cached_property
    def first_state(self) -> Callable[[Any], State]:
        """The state before the first step, from weights."""
        init = functools.partial(self.task.first_state, tx=self.tx)
        return jax.jit(init, out_shardings=self.shardings)

    @functools.cached_property
    def fresh_optimizer(self) -> Callable[[Any], Any]:
        """The state of an optimizer that has not moved these weights yet."""
        return jax.jit(self.tx.init, out_shardings=self.shardings["optimizer"])

    @functools.cached_property
    def sums(self) -> Callable[[State, Any], tuple[jax.Array, ...]]:
        """Sums over a held-out batch, for `Task.scores`."""
        return self._for_the_host(functools.partial(self.task.sums, self.forward))

    @functools.cached_property
    def gains(self) -> Callable[[Any], dict[str, Any]]:
        """From weights to gains of sublayers (`observe.gain_meter`); empty without a width."""
        if self.config.width is None:
            return lambda params: {}
        return observe.gain_meter(self.axes, self.shapes["params"], self.mesh)

    def observed(self, state: State, batch: Any) -> dict[str, dict[str, float]]:
        """Sizes of the weights, and what the decay would do to them in a step on this batch, by role."""
        tried, sizes = jax.device_get((self._try_decay(state, batch), self._sizes(state["params"])))
        return observe.merge(observe.decay(self._signatures, tried), sizes)

    @functools.cached_property
    def _signatures(self) -> Any:
        return signatures(self.axes, self.shapes["params"])

    @functools.cached_property
    def _sizes(self) -> Callable[[Any], Any]:
        return self._for_the_host(functools.partial(observe.weights, self._signatures))

    @functools.cached_property
    def _try_decay(self) -> Callable[[State, Any], Any]:
        config, params = self.config, self.shardings["params"]
        gradient = functools.partial(self.task.gradient, self.forward, config.run.micro_batches)
        observed = optimizer.chain(config, self.axes, metrics=True, params=params)
        tried = functools.partial(observe.try_decay, gradient, observed)
        return self._for_the_host(
            sharding.over_devices(tried, self.shardings, replicas.used(config))
        )

    def _for_the_host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled, with results on every device: every process reads them."""
        return jax.jit(function, out_shardings=jax.NamedSharding(self.mesh, jax.P()))

    def init(self, key: jax.Array) -> State:
        """The state before the first step, with fresh weights.

        In two programs: models of one shape share that of their weights, whatever trains them.
        """
        return self.first_state(self.fresh_params(key))

    def placed_shapes(self) -> State:
        """The state as `jax.ShapeDtypeStruct` with shardings."""
        return jax.tree.map(_placed, self.shapes, self.shardings)

    def placed_batch(self) -> Any:
        """A batch as `jax.ShapeDtypeStruct` with shardings."""
        rows = jax.NamedSharding(self.mesh, jax.P(sharding.ROWS))
        return jax.tree.map(lambda x: _placed(x, rows), self.task.batch)


def _placed(x: jax.ShapeDtypeStruct, where: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def describe(config: Config, mesh: AnyMesh) -> Program:
    """The program of a complete config over a mesh."""
    model = model_config(config, 1)
    family, task = families.of(model), tasks.of(config)(config)
    params = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
    axes = resolve(family.axes(model), params)
    placed = sharding.of_parameters(axes, params, mesh)
    tx = optimizer.build(config, axes, params=placed)
    shapes = jax.eval_shape(functools.partial(task.first_state, tx=tx), params)
    shardings = sharding.of_train_state(shapes, placed)
    return Program(config, task, mesh, model, axes, tx, shapes, shardings)


def real_mesh(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The devices of a run in a grid; those that are here, unless others are given."""
    return sharding.make_mesh(config.mesh, sequences(config), devices)


def sequences(config: Config) -> int:
    """Examples that are worked on at once."""
    return config.data.batch_size // config.run.micro_batches


def needs_curvature(config: Config) -> bool:
    """Whether the optimizer asks for a sampled-label gradient now and then."""
    return config.optimizer.direction.curvature
