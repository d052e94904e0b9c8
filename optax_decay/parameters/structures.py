"""Results that depend only on the structure of a parameter tree: computed once for each structure.

Axes and masks are read from text and patterns. A training step is traced more than once, and ``init`` reads them as
well; the parameters have the same structure, shapes and dtypes each time.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import optax

Result = TypeVar("Result")


def once_per_structure(
    function: Callable[[optax.Params], Result],
) -> Callable[[optax.Params], Result]:
    """A function of a parameter tree that calls `function` once for each structure, with shapes and dtypes alone.

    `function` gets a tree of ``jax.ShapeDtypeStruct``, so its results cannot depend on values. The results of the last
    few structures are kept with the returned function and share its lifetime; callers must not change them.
    """

    @functools.lru_cache(maxsize=8)
    def known(treedef: Any, leaves: tuple[Hashable, ...]) -> Result:
        return function(jax.tree.unflatten(treedef, leaves))

    def result(params: optax.Params) -> Result:
        leaves, treedef = jax.tree.flatten(params)
        for x in leaves:
            if not hasattr(x, "shape"):
                raise ValueError(
                    f"the parameters hold {x!r}, which is not an array; wrap numbers in jnp.asarray."
                )
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        return known(treedef, shapes)

    return result
