"""Derivatives of a run with respect to the learning rate and λ, against finite differences in float64."""

import jax
import jax.numpy as jnp
import pytest

import optax_decay
from tests.cases import CASES
from tests.support import toy

DECAYS = [c for c in CASES if "decay" in c.name and "low_precision" not in c.name]
# Multipliers of spectra are constants for derivatives, as its docstring says: only the place of λ is differentiated.
STOPPED = ("spectral_alpha_decay",)


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.parametrize("case", DECAYS, ids=lambda case: case.name.replace(" ", "-"))
def test_derivatives_are_those_of_finite_differences(case):
    """Central differences of step h = 1e-5 of the number err by h²; kinks would show as whole percents."""
    numbers = {"learning_rate": 0.03}
    numbers |= {n: v for n, v in case.numbers.items() if n in ("weight_decay", "rate")}
    with jax.enable_x64(True):
        params = wide(toy.params())
        gradients = jax.tree.map(lambda *g: jnp.stack(g), *map(wide, toy.gradients(case.steps)))

        def final(values):
            tx = case.build(**dict(zip(numbers, values)))

            def step(carry, g):
                w, state = carry
                extra = case.extra(w, g) if case.extra else {}
                updates, state = tx.update(g, state, w, **extra)
                return (jax.tree.map(jnp.add, w, updates), state), None

            (w, _), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
            return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)), x.ravel()) for x in jax.tree.leaves(w))

        both = jax.jit(lambda values, along: jax.jvp(final, (values,), (along,)))
        at = jnp.array(list(numbers.values()), jnp.float64)
        for i, name in enumerate(numbers):
            along = jnp.zeros_like(at).at[i].set(1.0)
            _, derivative = both(at, along)
            h = 1e-5 * at[i]
            difference = (both(at + h * along, along)[0] - both(at - h * along, along)[0]) / (2 * h)
            assert jnp.isfinite(derivative), name
            if not case.name.startswith(STOPPED):
                assert abs(derivative - difference) <= 1e-5 * abs(difference) + 1e-9, name


def test_the_bound_of_cpr_by_inflection_is_differentiable_before_it_is_known():
    """An infinite bound once made 0 · ∞ of the derivative with respect to the rate."""
    params = {"w": jnp.array([[1.0, -2.0, 0.5]])}

    def final(rate):
        tx = optax_decay.cpr_decay(rate=rate, mask=None)
        updates, _ = tx.update({"w": -0.1 * params["w"]}, tx.init(params), params)
        return updates["w"].sum()

    assert jax.grad(final)(0.7) == 0.0
