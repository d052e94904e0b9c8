"""The state of a tree without leaves, with which ``optax.tree.map_params`` calls ``init``.

``optax.tree.map_params`` learns which parts of an optimizer state are shaped like the parameters by calling ``init``
with a placeholder that has no leaves, and uses the result as a prefix of the real state. Parts that are dictionaries by
path would be empty there, and no prefix of the real ones.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

State = TypeVar("State", bound=tuple[Any, ...])


def has_no_leaves(params: optax.Params) -> bool:
    """True for empty trees, the placeholder of ``optax.tree.map_params`` among them."""
    return not jax.tree.leaves(params)


def placeholder_state(kind: type[State], **like_params: Any) -> State:
    """A state in which one int32 zero, a prefix of every tree, stands for each part.

    Args:
        kind: the state's `NamedTuple` class.
        like_params: the parts shaped like the parameters, initialised from the placeholder as from any tree.

    >>> import optax
    >>> placeholder_state(optax.ScaleByAdamState, mu={}, nu={}).mu
    {}
    """
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    holes = {name: jnp.zeros([], jnp.int32) for name in fields if name not in like_params}
    return kind(**holes, **like_params)
