"""Choices: found in folders, picked by name, and told apart."""

import importlib
import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import toy
from train.cli import parse
from train.config import decays, optimizers
from train.config.derived import derived
from train.config.fields import Config, UserError
from train.config.parts.schedules import Constant
from train.config.saved import from_json, to_json
from train.config.tree import flatten, parts, replace, slots
from train.step import optimizer

SIGN = '''
    """Sign descent."""

    import dataclasses
    from typing import Any, ClassVar

    import optax

    from train.config.ranges import Positive
    from train.config.setting import Setting


    @dataclasses.dataclass(frozen=True)
    class SignDescent:
        """The sign of the gradient, scaled."""

        name: ClassVar[str] = "sign_descent"
        growth: ClassVar[str] = "adam"
        workers: ClassVar[bool] = False
        adam: ClassVar[bool] = False
        curvature: ClassVar[bool] = False

        b1: float = 0.0
        """Unused by the step."""
        boost: Positive = 2.0
        """Length of a step [learning rates]."""

        def build(self, setting: Setting) -> Any:
            return optax.chain(optax.scale_by_sign(), optax.scale(self.boost))
'''
NOTHING = '''
    """No decay at all."""

    import dataclasses
    from typing import Any, ClassVar

    import optax

    from train.config.setting import Setting


    @dataclasses.dataclass(frozen=True)
    class Nothing:
        """Leaves the weights alone."""

        name: ClassVar[str] = "nothing"
        gradients: ClassVar[bool] = False
        multipliers: ClassVar[bool] = True
        last: ClassVar[bool] = False

        mask: tuple[str, ...] = ("hidden",)
        """Of nothing."""

        def build(self, setting: Setting) -> Any:
            return optax.identity()
'''


@pytest.fixture
def two_more(tmp_path, monkeypatch):
    """A folder beside train/config/optimizers, and one beside decays, with one more module each."""
    for package, name, text in (
        (optimizers, "sign_descent", SIGN),
        (decays, "nothing", NOTHING),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    importlib.invalidate_caches()
    yield
    for module in ("train.config.optimizers.sign_descent", "train.config.decays.nothing"):
        sys.modules.pop(module, None)


def test_one_file_adds_an_optimizer_and_one_a_decay(two_more, capsys):
    """To the help, to command lines, to config.json, to error messages and to the chain."""
    with pytest.raises(SystemExit):
        parse(["--help", "all"])
    assert "root, sign_descent, sophia" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
    with pytest.raises(SystemExit):
        parse(["--optimizer", "sign_descent", "--decay=nothing", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--optimizer.boost FLOAT Length of a step [learning rates]. (default: 2.0)" in said
    assert "Leaves the weights alone. --decay nothing is chosen; others: huber," in said
    with pytest.raises(UserError, match=r"--optimizer.boost belongs to --optimizer sign_descent;"):
        parse(["--optimizer.boost", "3"])
    with pytest.raises(UserError, match=r"optimizer.boost = -1.0 is out of range"):
        parse(["--optimizer", "sign_descent", "--optimizer.boost", "-1"])

    flags = ["toy", "--optimizer.name", "sign_descent", "--decay", "nothing"]
    config = parse([*flags, "--optimizer.boost", "3", "--optimizer.clip", "None"])
    assert from_json(to_json(config), "there") == config
    assert json.loads(to_json(config))["optimizer"] == {
        **{"name": "sign_descent", "b1": 0.0, "boost": 3.0, "learning_rate": 1e-2, "clip": None},
        "schedule": {"name": "cosine", "steps": 200, "warmup_steps": 20, "final": 0.1},
        "spikes": None,
    }
    params = toy.nest(toy.flat_params())
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tx = optimizer.build(config, toy.AXES)
    step, _ = tx.update(gradient, tx.init(gradient), gradient)
    first = 1e-2 / 21  # of a climb of 20 steps
    for g, u in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True):
        np.testing.assert_allclose(u, -3 * first * np.sign(g), rtol=1e-6)


def test_every_module_of_a_folder_is_a_choice_of_its_name():
    for path in ("optimizer", "decay"):
        (part,) = (p for p in parts(Config()) if p.path == path and p.slot.choice)
        files = {
            kind.__module__.rpartition(".")[2]: name for name, kind in part.slot.classes.items()
        }
        assert all(file == name for file, name in files.items())
        assert next(iter(part.slot.classes)) == part.value.name  # the default comes first
        assert list(part.slot.classes)[1:] == sorted(set(part.slot.classes) - {part.value.name})


@pytest.mark.parametrize("written", [["--optimizer", "conda"], ["--optimizer.name=conda"]])
def test_a_choice_keeps_what_was_set_and_nothing_else(written):
    config = parse(["sophia_gpt2_124m", "--data.tokenizer", "bytes", *written])
    values = flatten(config)
    assert (values["optimizer.b1"], values["optimizer.b2"]) == (0.965, 0.99)  # the experiment's
    assert (values["optimizer.eps"], values["optimizer.refresh_every"]) == (1e-8, 2000)
    assert values["decay.mask"] == ("hidden",)
    plain = flatten(replace(Config(), {"optimizer.name": "sophia", "decay.name": "lp"}))
    assert (plain["optimizer.eps"], plain["decay.weight_decay"]) == (1e-15, 1e-3)
    kept = flatten(replace(Config(), {"decay.weight_decay": 0.3, "decay.name": "lp"}))
    assert kept["decay.weight_decay"] == 0.3
    strong = replace(Config(), {"decay.weight_decay": 0.3, "decay.form": "proximal"})
    moved = flatten(replace(strong, {"decay.name": "log_cosh"}))
    assert (moved["decay.weight_decay"], moved["decay.form"]) == (0.3, "explicit")


def test_the_last_of_two_choices_counts_and_outer_choices_come_first():
    assert parse(["--optimizer", "conda", "--optimizer", "lion"]).optimizer.direction.name == "lion"
    config = parse(
        ["--decay.threshold.memory", "0.5", "--decay.threshold", "running_mean", "--decay", "fair"]
    )
    values = flatten(config)
    assert (values["decay.name"], values["decay.threshold.memory"]) == ("fair", 0.5)
    assert flatten(parse(["--decay.threshold", "0.25"]))["decay.threshold.value"] == 0.25


def test_optional_parts_are_switched_on_by_a_field_and_off_by_none():
    assert flatten(parse(["--optimizer.spikes.window", "9"]))["optimizer.spikes.sigma"] == 6.0
    on = parse(["small_alphadecay"])
    assert flatten(on)["decay.spectrum.refresh_every"] == 50
    off = parse(["small_alphadecay", "--decay.spectrum", "None"])
    assert flatten(off)["decay.spectrum"] is None
    with pytest.raises(UserError, match=r"--width 3: allowed is None, .* --width.base NUMBER"):
        parse(["--width", "3"])
    for text in ("None", "9"):
        assert from_json(to_json(parse(["--optimizer.clip", text])), "there").optimizer.clip in (
            None,
            9,
        )


def test_replace_knows_its_fields():
    with pytest.raises(UserError, match=r"no field optimizer.gamma; nearest: optimizer.name"):
        replace(Config(), {"optimizer.gamma": 1.0})
    constant = replace(Config(), {"optimizer.schedule": Constant(3)})
    assert flatten(derived(constant))["optimizer.schedule.warmup_steps"] == 3
    assert Config() == Config() and hash(Config()) == hash(Config())


def names(node, prefix: str = "") -> list[str]:
    """Of all fields, those that stand for a choice included."""
    found = []
    for slot in slots(type(node)):
        value, name = getattr(node, slot.field.name), slot.field.name
        if not slot.classes or value is None:
            found.append(prefix + name)
            continue
        path = prefix if slot.inline else f"{prefix}{name}."
        found += [path + "name"] if slot.choice else []
        found += names(value, path)
    return found


def test_no_two_fields_have_one_name():
    """A part whose fields are named as those of the whole hides none of them."""
    for path in ("optimizer", "decay"):
        (part,) = (p for p in parts(Config()) if p.path == path and p.slot.choice)
        for name in part.slot.classes:
            found = names(replace(Config(), {f"{path}.name": name}))
            assert len(found) == len(set(found)), name
