"""Cautious gates: which weights a decay may act on, given the direction of the step.

With u the update that the decay is added to, pointing uphill, and w the weight before the step, elementwise:

===================== ============================================ ==================================================
gate                  decays where                                 used by
===================== ============================================ ==================================================
agreement             u·w >= 0                                     the paper (arXiv 2510.12402), Dion, nanochat;
                                                                   ``cautious=True``
strict_agreement      u·w > 0                                      Adam of the speed runs of modded-nanogpt
same_sign_bits        u and w have equal sign bits, so 0 and       HeavyBall, rollfast
                      -0 differ
on_stepped_weight     -Δ·(w + Δ) > 0, and decays w + Δ             record 46 of track 3 of modded-nanogpt
===================== ============================================ ==================================================

The first three look at the update that arrives, before the learning rate, or after it with ``couplings.independent()``.
`on_stepped_weight` looks at the finished step Δ, after every projection such as a radial brake: it stands last, with
``couplings.independent()``, and λ is then what a step shrinks, such as ``schedules.palm(0.025, learning_rate)`` for ηλ.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import nearest


class Gate(NamedTuple):
    """Which weights decay. Build one with the functions of this module.

    Attributes:
        name: the name in the table above.
        keeps: ``(u, w) -> bool``, elementwise; u points uphill.
        stepped: whether it looks at the stepped weight, which then decays in place of w.
    """

    name: str
    keeps: Callable[[jax.Array, jax.Array], jax.Array]
    stepped: bool = False


def _product(u: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.real(u * jnp.conj(w))


def agreement() -> Gate:
    """Decays where ``u·w >= 0``."""
    return Gate("agreement", lambda u, w: _product(u, w) >= 0)


def strict_agreement() -> Gate:
    """Decays where ``u·w > 0``: weights without an update do not decay."""
    return Gate("strict_agreement", lambda u, w: _product(u, w) > 0)


def same_sign_bits() -> Gate:
    """Decays where real u and w have the same sign bit, that of a zero included."""
    return Gate("same_sign_bits", lambda u, w: jnp.signbit(u) == jnp.signbit(w))


def on_stepped_weight() -> Gate:
    """Decays the stepped weight where it and the finished step disagree in sign; for ``couplings.independent()``."""
    return Gate("on_stepped_weight", lambda u, w: _product(u, w) > 0, stepped=True)


NAMES = ("agreement", "strict_agreement", "same_sign_bits", "on_stepped_weight")


def as_gate(cautious: object, after_rate: bool) -> Gate | None:
    """The gate behind a `cautious` argument: True is `agreement`, False is none.

    Raises:
        ValueError: something else; a gate that needs the finished step where there is none.
    """
    if cautious is False:
        return None
    gate = agreement() if cautious is True else cautious
    if not isinstance(gate, Gate):
        name = getattr(gate, "__name__", gate)
        raise ValueError(
            f"cautious={cautious!r} is not True, False or one of {', '.join(f'gates.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.gates.{nearest(name, NAMES)}()?)."
        )
    if gate.stepped and not after_rate:
        raise ValueError(
            f"the gate {gate.name} looks at the finished step: put the decay last, with "
            "coupling=couplings.independent(), or use gates.strict_agreement()."
        )
    return gate
