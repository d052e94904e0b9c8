"""A look at the decay of a run before it starts: does the whole optimizer shrink weights as the table promises?

No link of a chain sees its neighbours, so the whole chain is measured (`optax_decay.probe`), at the peak of the
learning rate, on a stand-in for the parameters: one small array for each kind of parameter that the model has. Adam
stands in for directions that take long to compile, and multipliers of spectra are left out. That costs about a second,
whatever the size of the model.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

import optax_decay
from optax_decay.axes import signatures
from train.config.fields import Config
from train.config.parts.schedules import number
from train.config.tree import flatten, replace
from train.step import optimizer

LARGEST = 8  # entries per axis of the stand-in
# Directions that compile at once. Adam stands in for the others: where a decay stands does not depend on them.
QUICK = ("adam", "nadam", "lion")
# Decays that do nothing to fresh weights, or enlarge small ones, and mean to.
LATER, ENLARGES = ("cpr", "target_norm", "toward_initial", "soda"), ("target_norm",)


def problems(config: Config, params: Any, axes: Any) -> tuple[str, ...]:
    """Sentences about decay that is not as it should be; empty if all is well.

    Args:
        config: of the run, complete.
        params: the parameters, as ``jax.ShapeDtypeStruct``.
        axes: a `Signature` for each, in a tree like the parameters.
    """
    fields = flatten(config.decay)
    if fields.get("weight_decay", 1.0) == 0 or not fields["mask"]:
        return ()  # no decay is wanted
    kinds: dict[Any, Any] = {}
    for signature, leaf in zip(signatures(axes, params).values(), jax.tree.leaves(params)):
        kind = (signature.role, len(signature.batch), signature.is_matrix)
        small = dataclasses.replace(
            signature, shape=tuple(min(n, LARGEST) for n in signature.shape)
        )
        kinds.setdefault(kind, (small, leaf.dtype))
    changes: dict[str, Any] = {}
    if config.optimizer.direction.name not in QUICK:
        changes["optimizer.name"] = "adam"
    if any(name.startswith("spectrum.") for name in fields):
        changes["decay.spectrum"] = None
    own = Config(optimizer=config.optimizer, decay=config.decay, width=config.width)
    return _problems(replace(own, changes), tuple(kinds.values()))


@functools.lru_cache(maxsize=64)
def _problems(config: Config, kinds: tuple[tuple[Any, Any], ...]) -> tuple[str, ...]:
    axes = unflatten_dict({s.path: s for s, _ in kinds}, sep="/")
    shapes = {s.path: jax.ShapeDtypeStruct(s.shape, dtype) for s, dtype in kinds}
    params = unflatten_dict(shapes, sep="/")
    with jax.default_device(_device()):
        table = optax_decay.probe(
            optimizer.build(config, axes),
            params,
            axes=axes,
            expected=_promised(config, params, axes),
            step=number(config.optimizer.schedule.warmup_steps),
            raises=False,
        )
    name, grows, nothing = config.decay.name, " grows by ", "no parameter shrinks"
    return tuple(
        text
        for text in table.problems
        if not (name in ENLARGES and grows in text) and not (name in LATER and nothing in text)
    )


def _device() -> jax.Device:
    """The CPU, which compiles small programs fastest; another device if JAX was told to use no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _promised(config: Config, params: Any, axes: Any) -> optax_decay.DecayTable | None:
    """What the table states, where it is what one step does: not for other pulls than l2, nor for gates."""
    fields = flatten(config.decay)
    plain = (
        config.decay.name == "l2" and fields["form"] != "cautious" and fields["spectrum"] is None
    )
    if not plain or config.width is not None:
        return None
    table = optimizer.decay_table(config, params, axes)
    assert isinstance(table, optax_decay.DecayTable)
    return table
