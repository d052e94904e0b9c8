"""One optimizer per role: who gets what, what is refused, and that every entry acts as it does alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import by_role, role_table
from tests.support import toy

ADAM, SGD = optax.adam(0.01), optax.sgd(0.1)


def entries(tx=ADAM, **changes):
    return {"hidden": tx, "head": tx, "embedding": tx, "vector": tx, **changes}


def test_every_entry_acts_as_alone():
    """Also with a schedule, which every entry counts once per step."""
    schedule = optax.linear_schedule(0.1, 0.0, 8)
    make = {
        "hidden": lambda: optax_decay.muon(schedule, mask="hidden", axes=toy.AXES),
        "head": lambda: optax.adamw(schedule, weight_decay=0.3),
        ("embedding", "vector"): lambda: optax.adam(0.02),
    }
    together = by_role({key: f() for key, f in make.items()}, axes=toy.AXES)
    got = toy.unnest(toy.train(together, toy.params(), toy.gradients(6))[0])
    signatures = optax_decay.axes.signatures(toy.AXES, toy.params())
    for key, f in make.items():
        alone = toy.unnest(toy.train(f(), toy.params(), toy.gradients(6))[0])
        for path, signature in signatures.items():
            if signature.role in key:
                np.testing.assert_allclose(got[path], alone[path], rtol=1e-5, atol=1e-6)


def test_frozen_parameters_stay_and_have_no_state():
    tx = by_role(entries(head=None), axes=toy.AXES)
    got, state = toy.train(tx, toy.params(), toy.gradients(3))
    for path, w in toy.unnest(got).items():
        same = np.array_equal(w, np.asarray(toy.flat_params()[path], np.float32))
        assert same == (path == "head/kernel")
    assert not jax.tree.leaves(state.inner_states["head"])


def test_rules_come_before_roles():
    rules = ((r"mix/kernel", "special"), (r"blocks/norm/scale", "hidden"))
    transforms = {**entries(), "special": SGD}
    table = role_table(toy.params(), transforms, axes=toy.AXES, rules=rules)
    chosen = {row.path: (row.entry, row.rule) for row in table.rows}
    assert chosen["mix/kernel"] == ("special", "mix/kernel")
    assert chosen["blocks/norm/scale"] == ("hidden", "blocks/norm/scale")
    assert chosen["blocks/up/kernel"] == ("hidden", "")
    assert chosen["bias"] == ("vector", "")
    tx = by_role(transforms, axes=toy.AXES, rules=rules)
    g = toy.gradients(1)[0]
    updates, _ = tx.update(g, tx.init(toy.params()), toy.params())
    np.testing.assert_allclose(updates["mix"]["kernel"], -0.1 * g["mix"]["kernel"], rtol=1e-6)


def test_marin_5639_substring_mask():
    """A mask for `attn_gate` caught `attn_gated_norm` too, whose matrices then trained with Adam."""
    params = {
        "blocks": {
            "attn_gate": jnp.ones((2, 8, 4)),
            "attn_gated_norm": {"w_up": jnp.ones((2, 4, 8)), "w_down": jnp.ones((2, 8, 4))},
            "norm": {"weight": jnp.ones((2, 8))},
        }
    }
    axes = (
        (r"attn_gate", "L | D -> H"),
        (r"w_up", "L | R -> D"),
        (r"w_down", "L | D -> R"),
        (r"norm/weight", "L | D"),
    )
    table = role_table(
        params,
        {"hidden": ADAM, ("vector", "gate"): SGD},
        axes=axes,
        rules=((r"attn_gate", "gate"),),
    )
    chosen = {row.path: row.entry for row in table.rows}
    assert chosen == {
        "blocks/attn_gate": "vector+gate",
        "blocks/attn_gated_norm/w_up": "hidden",
        "blocks/attn_gated_norm/w_down": "hidden",
        "blocks/norm/weight": "vector+gate",  # a stacked gain is two-dimensional and no matrix
    }
    text = str(table)
    assert "rule 'attn_gate'" in text and "blocks/attn_gated_norm/w_up" in text


def test_the_division_of_the_hero_run():
    """Marin: Adam by name, AdamH for head and output projections, MuonH for every other matrix, experts too."""
    shapes = {
        "token_embed": ((32, 8), "V -> D"),
        "blocks/router": ((2, 8, 3), "L | D -> X"),
        "blocks/router_bias": ((2, 3), "L | X"),
        "blocks/attn/attn_gate": ((2, 8, 4), "L | D -> H"),
        "blocks/attn/wq": ((2, 8, 8), "L | D -> Q"),
        "blocks/gated_norm/w_up": ((2, 4, 8), "L | R -> D"),
        "blocks/norm/weight": ((2, 8), "L | D"),
        "blocks/experts/up": ((2, 3, 8, 6), "L E | D -> F"),
        "output_proj": ((8, 32), "D -> V"),
    }
    params = toy.nest({path: jnp.ones(shape) for path, (shape, _) in shapes.items()})
    axes = tuple((path, text) for path, (_, text) in shapes.items())
    transforms = {
        ("embedding", "vector", "by_name"): ADAM,
        "head": optax_decay.adam_hyperball(0.01, sphere="head", axes=axes),
        "hidden": optax_decay.muon_hyperball(0.01, axes=axes),
    }
    rules = ((r"router|attn_gate", "by_name"),)
    table = role_table(params, transforms, axes=axes, rules=rules)
    chosen = {row.path: row.entry.split("+")[0] for row in table.rows}
    assert {path for path, entry in chosen.items() if entry == "embedding"} == {
        "token_embed",
        "blocks/router",
        "blocks/router_bias",
        "blocks/attn/attn_gate",
        "blocks/norm/weight",
    }
    assert chosen["output_proj"] == "head" and chosen["blocks/experts/up"] == "hidden"
    tx = by_role(transforms, axes=axes, rules=rules)
    g = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), params)
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        jnp.linalg.norm(new["blocks"]["experts"]["up"], axis=(2, 3)), 48**0.5, rtol=1e-6
    )


def test_the_table_says_rates_decays_and_spheres():
    schedule = optax.linear_schedule(0.02, 0.0, 10)
    axes = (("up", "L E | D -> F"), ("head", "D -> V"), ("norm", "D"), ("embed", "V -> D"))
    shapes = {"up": (2, 3, 4, 6), "head": (4, 9), "norm": (4,), "embed": (9, 4)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    entries = {
        "hidden": optax_decay.muon_hyperball(schedule, per="layer", axes=axes),
        "head": optax_decay.normuon(1e-3, weight_decay=0.3, axes=axes),
        "vector": optax.inject_hyperparams(optax.adamw)(learning_rate=2e-3),
        "embedding": optax.chain(
            optax.scale_by_adam(), optax_decay.huber_decay(0.2), optax.scale(-0.1)
        ),
    }
    table = role_table(params, entries, axes=axes, step=5)
    rows = {row.path: row for row in table.rows}
    seen = {p: (r.optimizer, r.learning_rate, r.weight_decay, r.sphere) for p, r in rows.items()}
    assert seen["up"] == ("muon", pytest.approx(0.01), 0, "layer E D F")
    assert seen["head"] == ("adam", 1e-3, pytest.approx(0.3), "")  # not a hidden matrix
    assert seen["norm"] == ("adam", pytest.approx(2e-3), None, "")
    assert seen["embed"] == ("adam", None, pytest.approx(0.2), "")
    line = next(line for line in str(table).splitlines() if line.startswith("norm"))
    assert line.split() == ["norm", "4", "vector", "vector", "adam", "0.002", "?", "role"]
    injected = optax.inject_hyperparams(optax_decay.muon, static_args=("axes",))
    own = {**entries, "hidden": injected(learning_rate=3e-3, axes=axes)}
    row = {r.path: r for r in role_table(params, own, axes=axes).rows}["up"]
    assert (row.optimizer, row.learning_rate, row.sphere) == ("muon", pytest.approx(3e-3), "")
    frozen = role_table(params, {**entries, "head": None}, axes=axes)
    assert "head (frozen)" in str(frozen) and frozen.step == 0


def test_extra_arguments_reach_every_entry():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra["value"])
        return updates, state

    link = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = by_role(entries(link), axes=toy.AXES)
    tx.update(toy.gradients(1)[0], tx.init(toy.params()), toy.params(), value=3.0)
    assert seen == [3.0] * 4


def test_names_of_the_state_do_not_depend_on_leaves():
    tx = by_role(entries(), axes=None)
    few = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="no parameter belongs to the entry"):
        tx.init(few)
    tx = by_role({"hidden": ADAM, "vector": ADAM})
    more = {**few, "v": jnp.ones((3, 2))}
    assert set(tx.init(few).inner_states) == set(tx.init(more).inner_states) == {"hidden", "vector"}


@pytest.mark.parametrize(
    ("transforms", "rules", "message"),
    [
        (entries(hiden=ADAM), (), r"'hiden' is neither a role .*did you mean 'hidden'"),
        ({**entries(), ("head", "x"): ADAM}, (), r"'head' stands in two entries"),
        (entries(), (("bias", "baises"),), r"'bias' sends parameters to 'baises'"),
        (
            entries(),
            (("bia", "vector"),),
            r"'bia' matches no parameter; the nearest path is 'bias'",
        ),
        (
            entries(),
            ((".*", "head"), ("bias", "vector")),
            r"'bias' matches no parameter that an earlier rule leaves over",
        ),
        (
            {"hidden": ADAM, "head": ADAM, "embedding": ADAM},
            (),
            r"has the role 'vector', for which",
        ),
        (entries(), ((".*", "vector"),), r"no parameter belongs to the entry 'embedding'"),
    ],
)
def test_nothing_is_missed_silently(transforms, rules, message):
    for call in (
        lambda: by_role(transforms, axes=toy.AXES, rules=rules).init(toy.params()),
        lambda: role_table(toy.shapes(), transforms, axes=toy.AXES, rules=rules),
    ):
        with pytest.raises(ValueError, match=message):
            call()
