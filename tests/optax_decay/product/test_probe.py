"""The probe: what it measures is what a chain does to weights, and the usual mistakes of order are found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay

RATE, DECAY = 1e-3, 0.1
AXES = (("embed", "V -> D"), ("up", "D -> F"), ("down", "F -> D"), ("norm", "D"))
SHAPES = {"embed": (30, 16), "up": (16, 48), "down": (48, 16), "norm": (16,)}
HIDDEN = {"mask": "hidden", "axes": AXES}


def weights(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), len(SHAPES))
    return {n: 0.02 * jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, SHAPES.items())}


def promised(params, coefficient=DECAY, **options):
    return optax_decay.decay_table(params, coefficient, learning_rate=RATE, **HIDDEN, **options)


def measured(tx, **options):
    table = optax_decay.probe(tx, weights(), axes=AXES, raises=False, **options)
    return {row.path: row for row in table.rows}, table.problems


def chain(*links):
    return optax.chain(optax.scale_by_adam(), *links, optax.scale_by_learning_rate(RATE))


def link(coefficient=DECAY, **options):
    return optax_decay.decay(coefficient, **(HIDDEN | options))


@pytest.mark.parametrize(
    "tx",
    [
        chain(link()),
        optax_decay.conda(RATE, weight_decay=link()),
        optax_decay.root(RATE, weight_decay=link()),
        optax_decay.sophia_g(RATE, weight_decay=link()),
        optax_decay.exadam(RATE, weight_decay=link()),
        optax.chain(
            optax.sgd(RATE), optax_decay.proximal_decay(DECAY, learning_rate=RATE, **HIDDEN)
        ),
        optax_decay.skip_on_spike(chain(link())),
        optax.chain(optax.clip_by_global_norm(1.0), chain(link())),
    ],
    ids=["adam", "conda", "root", "sophia", "exadam", "proximal", "skip", "clip"],
)
def test_measures_the_shrink_of_any_optimizer(tx):
    """η λ = 1e-4 per step; the proximal form divides by 1 + ηλ. The direction leaves less than 0.1 % of it."""
    rows, problems = measured(tx, expected=promised(weights()))
    assert not problems
    for path, row in rows.items():
        if path in ("up", "down"):
            np.testing.assert_allclose(row.shrink, RATE * DECAY, rtol=2e-3)
        else:
            assert not row.decays


def test_schedules_are_evaluated_at_the_step():
    rise = optax.linear_schedule(0.0, RATE, 10)
    tx = optax.chain(optax.scale_by_adam(), link(), optax.scale_by_learning_rate(rise))
    assert "nothing decays" in measured(tx)[1][0]
    for step in (5, 10):
        assert measured(tx, step=step)[0]["up"].shrink == pytest.approx(
            RATE * DECAY * step / 10, rel=2e-3
        )


def test_shapes_are_enough():
    shapes = jax.eval_shape(weights)
    table = optax_decay.probe(chain(link()), shapes, axes=AXES)
    rows = {row.path: row for row in table.rows}
    assert rows["down"].shrink == pytest.approx(RATE * DECAY, rel=2e-3)
    assert "down" in str(table) and "step 0" in str(table)


def test_weights_in_sixteen_bits():
    """One update is coarse; the mean over a matrix still shows the decay."""
    with pytest.warns(optax_decay.LowPrecisionDecayWarning):
        table = optax_decay.probe(chain(link(2.0)), weights(jnp.bfloat16), axes=AXES, raises=False)
    rows = {row.path: row for row in table.rows}
    assert rows["up"].decays and not rows["norm"].decays and not table.problems


@pytest.mark.parametrize(
    ("tx", "says"),
    [
        (optax.chain(chain(), link()), "grows"),
        (chain(optax_decay.decay(lambda count: -DECAY, **HIDDEN)), "grows"),
        (optax.chain(chain(), link(coupling=optax_decay.couplings.learning_rate())), "grows"),
        (chain(link(coupling=optax_decay.couplings.independent())), "grows"),
        (optax.chain(link(), chain()), "in front of Adam"),
        (chain(link(), link(2 * DECAY)), "two links"),
        (chain(link(), link()), "two links"),
        (chain(link(coupling=optax_decay.couplings.schedule(RATE))), "another coupling"),
        (chain(link(RATE * DECAY)), "another coupling"),
        (chain(link(mask=None)), "should not decay"),
        (chain(link(), optax.clip_by_global_norm(1.0)), "clipping"),
        (
            optax.chain(
                optax.scale_by_adam(),
                optax_decay.proximal_decay(DECAY, learning_rate=RATE, **HIDDEN),
                optax.scale_by_learning_rate(RATE),
            ),
            "grows",
        ),
        (chain(), "does not decay where .* is promised"),
    ],
    ids=[
        *(
            "behind the rate",
            "negative schedule",
            "behind a whole optimizer",
            "independent in front",
        ),
        *("in front of Adam", "two decays", "twice the same", "much too strong", "much too weak"),
        *("mask forgotten", "clipped behind"),
        *("proximal in front of the rate", "none at all"),
    ],
)
def test_usual_mistakes_raise(tx, says):
    with pytest.raises(optax_decay.ProbeError, match=says) as error:
        optax_decay.probe(tx, weights(), axes=AXES, expected=promised(weights()))
    assert error.value.table.problems


def test_without_promises_parameters_of_a_role_are_compared():
    unequal = chain(link(mask=(("up", 1.0), ("down", 0.1), ("embed|norm", 0.0))))
    with pytest.raises(
        optax_decay.ProbeError, match=r"'up' shrinks by .*'down', also of role hidden"
    ):
        optax_decay.probe(unequal, weights(), axes=AXES)
    equal = chain(link(mask=(("up|down", 1.0), ("embed|norm", 0.0))))
    assert not optax_decay.probe(equal, weights(), axes=AXES).problems


def test_a_fixed_norm_is_no_decay():
    rows, problems = measured(optax_decay.rotational_adamw(1e-2, weight_decay=DECAY, axes=AXES))
    assert rows["up"].fixed_norm and not rows["embed"].fixed_norm and not problems
