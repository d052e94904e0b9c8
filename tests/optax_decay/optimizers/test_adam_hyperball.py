"""AdamH and MuonH: what they are made of, and the decays that contradict a sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import adam_hyperball, muon_hyperball, pulls
from tests.support import neighbours, toy

RATE = neighbours.rate


def end(tx):
    return toy.unnest(toy.train(tx, toy.params(), toy.gradients(neighbours.STEPS))[0])


def chain(direction, *decays):
    return optax.chain(
        direction,
        *decays,
        optax.scale_by_learning_rate(RATE),
        optax_decay.hyperball(learning_rate=RATE, axes=toy.AXES),
    )


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_they_are_chains(name):
    """Off the sphere only the head decays."""
    if name == "adam":
        got = end(adam_hyperball(RATE, weight_decay=0.3, axes=toy.AXES))
        direction = optax.scale_by_adam(b2=0.95)
    else:
        got = end(muon_hyperball(RATE, weight_decay=0.3, axes=toy.AXES))
        direction = optax_decay.scale_by_muon(axes=toy.AXES)  # its shape scale cancels
    want = end(chain(direction, optax_decay.decay(0.3, mask="head", axes=toy.AXES)))
    plain = end(chain(direction))
    for path, w in got.items():
        np.testing.assert_allclose(w, want[path], rtol=1e-5, atol=1e-5, err_msg=path)
        assert (np.abs(w - plain[path]).max() > 1e-3) == (path == "head/kernel")
    start = toy.flat_params()
    for path in toy.HIDDEN:
        for w, first in (
            zip(got[path], start[path]) if path in toy.STACKED else [(got[path], start[path])]
        ):
            np.testing.assert_allclose(np.linalg.norm(w), np.linalg.norm(first), rtol=1e-6)


def test_the_head_on_the_sphere_does_not_decay():
    both = ("hidden", "head")
    with pytest.raises(ValueError, match=r"head/kernel would decay in proportion .* on the sphere"):
        adam_hyperball(RATE, weight_decay=0.3, sphere=both, axes=toy.AXES).init(toy.params())
    got = end(adam_hyperball(RATE, sphere=both, axes=toy.AXES))
    first = toy.flat_params()["head/kernel"]
    np.testing.assert_allclose(np.linalg.norm(got["head/kernel"]), np.linalg.norm(first), rtol=1e-6)


@pytest.mark.parametrize("make", [adam_hyperball, muon_hyperball])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pull": pulls.l2()},
        {"multiplier": optax_decay.multipliers.constant(2.0)},
        {"coupling": optax_decay.couplings.corrected(0.05, 0.05)},
        {"coupling": optax_decay.couplings.independent()},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_radial_decay_of_the_sphere_is_refused(make, options):
    for mask in (None, "hidden", ((r"mix/kernel", True), (r".*", False))):
        tx = make(0.05, weight_decay=0.1, mask=mask, axes=toy.AXES, **options)
        with pytest.raises(ValueError, match=r"(?s)on the sphere.*fixes the norm and undoes"):
            tx.init(toy.params())


@pytest.mark.parametrize("options", [{"pull": pulls.huber(0.2)}, {"cautious": True}])
def test_a_decay_that_turns_the_direction_is_allowed(options):
    tx = adam_hyperball(RATE, weight_decay=0.5, mask="hidden", axes=toy.AXES, **options)
    got, plain = end(tx), end(adam_hyperball(RATE, axes=toy.AXES))
    for path in toy.HIDDEN:
        assert np.abs(got[path] - plain[path]).max() > 1e-4
        np.testing.assert_allclose(
            np.linalg.norm(got[path]), np.linalg.norm(plain[path]), rtol=1e-6
        )


def test_what_the_error_says_is_true():
    """l2 before the sphere only shortens a direction that is normalised."""
    kernel = {"w": jax.random.normal(jax.random.key(0), (64, 48)) * 0.02}
    u = {"w": jax.random.normal(jax.random.key(1), (64, 48))}

    def step(decay):
        tx = optax.chain(
            optax_decay.decay(decay),
            optax.scale_by_learning_rate(0.01),
            optax_decay.hyperball(learning_rate=0.01),
        )
        return tx.update(u, tx.init(kernel), kernel)[0]["w"]

    a, b = step(0.0), step(1.0)
    cosine = jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    assert np.degrees(np.arccos(min(1.0, float(cosine)))) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: adam_hyperball(0.1, weight_decay=optax_decay.huber_decay(0.1)),  # type: ignore
            r"pass λ as a number or schedule with pull=",
        ),
        (lambda: muon_hyperball(0.1, weight_decay=-0.1), r"weight_decay=-0.1"),
        (lambda: muon_hyperball(0.1, per="expert"), r"per='expert' is not known"),
        (lambda: adam_hyperball(0.1, sphere="hiden"), r"did you mean 'hidden'"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
