"""Another optimizer for a run that goes on: what is kept, what begins anew, what is told, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from tests.support.runs import flags, losses, records
from train import main
from train.cli import parse
from train.config.fields import Config, UserError
from train.config.tree import as_dict, replace
from train.run import migration
from train.run.checkpoints import Checkpoints, describe, flat

PARAMS = {"w": (3, 4), "b": (5,)}
INJECTED = ("b1", "b2", "eps", "eps_root", "learning_rate", "weight_decay")
ADAM = ("0/count", "0/mu/b", "0/mu/w", "0/nu/b", "0/nu/w")


def params(seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.normal(size=shape), jnp.float32)
        for name, shape in PARAMS.items()
    }


def rate(count):
    return 0.01 / (1 + count)


def below(prefix: str, *paths: str) -> dict[str, str]:
    return {prefix + path: path for path in paths}


# F33: what the saved optimizer, optax.adamw(0.01), is turned into; optimizer paths that are kept, and reset.
EDITS = {
    "schedule of the rate": (lambda: optax.adamw(rate), below("", *ADAM), {"2/count"}),
    "schedule of the decay": (
        lambda: optax.adamw(0.01, weight_decay=rate),
        below("", *ADAM),
        {"1/count"},
    ),
    "mask": (lambda: optax.adamw(0.01, mask={"w": True, "b": False}), below("", *ADAM), set()),
    "clipping in front": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
        below("1/", *ADAM),
        set(),
    ),
    "decay removed": (lambda: optax.adam(0.01), below("", *ADAM), set()),
    "lion": (lambda: optax.lion(0.01), {}, {"0/count", "0/mu/w", "0/mu/b"}),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adamw)(0.01),
        below("inner_state/", *ADAM),
        {"count"} | {f"hyperparams/{n}" for n in INJECTED},
    ),
    "apply_if_finite": (
        lambda: optax.apply_if_finite(optax.adamw(0.01), 3),
        below("inner_state/", *ADAM),
        {"notfinite_count", "last_finite", "total_notfinite"},
    ),
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.adamw(0.01), 2),
        below("inner_opt_state/", *ADAM),
        {"mini_step", "gradient_step", "acc_grads/w", "acc_grads/b"},
    ),
}


def state_of(tx, weights) -> dict:
    return {"params": weights, "optimizer": tx.init(weights), "step": jnp.asarray(0, jnp.int32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two steps of AdamW, and its state."""
    tx, weights = optax.adamw(0.01), params()
    state = state_of(tx, weights)
    for seed in (1, 2):
        change, optimizer = tx.update(params(seed), state["optimizer"], state["params"])
        weights = optax.apply_updates(state["params"], change)
        state = {"params": weights, "optimizer": optimizer, "step": state["step"] + 1}
    folder = tmp_path_factory.mktemp("checkpoints")
    meta = describe(Config(), "text", state)
    with Checkpoints(folder, 3) as checkpoints:
        checkpoints.save(state, meta, 2)
        checkpoints.wait()
    return folder, flat(state)


def restored(folder, tx, say, migrating=True, state=state_of):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: state(tx, params())),
    )
    meta = describe(replace(Config(), {"optimizer.b1": 0.8}), "text", abstract)
    if not migrating:
        meta |= {"config": describe(Config(), "text", abstract)["config"]}
    with Checkpoints(folder, 3) as checkpoints:
        return checkpoints.restore(abstract, meta, say, tx.init if migrating else None)


@pytest.mark.parametrize("edit", EDITS)
def test_nine_edits_go_on_by_name_and_say_what_was_kept(saved, edit):
    make, kept, reset = EDITS[edit]
    folder, before = saved
    tx, said = make(), []
    found = restored(folder, tx, said.append)
    assert found is not None and found[1] == 2
    after = flat(found[0])
    begun = flat({"optimizer": tx.init(found[0]["params"])})
    kept = {f"optimizer/{new}": f"optimizer/{old}" for new, old in kept.items()}
    reset = {f"optimizer/{path}" for path in reset}
    dropped = {p for p in before if p.startswith("optimizer/")} - set(kept.values())
    assert set(after) == {"params/w", "params/b", "step", *kept, *reset}
    for path, x in after.items():
        same = begun[path] if path in reset else before[kept.get(path, path)]
        np.testing.assert_array_equal(x, same)
        assert x.dtype == same.dtype
    moved = {new: old for new, old in kept.items() if new != old}
    if not reset and not dropped and not moved:  # the mask of a link without a state
        assert edit in ("mask", "decay removed") and said == []
        return
    (text,) = said
    lines = {line.strip() for line in text.split("\n")}
    assert lines >= reset | dropped | {f"{old} -> {new}" for new, old in moved.items()}
    assert (f"{len(reset)} arrays reset" in text) == bool(reset)
    assert (f"{len(dropped)} arrays dropped" in text) == bool(dropped)
    # The state is one that the optimizer goes on from.
    tx.update(params(3), found[0]["optimizer"], found[0]["params"])


def with_average(tx, weights) -> dict:
    return {**state_of(tx, weights), "average": params(7)}


@pytest.mark.parametrize("had", [True, False])
def test_the_mean_of_the_weights_is_kept_or_begins_at_them(saved, tmp_path, had):
    """Of a task that keeps one, such as that of images."""
    folder, said = (tmp_path if had else saved[0]), []
    if had:
        state = with_average(optax.adamw(0.01), params())
        with Checkpoints(folder, 3) as checkpoints:
            checkpoints.save(state, describe(Config(), "text", state), 2)
            checkpoints.wait()
    after, _ = restored(folder, optax.lion(0.01), said.append, state=with_average)
    wanted = params(7) if had else after["params"]
    for name in PARAMS:
        np.testing.assert_array_equal(after["average"][name], wanted[name])
        assert after["average"][name] is not after["params"][name]
        assert (after["average"][name] != after["params"][name]).any() == had
    assert ("average/w" in said[0].split("reset")[1].split("dropped")[0]) != had


@pytest.mark.parametrize("edit", ["clipping in front", "lion"])
def test_without_consent_another_structure_is_refused(saved, edit):
    folder = saved[0]
    with pytest.raises(UserError, match=r"do not fit this program(?s:.*)--run.migrate True"):
        restored(folder, EDITS[edit][0](), print, migrating=False)
    assert [p.name for p in folder.iterdir()] == ["2"]  # refused is not damaged


def described(**paths: str) -> dict[str, tuple[str, str]]:
    """Leaves of the given paths and shapes, each named by the last part of its path."""
    fixed = {"params__w": "float32[2]", "step": "int32[]"}
    both = {path.replace("__", "/"): text for path, text in (fixed | paths).items()}
    return {path: (path.split("/")[-1], text) for path, text in both.items()}


def test_another_model_is_never_a_migration():
    old = described()
    for wrong in (
        {"params__w": "float32[3]"},
        {"params__v": "float32[2]"},
        {"params__w": "bfloat16[2]"},
    ):
        with pytest.raises(UserError, match="not its model: params/"):
            migration.plan_migration(old, described(**wrong))


def test_what_could_be_two_things_is_not_guessed():
    old = described(optimizer__0__mu="float32[2]", optimizer__1__mu="float32[2]")
    new = described(optimizer__x__mu="float32[2]")
    plan = migration.plan_migration(old, new)
    assert plan.reset == ("optimizer/x/mu",)
    assert plan.dropped == ("optimizer/0/mu", "optimizer/1/mu")
    # Nor when one saved array could go to two places.
    assert len(migration.plan_migration(new, old).reset) == 2
    # The longer common end decides.
    near = described(optimizer__x__1__mu="float32[2]")
    assert migration.plan_migration(old, near).kept["optimizer/x/1/mu"] == "optimizer/1/mu"


def test_another_shape_begins_anew_and_another_float_is_converted():
    old = described(optimizer__mu="float32[2, 3]", optimizer__n="int32[]")
    plan = migration.plan_migration(
        old, described(optimizer__mu="float32[3, 2]", optimizer__n="float32[]")
    )
    assert set(plan.reset) == {"optimizer/mu", "optimizer/n"} == set(plan.dropped)
    plan = migration.plan_migration(
        old, described(optimizer__mu="bfloat16[2, 3]", optimizer__n="int32[]")
    )
    assert plan.kept["optimizer/mu"] == "optimizer/mu" and not plan.reset


@pytest.mark.parametrize(
    "text",
    [
        "",
        "float32",
        "float32[-1]",
        "float32[1,2]",
        "os[2]",
        "float32[2]\n",
        "object[1]",
        "void[1]",
        "x" * 99,
    ],
)
def test_only_types_and_shapes_are_read_as_such(text):
    with pytest.raises(ValueError):
        migration.parse_shape(text)
    assert migration.parse_shape("bfloat16[3, 50]") == jax.ShapeDtypeStruct((3, 50), jnp.bfloat16)


def test_a_run_goes_on_with_another_optimizer_when_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    assert main.main(flags(tmp_path, "--run.steps", "4")) == 0
    before = losses(tmp_path / "run")
    other = ["--optimizer.name", "lion", "--decay", "l2", "--optimizer.clip", "None"]
    longer = ["--resume", str(tmp_path / "run"), "--run.steps", "6", *other]
    with pytest.raises(UserError, match=r"optimizer.name: adam -> lion(?s:.*)--run.migrate True"):
        main.main(longer)
    assert main.main([*longer, "--run.migrate", "True"]) == 0
    said = capsys.readouterr().out
    assert "The optimizer has changed since step 4" in said and "continued after step 4" in said
    for path in ("mu/blocks/attention/key/kernel", "nu/head/kernel", "count"):
        assert f"    optimizer/inner_state/direction/{path}\n" in said.split("arrays dropped")[1]
    assert "    optimizer/inner_state/rate/count\n" in said.split("arrays reset")[0]
    after = losses(tmp_path / "run")
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert {n: after[n] for n in before} == before
    # Consent was for that start: the new optimizer is the run's, and the next change is refused again.
    assert main.main(["--resume", str(tmp_path / "run"), "--run.steps", "7"]) == 0
    with pytest.raises(UserError, match=r"optimizer.name: lion -> adam"):
        main.main(["--resume", str(tmp_path / "run"), "--optimizer.name", "adam"])
    with pytest.raises(UserError, match=r"model.width"):
        main.main(["--resume", str(tmp_path / "run"), "--model.width", "32", "--run.migrate=True"])
    assert records(tmp_path / "run")[-1]["step"] == 7


def test_radii_and_anchors_are_never_measured_from_trained_weights(saved):
    """They belong to the first step, which a checkpoint of another optimizer does not remember."""
    folder, _ = saved
    ball = optax.chain(optax.adamw(0.01), optax_decay.hyperball(learning_rate=0.01))
    anchor = optax.chain(optax.adamw(0.01), optax_decay.soda_decay())
    cases = ((ball, "norms of the matrices", {}), (anchor, "initial weights", {}))
    for tx, what, _ in cases:
        with pytest.raises(UserError, match=rf"does not hold the {what} at the start.*new run"):
            restored(folder, tx, print)
    # A radius that the config states is known.
    flags = ["--optimizer.name", "adam_hyperball", "--decay.mask", "head"]
    names = {"optimizer/1/radius/w": "HyperballState.radius/w"}
    plan = migration.MigrationPlan({}, tuple(names), ())
    for more, known in (([], False), (["--optimizer.radius", "0.02"], True)):
        config = as_dict(parse([*flags, *more]))
        if known:
            migration.refuse_lost_start(plan, names, config)
            continue
        with pytest.raises(
            UserError, match=r"nearest: set optimizer\.radius to a number, or start"
        ):
            migration.refuse_lost_start(plan, names, config)


def test_radii_move_with_their_link(tmp_path):
    """From --optimizer adam_hyperball to --optimizer adam --decay hyperball: another path, the same name."""
    tx = optax.named_chain(
        ("direction", optax.scale_by_adam()),
        ("rate", optax.scale_by_learning_rate(0.01)),
        ("sphere", optax_decay.hyperball(learning_rate=0.01)),
    )
    state = state_of(tx, params())
    for seed in (1, 2):
        change, state["optimizer"] = tx.update(params(seed), state["optimizer"], state["params"])
        state["params"] = optax.apply_updates(state["params"], change)
    state["params"] = jax.tree.map(lambda w: 1.5 * w, state["params"])  # off the sphere
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(state, describe(Config(), "text", state), 2)
        checkpoints.wait()
    other = optax.chain(
        optax.scale_by_adam(),
        optax.chain(optax.scale_by_learning_rate(0.01), optax_decay.hyperball(learning_rate=0.01)),
    )
    found, _ = restored(tmp_path, other, print)
    np.testing.assert_array_equal(
        found["optimizer"][1][1].radius["w"], state["optimizer"]["sphere"].radius["w"]
    )
    np.testing.assert_allclose(
        np.linalg.norm(params()["w"]), found["optimizer"][1][1].radius["w"], rtol=1e-6
    )
