"""Width-scaled decay: the laws, the worked example, multipliers by hand, trajectories, order and composition."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import couplings, multipliers, pulls, spectra, thresholds, width
from optax_decay.width import OPTIMIZERS, RULES, Exponents, Growth, WidthLaw, decay_exponent, law
from tests.references import width as reference
from tests.references.decays import huber_pull, slice_size
from tests.support import toy

RATES = [0.03, 0.02, 0.04, 0.01, 0.05]
# Base sizes under which the four hidden matrices have different factors: 8/5, 8/5, 12/3 and, through H, 8/5.
BASE = {"D": 5, "F": 3, "H": 2}
FACTORS = {
    "blocks/attention/kernel": 8 / 5,
    "blocks/up/kernel": 8 / 5,
    "blocks/down/kernel": 12 / 3,
    "mix/kernel": 8 / 5,
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def example(rule):
    axes = ((r"up", "D -> F"), (r"norm", "D"))
    shapes = {
        "norm": jax.ShapeDtypeStruct((reference.EXAMPLE["target"],), jnp.float32),
        "up": jax.ShapeDtypeStruct((reference.EXAMPLE["target"], 8192), jnp.float32),
    }
    table = width.width_table(
        shapes,
        reference.EXAMPLE["learning_rate"],
        reference.EXAMPLE["weight_decay"],
        reference.EXAMPLE["base"],
        law=law(rule),
        axes=axes,
    )
    return {row.path: row for row in table.rows}


@pytest.mark.parametrize("rule", sorted(reference.EXAMPLE_ROWS))
def test_worked_example(rule):
    row = example(rule)["up"]
    rate, decay, shrink, top = reference.EXAMPLE_ROWS[rule]
    got = (row.learning_rate, row.weight_decay, row.shrink, row.steps, row.top_singular_value)
    np.testing.assert_allclose(got, (rate, decay, shrink, 1 / shrink, top), rtol=1e-12)
    vector = example(rule)["norm"]
    assert vector.learning_rate == 3e-3
    assert vector.weight_decay == (0.1 if rule == "mup_package" else 0)


@pytest.mark.parametrize("rule", sorted(reference.EXAMPLE_PRINTED))
def test_worked_example_to_the_printed_digit(rule):
    row = example(rule)["up"]
    rate, decay, shrink, steps, top = reference.EXAMPLE_PRINTED[rule]
    assert f"{row.learning_rate:.3g}" == rate
    assert f"{row.weight_decay:.5g}" == decay
    assert f"{row.shrink:.5g}" == shrink
    assert f"{row.steps:.0f}" == steps
    assert f"{row.top_singular_value:.2f}" == top


def test_worked_example_at_the_base_is_adamw():
    axes = ((r"up", "D -> F"),)
    shapes = {"up": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    for rule in RULES:
        (row,) = width.width_table(shapes, 3e-3, 0.1, 256, law=law(rule), axes=axes).rows
        got = (row.learning_rate, row.weight_decay, row.shrink, row.top_singular_value)
        np.testing.assert_allclose(got, (3e-3, 0.1, 3e-4, 1.0), rtol=1e-12)


def test_general_law():
    """η/λ ∝ d^(-2a): what each rule says of a is what its decay exponent inverts to."""
    assert [decay_exponent(a) for a in (0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0]
    assert decay_exponent(0.6, 0.25) == pytest.approx(0.95, rel=1e-12)
    for a, r in ((0.62, 1.0), (0.4, 0.3)):
        found = law("fan2025", optimizer=Growth(r, a)).hidden
        for m in (2.0, 7.5):
            # σ_max ∝ sqrt(η_i/λ_i)·m^a does not change
            assert math.sqrt(m**-found.rate / m**found.decay) * m**a == pytest.approx(1, rel=1e-12)


def test_table_of_laws():
    exponents = {
        (rule, optimizer): (found.rate, found.decay)
        for rule in RULES
        for optimizer in OPTIMIZERS
        for found in [law(rule, optimizer=optimizer).hidden]
    }
    assert exponents["fan2025", "adam"] == exponents["fan2025", "lion"] == (1.0, 0.5)
    assert exponents["fan2025", "conda"] == exponents["fan2025", "root"] == (0.5, 0.5)
    assert exponents["fan2025", "muon"] == (0.0, 0.0)
    assert exponents["qiu2025", "adam"] == (1.0, 0.0)
    assert exponents["qiu2025", "muon"] == (0.0, -1.0)
    for optimizer, (rate, _) in OPTIMIZERS.items():
        # Shrink per step ∝ m^(s-r): unchanged, ∝ m^-r, ∝ 1/m.
        for rule, shrink in (
            ("mup_package", 0.0),
            ("timescale", 0.0),
            ("constant", -rate),
            ("qiu2025", -1.0),
        ):
            r, s = exponents[rule, optimizer]
            assert s - r == pytest.approx(shrink, abs=1e-15)
    assert law("fan2025", exponent=0.7).hidden.decay == 0.7
    own = law("constant", optimizer=Growth(0.5, 0.7), exponent=0.3)
    assert own == WidthLaw(Exponents(0.5, 0.3, 0.7))
    # Matrix optimizers leave a head that counts as a matrix to Adam, and the exponent counts for both.
    assert law(optimizer="conda", head="matrix").head == Exponents(1.0, 0.5, 0.75)
    assert law(head="matrix", exponent=0.3).head == Exponents(1.0, 0.3, 0.75)
    assert law().head is None
    assert [law(rule).vectors for rule in RULES] == [float(r == "mup_package") for r in RULES]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_noise_builds_the_spectrum_that_the_laws_assume(optimizer):
    """Random walks with decay: σ_max ∝ sqrt(η/λ)·d^a with a = ½ for size-one entries and 0 for orthogonal factors.

    ηλ = 0.05 and 150 steps leave (1-0.05)^150 = 5e-4 of the start, and Gaussian matrices. Their largest singular
    value is 2·sqrt(d)·(1 - 0.38·d^(-2/3)) with a relative deviation of 0.40·d^(-2/3) (Tracy-Widom): between d = 24 and
    96 the finite size adds 0.020 to a, and 12 and 4 draws give it a deviation of 0.012. Tolerance: three of them.
    """
    eta, lam = 0.1, 0.5
    rng = np.random.default_rng(3)
    tops = {}
    for d, draws in ((24, 12), (96, 4)):
        found = []
        for _ in range(draws):
            w = np.zeros((d, d))
            for _ in range(150):
                u = rng.standard_normal((d, d))
                if optimizer == "muon":
                    q, triangle = np.linalg.qr(u)
                    u = q * np.sign(np.diag(triangle))  # evenly distributed, with mean zero
                w = w - eta * (u + lam * w)
            found.append(np.linalg.norm(w, 2) / math.sqrt(eta / lam))
        tops[d] = np.mean(found)
    a = math.log(tops[96] / tops[24]) / math.log(96 / 24)
    assert a == pytest.approx({"adam": 0.520, "muon": 0.020}[optimizer], abs=0.036)


def test_timescale():
    assert width.timescale_weight_decay(0.02, steps=400) == pytest.approx(0.125, rel=1e-12)
    by_epochs = width.timescale_weight_decay(0.02, epochs=2.5, steps_per_epoch=160)
    assert by_epochs == pytest.approx(0.125, rel=1e-12)
    shapes = {"up": jax.ShapeDtypeStruct((48, 100), jnp.float32)}
    lam = width.timescale_weight_decay(0.02, steps=400)
    table = width.width_table(
        shapes, 0.02, lam, 16, law=law("timescale"), axes=((r"up", "D -> F"),)
    )
    (row,) = table.rows
    assert row.steps == pytest.approx(400, rel=1e-12)
    assert row.learning_rate == pytest.approx(0.02 / 3, rel=1e-12)
    for arguments in ({}, {"steps": 3, "epochs": 2}, {"epochs": 2}, {"steps": -1.0}):
        with pytest.raises(ValueError, match=r"steps|epochs"):
            width.timescale_weight_decay(0.02, **arguments)


def test_multiplier_trees_by_letter():
    params = jax.eval_shape(toy.params)
    rates = toy.unnest(
        width.learning_rate_multipliers(params, reference.TOY_LETTERS, axes=toy.AXES)
    )
    decays = toy.unnest(width.decay_multipliers(params, reference.TOY_LETTERS, axes=toy.AXES))
    for path in toy.SHAPES:
        m = reference.TOY_FACTORS.get(path)
        assert rates[path] == pytest.approx(1.0 if m is None else 1 / m, rel=1e-12)
        assert decays[path] == pytest.approx(0.0 if m is None else math.sqrt(m), rel=1e-12)
    applied = width.decay_multipliers(
        params, reference.TOY_LETTERS, axes=toy.AXES, rates_applied=True
    )
    for path, m in reference.TOY_FACTORS.items():
        assert toy.unnest(applied)[path] == pytest.approx(m**-0.5, rel=1e-12)


def test_three_forms_of_the_base_agree():
    """Sizes by letter, a tree of shapes with fewer layers, and (where all widths grow together) one number."""
    params = jax.eval_shape(toy.params)
    small = {"D": 4, "H": 2, "E": 4, "F": 6, "G": 12, "V": 10, "L": 1}
    shapes = toy.nest(
        {
            path: jax.ShapeDtypeStruct(tuple(small[n] for n in names), jnp.float32)
            for path, names in {
                "embed/embedding": "VD",
                "blocks/attention/kernel": "LDHE",
                "blocks/up/kernel": "LDF",
                "blocks/down/kernel": "LFD",
                "blocks/norm/scale": "LD",
                "mix/kernel": "DG",
                "bias": "D",
                "head/kernel": "DV",
            }.items()
        }
    )
    letters = {name: small[name] for name in "DHFG"}
    found = [
        width.decay_multipliers(params, base, law=law(exponent=0.8), axes=toy.AXES)
        for base in (4, letters, shapes)
    ]
    assert toy.unnest(found[0])["blocks/down/kernel"] == pytest.approx(2**0.8, rel=1e-12)
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-12)
    chex.assert_trees_all_close(found[0], found[2], rtol=1e-12)


def test_muon_dimension_numbers_with_base_shapes():
    spec = optax.contrib.MuonDimensionNumbers
    axes = {"query": spec(1, (2, 3)), "norm": None}
    params = {"query": jnp.zeros((2, 12, 3, 4)), "norm": jnp.zeros((2, 12))}
    base = {"query": jnp.zeros((2, 5, 2, 4)), "norm": jnp.zeros((2, 5))}
    got = width.decay_multipliers(params, base, axes=axes)
    assert got["query"] == pytest.approx(math.sqrt(12 / 5), rel=1e-12)
    assert got["norm"] == 0


def test_head_as_matrix():
    params = jax.eval_shape(toy.params)

    def of_head(**options):
        decays = width.decay_multipliers(params, 2, axes=toy.AXES, law=law(**options))
        rates = width.learning_rate_multipliers(params, 2, axes=toy.AXES, law=law(**options))
        return toy.unnest(rates)["head/kernel"], toy.unnest(decays)["head/kernel"]

    assert of_head() == (1.0, 0.0)
    assert of_head(head="matrix") == (0.25, 2.0)
    # Matrix optimizers leave the head to Adam, and so does its law.
    assert of_head(head="matrix", optimizer="muon") == (0.25, 2.0)
    assert of_head(rule="mup_package") == (1.0, 1.0)


LAW = law()


def chain_by_order(order, own=LAW, rates_applied=True):
    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(schedule)
    base = BASE | {"G": 24}
    rates = optax_decay.width_scaled_learning_rate(base, law=own, axes=toy.AXES)
    if order == "rates, decay":
        power = multipliers.width_power(base, own, rates_applied=rates_applied)
        decay = optax_decay.decay(0.3, multiplier=power, axes=toy.AXES)
    else:
        coupling = {
            "decay, rates": couplings.learning_rate(),
            "rates, rate, decay": couplings.independent(),
        }[order]
        decay = optax_decay.width_scaled_decay(0.3, base, law=own, axes=toy.AXES, coupling=coupling)
    links = {"decay": decay, "rates": rates, "rate": rate}
    names = order.split(", ")
    return optax.chain(adam, *(links[n] for n in names), *([] if "rate" in names else [rate]))


def schedule(count):
    return jnp.asarray(RATES)[count]


@pytest.mark.parametrize("order", ["decay, rates", "rates, decay"])
@pytest.mark.parametrize(("rule", "s"), [("fan2025", 0.5), ("constant", 0.0), ("timescale", 1.0)])
def test_trajectory_in_either_order(x64, order, rule, s):
    """One count of the learning rate's multiplier, whichever link stands first."""
    tx = chain_by_order(order, law(rule))
    got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(5, jnp.float64))
    want = reference.trajectory(
        toy.flat_params(),
        toy.flat_gradients(5),
        rates=RATES,
        weight_decay=0.3,
        factors=FACTORS,
        r=1.0,
        s=s,
    )
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, want[path], rtol=1e-12, atol=1e-13)


def test_counting_twice_would_show(x64):
    """The wrong order differs from the right one, so the test above can fail."""
    wrong = chain_by_order("rates, decay", rates_applied=False)
    right = chain_by_order("rates, decay")
    a, _ = toy.train(wrong, toy.params(jnp.float64), toy.gradients(5, jnp.float64))
    b, _ = toy.train(right, toy.params(jnp.float64), toy.gradients(5, jnp.float64))
    moved = np.abs(toy.unnest(a)["blocks/down/kernel"] - toy.unnest(b)["blocks/down/kernel"])
    assert moved.max() > 1e-2


def test_independent_decay(x64):
    """Coupling independent: λ̄ m^(s-r), i.e. m^-½ for the default rule, whatever the learning rate does."""
    got, _ = toy.train(
        chain_by_order("rates, rate, decay"),
        toy.params(jnp.float64),
        toy.gradients(1, jnp.float64),
    )
    plain, _ = toy.train(
        optax.chain(
            optax.scale_by_adam(),
            optax_decay.width_scaled_learning_rate(BASE | {"G": 24}, axes=toy.AXES),
            optax.scale_by_learning_rate(schedule),
        ),
        toy.params(jnp.float64),
        toy.gradients(1, jnp.float64),
    )
    before, got, plain = toy.flat_params(), toy.unnest(got), toy.unnest(plain)
    for path, w in before.items():
        shrink = 0.3 * FACTORS[path] ** -0.5 if path in FACTORS else 0.0
        np.testing.assert_allclose(plain[path] - got[path], shrink * w, rtol=1e-11, atol=1e-13)


def test_multiplier_trees_with_a_learning_rate_tree_of_ones_own(x64):
    """Training code that keeps η and λ per parameter gets the same run from the two trees."""
    base = BASE | {"G": 24}
    params = toy.params(jnp.float64)
    etas = width.learning_rate_multipliers(params, base, axes=toy.AXES)
    lambdas = width.decay_multipliers(params, base, axes=toy.AXES)
    adam = optax.scale_by_adam()
    weights, state = params, adam.init(params)
    for g, eta in zip(toy.gradients(5, jnp.float64), RATES):
        u, state = adam.update(g, state, weights)
        weights = jax.tree.map(
            lambda w, u, e, k, eta=eta: w - eta * e * (u + 0.3 * k * w), weights, u, etas, lambdas
        )
    got, _ = toy.train(chain_by_order("decay, rates"), params, toy.gradients(5, jnp.float64))
    chex.assert_trees_all_close(got, weights, rtol=1e-12, atol=1e-13)


def test_mup_adamw_is_the_chain(x64):
    base = BASE | {"G": 24}
    whole = optax_decay.mup_adamw(
        schedule, base, b2=0.95, weight_decay=0.3, law=law(exponent=0.8), axes=toy.AXES
    )
    link = optax_decay.width_scaling(0.3, base, law=law(exponent=0.8), axes=toy.AXES)
    parts = optax.chain(optax.scale_by_adam(b2=0.95), link, optax.scale_by_learning_rate(schedule))
    want = reference.trajectory(
        toy.flat_params(),
        toy.flat_gradients(5),
        rates=RATES,
        weight_decay=0.3,
        factors=FACTORS,
        r=1.0,
        s=0.8,
        b2=0.95,
    )
    for tx in (whole, parts):
        got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(5, jnp.float64))
        for path, w in toy.unnest(got).items():
            np.testing.assert_allclose(w, want[path], rtol=1e-12, atol=1e-13)


def coupling_of(name, eta):
    """The coupling of that name, for a constant learning rate."""
    return {
        "learning_rate": couplings.learning_rate(),
        "schedule": couplings.schedule(eta),
        "corrected": couplings.corrected(eta),
        "independent": couplings.independent(),
    }[name]


@pytest.mark.parametrize("coupling", couplings.NAMES)
def test_mup_adamw_couplings(x64, coupling):
    """At the peak rate, λ converted between couplings gives one run."""
    eta, base = 0.02, BASE | {"G": 24}
    lam = optax_decay.convert_weight_decay(0.3, "learning_rate", coupling, peak_learning_rate=eta)
    got, _ = toy.train(
        optax_decay.mup_adamw(
            eta, base, weight_decay=lam, axes=toy.AXES, coupling=coupling_of(coupling, eta)
        ),
        toy.params(jnp.float64),
        toy.gradients(4, jnp.float64),
    )
    want = reference.trajectory(
        toy.flat_params(),
        toy.flat_gradients(4),
        rates=[eta] * 4,
        weight_decay=0.3,
        factors=FACTORS,
        r=1.0,
        s=0.5,
    )
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, want[path], rtol=1e-11, atol=1e-12)


def test_at_the_base_width_it_is_adamw(x64):
    mask = toy.nest({path: path in toy.HIDDEN for path in toy.SHAPES})
    wide = optax_decay.mup_adamw(0.03, 4, weight_decay=0.3, axes=toy.AXES)
    base = optax_decay.mup_adamw(0.03, 8, weight_decay=0.3, axes=toy.AXES)
    adamw = optax.adamw(0.03, weight_decay=0.3, mask=mask)
    a, b, c = (
        toy.train(tx, toy.params(jnp.float64), toy.gradients(4, jnp.float64))[0]
        for tx in (wide, base, adamw)
    )
    chex.assert_trees_all_close(b, c, rtol=1e-13, atol=1e-14)
    assert np.abs(toy.unnest(a)["mix/kernel"] - toy.unnest(c)["mix/kernel"]).max() > 1e-2


def test_huber_with_a_relative_threshold_times_width(x64):
    """Huber pull × width in one call, against an independent trajectory; δ is per slice of a stacked leaf."""

    def pull(w, name):
        return huber_pull(w, 0.7 * slice_size("mean", w, name in toy.STACKED))

    got, _ = toy.train(
        optax_decay.mup_adamw(
            schedule,
            BASE | {"G": 24},
            weight_decay=0.3,
            pull=pulls.huber(thresholds.mean_size(0.7)),
            axes=toy.AXES,
        ),
        toy.params(jnp.float64),
        toy.gradients(5, jnp.float64),
    )
    want = reference.trajectory(
        toy.flat_params(),
        toy.flat_gradients(5),
        rates=RATES,
        weight_decay=0.3,
        factors=FACTORS,
        r=1.0,
        s=0.5,
        pull=pull,
    )
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, want[path], rtol=1e-12, atol=1e-13)


def test_width_power_multiplies_into_any_decay():
    """width × another multiplier × Huber, through `huber_decay`; the metrics show the product."""
    tx = optax_decay.huber_decay(
        0.2,
        0.4,
        axes=toy.AXES,
        multiplier=(
            multipliers.width_power(BASE | {"G": 24}, law(exponent=0.7)._replace(vectors=0.25)),
            multipliers.constant(3.0),
        ),
        metrics=True,
    )
    params, g = toy.params(), toy.gradients(1)[0]
    _, state = tx.update(g, tx.init(params), params)
    for path in toy.SHAPES:
        m = FACTORS.get(path)
        want = 0.2 * 3 * (0.25 if m is None else m**0.7)
        np.testing.assert_allclose(state.metrics[path].rate, want, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["conda", "muon"])
def test_own_law_of_a_matrix_optimizer(x64, optimizer):
    """`width_scaling` in the place of the decay, with the exponents of that optimizer, on sign updates."""
    r, s = {"conda": (0.5, 0.5), "muon": (0.0, 0.0)}[optimizer]
    base = BASE | {"G": 24}
    tx = optax.chain(
        optax_decay.width_scaling(0.3, base, law=law(optimizer=optimizer), axes=toy.AXES),
        optax.scale_by_learning_rate(0.1),
    )
    got, _ = toy.train(tx, toy.params(jnp.float64), toy.gradients(1, jnp.float64))
    w, g = toy.flat_params()["blocks/down/kernel"], toy.flat_gradients(1)[0]["blocks/down/kernel"]
    want = w - 0.1 * 4.0**-r * (g + 0.3 * 4.0**s * w)
    np.testing.assert_allclose(toy.unnest(got)["blocks/down/kernel"], want, rtol=1e-13, atol=1e-14)


def test_low_precision_updates_see_the_exact_multiplier():
    """bfloat16 updates are multiplied in float32: 1/3 itself has no bfloat16, which would double the error."""
    axes = ((r"up", "D -> F"),)
    u = {"up": jnp.linspace(0.5, 3.0, 6 * 4, dtype=jnp.bfloat16).reshape(6, 4)}
    tx = optax_decay.width_scaled_learning_rate(2, axes=axes)
    got, _ = tx.update(u, tx.init(u), u)
    want = (np.asarray(u["up"], np.float32) / np.float32(3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got["up"]), want)
    rounded = u["up"] * jnp.bfloat16(1 / 3)
    assert np.any(np.asarray(rounded) != want)


def test_masked_parts_of_a_tree():
    """A part of the tree under optax.masked has the multipliers of the whole."""
    params, g = toy.params(), toy.gradients(1)[0]
    chosen = toy.nest({path: path.startswith("blocks/down") for path in toy.SHAPES})
    base = {"D": 5, "F": 3, "H": 2, "G": 24}
    link = optax_decay.width_scaling(0.3, base, axes=toy.AXES)
    part = optax.masked(link, chosen)
    whole, _ = link.update(g, link.init(params), params)
    some, _ = part.update(g, part.init(params), params)
    whole, some, before = toy.unnest(whole), toy.unnest(some), toy.unnest(g)
    np.testing.assert_array_equal(some["blocks/down/kernel"], whole["blocks/down/kernel"])
    np.testing.assert_array_equal(some["mix/kernel"], before["mix/kernel"])
    assert np.any(whole["mix/kernel"] != before["mix/kernel"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base_width": 0}, "base_width=0.*above 0"),
        ({"base_width": "D"}, "neither a width"),
        ({"base_width": None}, "neither a width"),
        ({"base_width": {"D": 4, "N": 3}}, "'N', which no signature has"),
        ({"base_width": {"D": -4}}, r"base_width\['D'\]=-4"),
        ({"base_width": 4, "law": "fan2025"}, r"width.law\('fan2025'\)"),
        ({"base_width": 4, "law": "fan2024"}, "did you mean 'fan2025'"),
        ({"base_width": 4, "law": 0.5}, "law=0.5 is not a WidthLaw"),
        ({"base_width": 4, "weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"base_width": 4, "coupling": "corrected"}, r"did you mean .*couplings.corrected\(\)"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, words):
    with pytest.raises(ValueError, match=words):
        optax_decay.width_scaled_decay(axes=toy.AXES, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "fan2024"}, "did you mean 'fan2025'"),
        ({"optimizer": "muons"}, "did you mean 'muon'"),
        ({"head": "matrices"}, "did you mean 'matrix'"),
        ({"exponent": float("nan")}, "exponent=nan"),
    ],
)
def test_bad_laws_raise_at_construction(arguments, words):
    with pytest.raises(ValueError, match=words):
        law(**arguments)


def test_only_the_order_of_the_chain_decides_what_the_rates_multiply():
    """The coupling says where a decay stands; there is no second argument that could contradict it."""
    for factory in (optax_decay.width_scaled_decay, optax_decay.width_scaling):
        with pytest.raises(TypeError, match="rates_applied"):
            factory(0.1, 4, axes=toy.AXES, rates_applied=True)


def test_inject_hyperparams_takes_the_public_factories():
    params, g = toy.params(), toy.gradients(1)[0]
    own = law(optimizer="conda")
    for factory in (optax_decay.width_scaled_decay, optax_decay.width_scaling):
        injected = optax.inject_hyperparams(factory, static_args="base_width")(
            0.3, 4, law=own, axes=toy.AXES
        )
        state = injected.init(params)
        assert set(state.hyperparams) == {"weight_decay"}
        plain = factory(0.3, 4, law=own, axes=toy.AXES)
        got, _ = injected.update(g, state, params)
        want, _ = plain.update(g, plain.init(params), params)
        chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "axes", "words"),
    [
        (4, None, "with axes=..."),
        ({"D": 4, "H": 2}, toy.AXES, "no size for an input axis of 'blocks/down/kernel'"),
        ({"blocks": {"up": {"kernel": jnp.zeros((2, 4, 6))}}}, toy.AXES, "nearest path"),
    ],
)
def test_unknown_sizes_raise_at_init(base, axes, words):
    tx = optax_decay.width_scaling(0.1, base, axes=axes)
    with pytest.raises(ValueError, match=words):
        tx.init(toy.params())


def test_one_number_without_the_letter_raises():
    tx = optax_decay.width_scaling(0.1, 4, axes=(("up", "N -> M"),))
    with pytest.raises(ValueError, match="axis 'D', which no parameter here has"):
        tx.init({"up": jnp.zeros((4, 6))})


def test_one_number_for_two_widths_raises():
    axes = ((r"encoder/up", "D -> F"), (r"decoder/up", "D -> F"))
    params = {"encoder": {"up": jnp.zeros((4, 6))}, "decoder": {"up": jnp.zeros((8, 6))}}
    with pytest.raises(
        ValueError, match=r"'D' has size 8 in 'decoder/up'.* size 4 in 'encoder/up'"
    ):
        width.decay_multipliers(params, 4, axes=axes)


def test_width_scaling_refuses_the_coupling_that_needs_another_order():
    with pytest.raises(
        ValueError, match=r"width_scaled_decay\(coupling=couplings.independent\(\)\)"
    ):
        optax_decay.width_scaling(0.1, 4, axes=toy.AXES, coupling=couplings.independent())


def test_table_respects_mask_and_coupling():
    params = jax.eval_shape(toy.params)
    rows = {}
    for coupling in couplings.NAMES:
        lam = optax_decay.convert_weight_decay(
            0.3, "learning_rate", coupling, peak_learning_rate=0.02
        )
        table = width.width_table(
            params,
            0.02,
            lam,
            2,
            axes=toy.AXES,
            coupling=coupling_of(coupling, 0.02),
            mask=(("mix/.*", 0.5), (".*", 1)),
        )
        rows[coupling] = {row.path: row for row in table.rows}
        assert "×4" in str(table)
    for found in rows.values():
        assert found["mix/kernel"].shrink == pytest.approx(0.5 * 0.3 * 0.02 * 4**-0.5, rel=1e-12)
        assert found["blocks/up/kernel"].shrink == pytest.approx(0.3 * 0.02 * 4**-0.5, rel=1e-12)
        assert found["bias"].steps == math.inf


def test_spectral_times_huber_times_width():
    """AlphaDecay × Huber × width in one call: the rate is the product, once the spectra are measured."""
    params = toy.params()
    alpha = {
        "refresh": spectra.all_at_once(1),
        "select": spectra.hidden_matrices(min_eigenvalues=2),
        "score": spectra.frobenius_norm(),
    }

    def rates(others):
        tx = optax_decay.huber_decay(
            0.2,
            thresholds.rms_size(),
            axes=toy.AXES,
            mask="hidden",
            multiplier=(multipliers.spectral_alpha(**alpha), *others),
            metrics=True,
        )
        state = tx.init(params)
        for g in toy.gradients(2):
            _, state = tx.update(g, state, params)
        return {path: np.asarray(m.rate) for path, m in state.metrics.items()}

    plain = rates(())
    wide = rates((multipliers.width_power(BASE | {"G": 24}, law(exponent=0.7)),))
    assert np.ptp(np.concatenate([np.ravel(rate) for rate in plain.values()])) > 0.01
    for path, m in FACTORS.items():
        np.testing.assert_allclose(wide[path], plain[path] * m**0.7, rtol=1e-5)
