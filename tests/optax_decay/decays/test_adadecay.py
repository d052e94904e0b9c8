"""AdaDecay per weight and per matrix, against NumPy; refresh phase, blocks and degenerate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_decay
from optax_decay.decays.adadecay import block_gradient_sigmoid
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.4
EVERYTHING = frozenset(toy.SHAPES)
# The matrices of block i of the toy tree's stack; "mix" is a block of its own.
BLOCKS = [
    [("blocks/attention/kernel", i), ("blocks/up/kernel", i), ("blocks/down/kernel", i)]
    for i in (0, 1)
]


def per_weight(t, n, w, u, weights, gradients):
    return DECAY * reference.weight_sigmoid(gradients[n], 4.0, n in toy.STACKED) * w


@pytest.mark.parametrize("coupled", [True, False])
def test_per_weight_matches_reference(coupled):
    link = lambda: optax_decay.adadecay(DECAY, axes=toy.AXES, mask=("hidden", "head"))
    place = neighbours.before if coupled else neighbours.between
    run = reference.before_adam if coupled else reference.after_adam
    neighbours.agree(
        lambda: place(link()),
        lambda w, g: run(w, g, neighbours.RATES, per_weight, toy.MATRICES),
        extra=None if coupled else lambda params, g: {"gradients": g},
    )


def block_terms(every):
    """The program's decays, renewed at updates every-1, 2*every-1, … counted from 0; λ before the first."""
    factors = {}

    def term(t, n, w, u, weights, gradients):
        if (t + 1) % every == 0:
            for block in BLOCKS:
                factors.update(reference.block_sigmoid(gradients, block, 4.0))
        if (n, 0) not in factors:
            return DECAY * w
        scale = np.array([factors[n, 0], factors[n, 1]]).reshape((2,) + (1,) * (w.ndim - 1))
        return DECAY * scale * w

    return term


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("every", [1, 5])
def test_per_matrix_is_the_programs(every, coupled):
    link = lambda: optax_decay.block_adadecay(DECAY, every, axes=toy.AXES)
    place = neighbours.before if coupled else neighbours.between
    run = reference.before_adam if coupled else reference.after_adam
    want = neighbours.agree(
        lambda: place(link()),
        lambda w, g: run(w, g, neighbours.RATES, block_terms(every), EVERYTHING),
        extra=None if coupled else lambda params, g: {"gradients": g},
        # exp(-4z) amplifies the rounding of norms by up to 4|z| <= 6.
        float32=4 * neighbours.FLOAT32,
    )
    late = run(
        toy.flat_params(),
        toy.flat_gradients(12),
        neighbours.RATES,
        block_terms(every + 1),
        EVERYTHING,
    )
    assert neighbours.moved(want, late) > 1e-4


def test_decay_is_lambda_until_the_first_refresh():
    factor = block_gradient_sigmoid(refresh_every=3)
    tx = optax_decay.decay(DECAY, multiplier=factor, axes=toy.AXES)
    w = toy.params()
    state = tx.init(w)
    seen = []
    for g in toy.gradients(4):
        _, state = tx.update(g, state, w)
        seen.append(np.asarray(state.multipliers[0]["blocks/up/kernel"]))
    np.testing.assert_array_equal(seen[0], 1.0)
    np.testing.assert_array_equal(seen[1], 1.0)
    assert (seen[2] != 1.0).all()
    np.testing.assert_array_equal(seen[3], seen[2])


def test_unstacked_blocks_are_found_by_their_number():
    """The same matrices, stacked or not, get the same strengths; what is no hidden matrix keeps 1."""
    w, g = toy.flat_params(), toy.flat_gradients(1)[0]
    split = lambda tree: {
        **{f"layers/{i}/{n}": tree[n][i] for n in toy.STACKED for i in (0, 1)},
        "head/kernel": tree["head/kernel"],
    }
    axes = [
        (rf"layers/\d/{path}", signature.replace("L | ", ""))
        for path, signature in toy.AXES
        if "|" in signature
    ]
    axes = (*axes, (r"head/kernel", "D -> V"))
    one = optax_decay.decay(DECAY, multiplier=block_gradient_sigmoid(1), axes=toy.AXES)
    two = optax_decay.decay(DECAY, multiplier=block_gradient_sigmoid(1), axes=axes)
    cast = lambda flat: toy.nest({n: jnp.asarray(x, jnp.float32) for n, x in flat.items()})
    stacked = one.update(cast(g), one.init(cast(w)), cast(w))[1].multipliers[0]
    loose = two.update(cast(split(g)), two.init(cast(split(w))), cast(split(w)))[1].multipliers[0]
    for n in toy.STACKED:
        for i in (0, 1):
            np.testing.assert_allclose(loose[f"layers/{i}/{n}"], stacked[n][i], rtol=1e-5)
    assert float(stacked["head/kernel"]) == float(loose["head/kernel"]) == 1.0
    assert float(stacked["mix/kernel"]) == 1.0  # alone in its block: z = 0
    assert abs(float(stacked["blocks/up/kernel"][0]) - 1.0) > 0.1


def test_mean_strength_is_near_lambda_and_equal_gradients_give_it_exactly():
    w = {"w": jnp.ones((20, 30))}
    g = {"w": jax.random.normal(jax.random.key(0), (20, 30))}
    tx = optax_decay.adadecay(1.0)
    factor = tx.update(g, tx.init(w), w)[0]["w"] - g["w"]
    assert 0 < factor.min() < 0.3 and 1.5 < factor.max() <= 2.0
    assert 0.8 < factor.mean() < 1.2
    flat = {"w": jnp.full((20, 30), 0.3)}
    np.testing.assert_allclose(tx.update(flat, tx.init(w), w)[0]["w"] - 0.3, 1.0, rtol=1e-6)


def test_gradients_that_are_not_finite_leave_the_base_decay():
    w, g = toy.params(), toy.gradients(1)[0]
    g["blocks"]["up"]["kernel"] = g["blocks"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    tx = optax_decay.decay(DECAY, multiplier=block_gradient_sigmoid(1), axes=toy.AXES)
    factors = tx.update(g, tx.init(w), w)[1].multipliers[0]
    for n in ("blocks/up/kernel", "blocks/down/kernel"):
        assert float(factors[n][1]) == 1.0 != float(factors[n][0])


def test_split_gradients_in_shard_map():
    w = {"w": jnp.ones((8, 2))}
    g = {"w": jnp.arange(16.0).reshape(8, 2)}
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"w": jax.P("fsdp")}
    tx = optax_decay.adadecay(0.5, axis_name="fsdp")
    step = lambda w, g: tx.update(g, tx.init(w), w)[0]
    got = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, g)
    whole = optax_decay.adadecay(0.5)
    want = whole.update(g, whole.init(w), w)[0]
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
    blocks = optax_decay.block_adadecay(0.5, 1)
    step = lambda w, g: blocks.update(g, blocks.init(w), w)[0]
    with pytest.raises(ValueError, match=r"whole gradients inside shard_map.*\['fsdp'\]"):
        jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, g)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optax_decay.adadecay(0.1, 0.0), r"sharpness=0.0 .*above 0"),
        (
            lambda: optax_decay.block_adadecay(0.1, 0),
            r"refresh_every=0 .*nearest allowed value is 1",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
