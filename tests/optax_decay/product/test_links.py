"""Contradictions between links: what is found, through which wrappers, and by whom."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.product import links

AXES = (("up", "L E | D -> F"), ("head", "D -> V"), ("norm", "D"))
SHAPES = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {"up": (2, 3, 4, 6), "head": (4, 9), "norm": (4,)}.items()
}
RATE = 0.1


def weights():
    return {n: jnp.ones(s.shape) + jnp.arange(s.size).reshape(s.shape) for n, s in SHAPES.items()}


def sphere(**options):
    return optax_decay.hyperball(learning_rate=RATE, axes=AXES, **options)


def brake(**options):
    return optax_decay.radial_brake(axes=AXES, **options)


def decay(*args, **options):
    return optax_decay.decay(0.1, *args, mask="hidden", axes=AXES, **options)


UNDONE = "up would decay in proportion to its weights.*the sphere fixes the norm and undoes that"
BAD = {
    "l2": ((decay(), sphere()), UNDONE),
    "stepped l2": ((optax_decay.proximal_decay(0.1, learning_rate=RATE), sphere()), UNDONE),
    "lp with p = 2": ((optax_decay.lp_decay(0.1, p=2.0), sphere()), UNDONE),
    "padam with p = 2": (
        (optax_decay.lp_proximal_decay(0.1, p=2.0, learning_rate=RATE), sphere()),
        UNDONE,
    ),
    "no l1 in the net": ((optax_decay.elastic_net_decay(0.1, l1_ratio=0.0), sphere()), UNDONE),
    "target": ((optax_decay.target_norm_decay(0.1), sphere()), UNDONE),
    "AWD": ((optax_decay.awd_decay(0.1), sphere()), UNDONE),
    "CPR": ((optax_decay.cpr_decay(axes=AXES), sphere()), UNDONE),
    "times": ((decay(multiplier=optax_decay.multipliers.constant(2.0)), sphere()), UNDONE),
    "rotation": (
        (decay(), optax_decay.rotational_update(RATE, 0.1, 0.9, axes=AXES)),
        "on the sphere of rotational_update",
    ),
    "SODA behind": (
        (sphere(), optax_decay.soda_decay()),
        "up would leave the sphere of hyperball, because toward_initial_decay moves it",
    ),
    "decay behind": ((sphere(), optax_decay.huber_decay(0.1)), "leave the sphere"),
    "relative": ((optax_decay.relative_update(axes=AXES), sphere()), "length hyperball sets"),
    "floor": ((optax_decay.relative_update_floor(axes=AXES), sphere()), "relative_update_floor"),
    "two": ((sphere(), brake()), "norm set by two links, hyperball and radial_brake"),
    "two brakes": ((brake(), brake()), "norm set by two links"),
    "scaled decay": (
        (decay(), optax_decay.relative_update(axes=AXES)),
        "has a decay, decay, in front of relative_update",
    ),
}
GOOD = {
    "bounded": (decay(pull=optax_decay.pulls.huber()), sphere()),
    "gated": (decay(cautious=True), sphere()),
    "gated otherwise": (decay(cautious=optax_decay.gates.strict_agreement()), sphere()),
    "elementwise": (optax_decay.adadecay(0.1, axes=AXES), sphere()),
    "no decay": (optax_decay.decay(0.0), sphere()),
    "of other leaves": (optax_decay.decay(0.1, mask="head", axes=AXES), sphere()),
    "initial weights": (optax_decay.toward_initial_decay(0.1), sphere()),
    "experts share a sphere": (
        decay(multiplier=optax_decay.multipliers.constant(2.0)),
        sphere(per="layer"),
    ),
    "behind the brake": (brake(), decay(coupling=optax_decay.couplings.independent())),
    "floor and brake": (optax_decay.relative_update_floor(axes=AXES), decay(), brake()),
}
WRAPPERS = {
    "chain": lambda tx: tx,
    "named": lambda tx: optax.named_chain(("a", tx), ("b", optax.identity())),
    "masked": lambda tx: optax.masked(tx, {"up": True, "head": False, "norm": False}),
    "skip": optax_decay.skip_on_spike,
    "injected": lambda tx: optax.inject_hyperparams(lambda x: optax.chain(tx, optax.scale(x)))(1.0),
    "multi": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_found(name):
    chain, message = BAD[name]
    tx = optax.chain(*chain)
    found = links.contradictions(links.links_of(tx, SHAPES))
    assert any(re.search(message, text) for text in found), found
    alone = [links.contradictions(links.links_of(link, SHAPES)) for link in chain]
    assert not any(alone)
    roles = {"hidden": tx, ("head", "vector"): optax.sgd(0.1)}
    if name != "of other leaves":
        with pytest.raises(ValueError, match=message):
            optax_decay.by_role(roles, axes=AXES).init(weights())
        with pytest.raises(ValueError, match=message):
            optax_decay.role_table(SHAPES, roles, axes=AXES)
    with pytest.raises(ValueError, match=message):
        optax_decay.decay_table(SHAPES, 0.0, axes=AXES, optimizer=tx)


@pytest.mark.parametrize("name", GOOD)
def test_what_goes_together_is_let_through(name):
    tx = optax.chain(*GOOD[name])
    told = links.links_of(tx, SHAPES)
    assert told and not links.contradictions(told)
    optax_decay.decay_table(SHAPES, 0.0, axes=AXES, optimizer=tx)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_they_are_found_through_wrappers(wrapper):
    tx = WRAPPERS[wrapper](optax.chain(decay(), sphere()))
    (text,) = links.contradictions(links.links_of(tx, SHAPES))
    assert "up would decay in proportion" in text


def test_doubts_are_warnings():
    roles = lambda *chain: {"hidden": optax.chain(*chain), ("head", "vector"): optax.sgd(0.1)}
    half = roles(decay(), optax.scale_by_learning_rate(RATE), brake(inward=0.5))
    with pytest.warns(UserWarning, match="up keeps 0.5 of what decay does to its norm"):
        optax_decay.by_role(half, axes=AXES).init(weights())
    both = roles(decay(), optax.scale_by_learning_rate(RATE), optax_decay.soda_decay())
    with pytest.warns(UserWarning, match="towards its initial weights by .* and towards zero"):
        optax_decay.by_role(both, axes=AXES).init(weights())


def test_the_probe_reports_what_leaves_nothing_to_measure():
    tx = optax.chain(optax.scale_by_adam(), decay(), optax.scale_by_learning_rate(1e-3), sphere())
    table = optax_decay.probe(tx, SHAPES, axes=AXES, raises=False)
    assert "up would decay in proportion" in table.problems[0] and str(table).endswith(".")
    # A decay of another library is not told, but was promised.
    promised = optax_decay.decay_table(SHAPES, 0.1, mask="hidden", axes=AXES, learning_rate=1e-3)
    foreign = optax.chain(optax.adamw(1e-3, weight_decay=0.1), sphere())
    table = optax_decay.probe(foreign, SHAPES, axes=AXES, expected=promised, raises=False)
    assert any("'up' should shrink by 1.0e-04" in text for text in table.problems)
    with pytest.raises(ValueError, match="up would decay, but hyperball fixes its norm"):
        optax_decay.decay_table(SHAPES, 0.1, mask="hidden", axes=AXES, optimizer=foreign)
    with pytest.raises(optax_decay.ProbeError, match="leave the sphere"):
        optax_decay.probe(optax.chain(optax.sgd(RATE), sphere(), optax_decay.soda_decay()), SHAPES)


def test_the_error_is_true_of_a_multiplier_and_a_shared_sphere():
    """A strength that differs between the experts of one sphere changes the direction; of one sphere each, not."""
    u = {"up": jnp.cos(jnp.arange(144.0)).reshape(2, 3, 4, 6)}
    w = {"up": weights()["up"]}

    def direction(per, strength):
        """Of the step along the sphere, normalised, per sphere."""
        scale = jnp.array([[1.0, 2.0, 5.0]] * 2)
        uneven = optax_decay.PerMatrix(
            lambda p, s: (), lambda context, state: ({"up": strength * scale}, state)
        )
        tx = optax.chain(
            optax_decay.decay(1e-4, multiplier=uneven, axes=AXES[:1]),
            optax.scale_by_learning_rate(RATE),
            optax_decay.hyperball(learning_rate=RATE, per=per, axes=AXES[:1]),
        )
        step = np.asarray(tx.update(u, tx.init(w), w)[0]["up"], np.float64)
        within = (2, 3) if per == "matrix" else (1, 2, 3)
        sums = lambda x: np.sum(x, axis=within, keepdims=True)
        x = np.asarray(w["up"], np.float64)
        along = step - sums(step * x) / sums(x * x) * x
        return along / np.sqrt(sums(along * along))

    def turned(per):
        return np.abs(direction(per, 0.0) - direction(per, 1.0)).max()

    assert turned("matrix") < 1e-4 < 10 * 1e-4 < turned("layer")
