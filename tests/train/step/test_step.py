"""The step, its optimizer chain and its shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import optax_decay
from models import llama
from models.loss import cross_entropy
from tests.support import toy
from tests.support.runs import program
from train.config.derived import derived
from train.config.fields import Config, Mesh, Optimizer, UserError
from train.config.parts.schedules import Cosine, Linear
from train.config.tree import replace
from train.step import optimizer, sharding
from train.step.update import compile_update, loss, loss_and_gradient


def trajectory(tx: optax.GradientTransformation, steps: int = 3) -> dict[str, np.ndarray]:
    """Weights of the toy tree after some steps of fixed gradients, float32."""
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), toy.nest(tree))
    params = cast(toy.flat_params())
    state = tx.init(params)
    for seed in range(steps):
        gradient = cast(toy.flat_params(seed + 1))
        looks = {
            "gradients": gradient,
            "hessian_fn": lambda p, key, g=gradient: jax.tree.map(jnp.square, g),
        }
        change, state = tx.update(gradient, state, params, **looks)
        params = optax.apply_updates(params, change)
    return toy.unnest(params)


def chain(**changes) -> optax.GradientTransformationExtraArgs:
    """The chain of a config whose changes are given as group__field, with __ for every dot."""
    plain = {"optimizer.clip": None, "run.steps": 10}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return optimizer.build(derived(replace(Config(), plain | changes)), toy.AXES)


def test_the_chain_of_a_config_is_the_ready_made_optimizer():
    steady = {
        "optimizer__schedule__name": "constant",
        "optimizer__schedule__warmup_steps": 0,
        "optimizer__learning_rate": 2e-3,
    }
    ours = trajectory(chain(**steady))
    theirs = trajectory(
        optax_decay.adam_huber_decay(2e-3, b1=0.9, b2=0.95, weight_decay=0.1, axes=toy.AXES)
    )
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])
    adamw = trajectory(chain(decay__name="l2", **steady))
    mask = toy.nest({path: path in toy.MATRICES for path in toy.SHAPES})
    for path, w in trajectory(
        optax.adamw(2e-3, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    ).items():
        np.testing.assert_array_equal(adamw[path], w)
    assert any((adamw[path] != ours[path]).any() for path in ours)


@pytest.mark.parametrize("rule", ["fan2025", "mup_package"])
@pytest.mark.parametrize("coupling", ["learning_rate", "independent"])
def test_the_chain_of_a_config_follows_the_width(rule, coupling):
    steady = {
        "optimizer__schedule__name": "constant",
        "optimizer__schedule__warmup_steps": 0,
        "optimizer__learning_rate": 2e-3,
        "decay__name": "l2",
        "decay__weight_decay": 0.1,
        "decay__coupling": coupling,
    }
    ours = trajectory(
        chain(
            width__base=2,
            width__base_head=4,
            width__rule=rule,
            **steady,
        )
    )
    theirs = trajectory(
        optax_decay.mup_adamw(
            *(2e-3, 2),
            b2=0.95,
            weight_decay=0.1,
            law=optax_decay.width.law(rule),
            coupling=getattr(optax_decay.couplings, coupling)(),
            axes=toy.AXES,
        )
    )
    plain = trajectory(chain(**steady))
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])
        same = path not in toy.MATRICES or (path == "head/kernel" and rule == "mup_package")
        assert np.array_equal(ours[path], plain[path]) == same, path


def test_a_proximal_decay_has_no_learning_rate_behind_it_that_follows_the_width():
    """τ = η λ m^(s-r): with the l2 pull w ← θ/(1+τ)."""
    steady = {"optimizer__schedule__name": "constant", "optimizer__schedule__warmup_steps": 0}
    base = {"width__base": 2, "decay__name": "l2", "optimizer__learning_rate": 0.02}
    some = chain(decay__form="proximal", decay__weight_decay=5.0, **base, **steady)
    none = chain(decay__weight_decay=0.0, **base, **steady)
    a, b = trajectory(some, 1)["mix/kernel"], trajectory(none, 1)["mix/kernel"]
    np.testing.assert_allclose(a, b / (1 + 0.02 * 5.0 * 4**-0.5), rtol=1e-6)


def test_the_learning_rate_climbs_falls_and_stays():
    config = Optimizer(learning_rate=3e-3, schedule=Cosine(steps=40, warmup_steps=8, final=0.2))
    seen = [float(optimizer.schedule(config)(jnp.asarray(s))) for s in range(60)]
    climb = np.minimum(1, np.arange(1, 61) / 9)
    done = np.clip((np.arange(60) - 8) / 32, 0, 1)
    expected = 3e-3 * climb * (0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2)
    # float32: a handful of operations, each to half a unit in the last place.
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert 0 < seen[0] < seen[7] < seen[8] == max(seen) == pytest.approx(3e-3)
    assert seen[39] > seen[40] == seen[59] == pytest.approx(0.2 * 3e-3)
    linear = Optimizer(schedule=Linear(steps=10, warmup_steps=0, final=0.5))
    half = float(optimizer.schedule(linear)(jnp.asarray(5)))
    assert half == pytest.approx(0.75 * linear.learning_rate)


@pytest.mark.parametrize("longest", [0.5, 1e6])
def test_clipping_is_that_of_optax(longest):
    gradient = jax.tree.map(jnp.float32, toy.nest(toy.flat_params()))
    norm = float(optax.tree.norm(gradient))
    assert (norm > longest) == (longest == 0.5)
    ours, _ = optimizer.clip(longest).update(gradient, optax.EmptyState())
    theirs, _ = optax.clip_by_global_norm(longest).update(gradient, optax.EmptyState())
    # One rounding in either order of multiplying and dividing: two units in the last place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7), ours, theirs)


def test_cross_entropy_against_float64():
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(0, 4, (3, 5, 7)), generator.integers(0, 7, (3, 5))
    shifted = logits - logits.max(-1, keepdims=True)
    right = np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    losses = np.log(np.exp(shifted).sum(-1)) - right
    total, count = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    # float32, 15 terms of order one
    assert float(total) == pytest.approx(losses.sum(), rel=1e-6) and count == 15
    low = cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(targets))
    assert {x.dtype for x in low} == {jnp.dtype("float32")}
    padded = np.where(np.arange(5) < np.array([[5], [2], [0]]), targets, -1)
    total, count = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(padded))
    assert count == 7 and float(total) == pytest.approx(losses[padded >= 0].sum(), rel=1e-6)


def causal(params, tokens):
    """A small model: logits from the mean of the embeddings so far."""
    mean = jnp.cumsum(params["in"][tokens], 1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
    return jnp.tanh(mean) @ params["out"]


@pytest.fixture(scope="module")
def example():
    """Weights of `causal` for 11 tokens, and 8 rows of 13 of them."""
    rng = np.random.default_rng(0)
    shapes = {"in": (11, 6), "out": (6, 11)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return params, rng.integers(0, 11, (8, 13))


def test_padding_moves_nothing(example):
    """Neither what stands in its place nor the model's output there changes loss or gradient."""
    params, tokens = example
    both = jax.jit(jax.value_and_grad(functools.partial(loss, causal)))
    kept = np.array([13, 5, 5, 2, 13, 1, 2, 5])
    padded = np.where(np.arange(13) < kept[:, None], tokens, -1)
    value, gradient = both(params, padded)
    # One row at a time without padding, weighed by its predictions; a row of one token has none.
    rows = [both(params, tokens[i : i + 1, :n]) for i, n in enumerate(kept) if n > 1]
    counts = [n - 1 for n in kept if n > 1]
    alone = sum(c * float(v) for c, (v, _) in zip(counts, rows)) / sum(counts)
    assert float(value) == pytest.approx(alone, rel=1e-6)
    assert float(value) != pytest.approx(np.mean([float(v) for v, _ in rows]), rel=1e-6)
    scale = float(optax.tree.norm(gradient))
    mean = jax.tree.map(
        lambda *g: sum(c * x for c, x in zip(counts, g)) / sum(counts), *(g for _, g in rows)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), gradient, mean)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    empty, gradient = both(params, np.full((8, 13), -1))
    assert float(empty) == 0 == float(optax.tree.norm(gradient))


def test_micro_batches_weigh_tokens_not_parts(example):
    params, tokens = example
    both = jax.jit(functools.partial(loss_and_gradient, causal), static_argnums=2)
    padded = np.where(np.arange(13) < np.array([13, 2, 13, 2, 13, 2, 13, 1])[:, None], tokens, -1)
    whole, parts = (both(params, padded, n) for n in (1, 2))
    means = [float(both(params, padded[i::2], 1)[0]) for i in (0, 1)]
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    assert np.mean(means) != pytest.approx(float(whole[0]), rel=1e-4)
    scale = float(optax.tree.norm(whole[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), whole[1], parts[1]
    )


def test_one_compilation_donated_state_and_numbers(tmp_path):
    ready = program(tmp_path)
    traced = []

    def forward(params, tokens):
        traced.append(1)
        return llama.forward(ready.program.model, params, tokens)

    tx = optimizer.build(ready.program.config, ready.program.axes)
    rate = optimizer.schedule(ready.program.config.optimizer)
    update = compile_update(forward, tx, rate, 1, ready.program.shardings)
    state, calls = ready.program.init(jax.random.key(0)), []
    for index in range(4):
        before = jax.tree.leaves(state)
        state, noted = update(state, ready.batch(index))
        assert all(leaf.is_deleted() for leaf in before)
        calls.append(len(traced))
    assert update._cache_size() == 1 and calls[0] > 0 and len(set(calls)) == 1
    assert int(state["step"]) == 4
    assert int(noted.pop("skipped")) == int(noted.pop("skipped_in_a_row")) == 0
    assert set(noted) == {"loss", "gradient_norm", "learning_rate"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in noted.values())
    last = float(rate(jnp.asarray(3)))
    assert float(noted["learning_rate"]) == pytest.approx(last, rel=1e-6)


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path):
    ready = program(tmp_path)
    forward = functools.partial(llama.forward, ready.program.model)
    both = jax.jit(functools.partial(loss_and_gradient, forward), static_argnums=2)
    params, tokens = ready.program.init(jax.random.key(1))["params"], ready.batch(0)
    whole, parts = (both(params, tokens, n) for n in (1, 4))
    # Means of 96 terms in another order: some tens of float32 roundings.
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    scale = float(optax.tree.norm(whole[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), whole[1], parts[1]
    )


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor), 8)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(1e-3)),
        optax.masked(optax.adam(1e-3), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        optax.MultiSteps(optax.adam(1e-3), 2),
        chain(decay__threshold__name="running_mean"),
    ],
    ids=["adam", "inject", "masked", "multisteps", "ours"],
)
def test_states_that_mirror_parameters_are_split_like_them(tx):
    mesh = mesh_of(2, 2, 2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), toy.nest(toy.flat_params()))
    split = sharding.of_parameters(toy.AXES, params, mesh)
    assert split["blocks"]["up"]["kernel"].spec == jax.P(None, "fsdp", "tensor")
    state = jax.eval_shape(tx.init, params)
    found = jax.tree_util.tree_flatten_with_path(sharding.of_state(state, params, split, mesh))[0]
    expected = dict(zip(toy.unnest(params), jax.tree.leaves(split), strict=True))
    moments = set()
    for (key, got), leaf in zip(found, jax.tree.leaves(state), strict=True):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        own = [p for p in expected if path.endswith("/" + p) and leaf.shape == toy.SHAPES[p]]
        assert got == (expected[own[0]] if own else jax.NamedSharding(mesh, jax.P())), path
        moments |= {p for p in own if "mu" in path}
    assert {p for p in moments if len(toy.SHAPES[p]) > 1}


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = mesh_of(1, 1, 4)
    shape = jax.ShapeDtypeStruct((10, 8), jnp.float32)
    split = sharding.of_parameters((("embedding", "V -> D"),), {"embedding": shape}, mesh)
    assert split["embedding"].spec == jax.P(None, "fsdp")


def test_two_letters_on_one_mesh_axis_are_refused(monkeypatch):
    monkeypatch.setitem(sharding.LETTERS, "D", "tensor")
    params = toy.nest(toy.flat_params())
    with pytest.raises(ValueError, match="tensor"):
        sharding.of_parameters(toy.AXES, params, mesh_of(1, 1, 2))


def test_the_mesh_takes_the_devices_that_the_sequences_allow():
    assert dict(sharding.make_mesh(Mesh(), 8).shape) == {
        "replica": 1,
        "data": 8,
        "fsdp": 1,
        "tensor": 1,
    }
    assert dict(sharding.make_mesh(Mesh(), 12).shape)["data"] == 6
    found = sharding.make_mesh(Mesh(tensor=2, fsdp=2), 4)
    assert dict(found.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert set(found.axis_types) == {AxisType.Auto}
    for wrong, said in (
        (Mesh(data=16), "there are 8"),
        (Mesh(data=3), "nearest: "),
        (Mesh(fsdp=3), "fsdp"),
        (Mesh(replica=3), "mesh.replica = 3 must divide the 8 sequences"),
        (Mesh(replica=4, fsdp=4), "4 x 1 x 4 x 1 needs 16 devices"),
    ):
        with pytest.raises(UserError, match=said):
            sharding.make_mesh(wrong, 8)
