"""Configs: what is refused and how, what may be left open, where a run starts from."""

import dataclasses
import json
import random
import typing

import pytest

from models import gpt
from train import cli as arguments
from train.config.experiments import EXPERIMENTS
from train.config.fields import (
    Config,
    UserError,
    differences,
    flatten,
    model_config,
    replace,
    resolved,
)
from train.config.ranges import Range
from train.config.rules import MAY_CHANGE, SPECTRAL
from train.step import families

DEFAULT = next(iter(EXPERIMENTS))


def refused(*flags: str) -> str:
    with pytest.raises(UserError) as error:
        arguments.parse(list(flags))
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "value", "allowed", "nearest"),
    [
        ("--optimizer.learning_rate -1", "-1.0", "above 0", "above 0"),
        ("--optimizer.b1 1", "1.0", "0 <= value < 1", "below 1"),
        ("--optimizer.final 1.5", "1.5", "0 <= value <= 1", "nearest: 1"),
        ("--decay.weight_decay -0.5", "-0.5", "0 or more", "nearest: 0"),
        ("--decay.threshold 0", "0.0", "above 0", "above 0"),
        ("--run.steps 0", "0", "1 or more", "nearest: 1"),
        ("--run.seed 99999999999", "99999999999", "at most 2147483647", "nearest: 2147483647"),
        ("--run.name ../x", "'../x'", "no slashes", "nearest: '..-x'"),
        ("--run.steps 9 --optimizer.warmup_steps 12", "12", "0 to 9", "nearest: 9"),
        ("--data.batch_size 6 --run.micro_batches 4", "4", "batch_size = 6", "nearest: 3"),
        ("--model.preset 60m", "'60m'", "tiny", "nearest: 60M"),
        ("--model.heads 5", "5", "divide width=128", "nearest: heads=4"),
        (
            "--model.preset vit-toy --model.patch_size 5",
            "5",
            "image_size=12",
            "nearest: patch_size=4",
        ),
        ("--model.preset vit-toy --images.magnitude 11", "11.0", "0 <= value <= 10", "nearest: 10"),
        ("--model.preset vit-toy --images.average 1", "1.0", "0 <= value < 1", "below 1"),
        ("smol", "'smol'", "small", f"nearest: {DEFAULT}"),
    ],
)
def test_a_bad_value_is_refused_with_the_allowed_and_the_nearest(flags, value, allowed, nearest):
    message = refused(*flags.split())
    assert value in message and allowed in message and nearest in message
    if flags.startswith("--"):
        assert flags.split()[-2].split(".")[1] in message  # the field's name


@pytest.mark.parametrize(
    "flags",
    [
        "--decay.pull l2 --decay.threshold 0.1",
        "--decay.threshold 0.1 --decay.factor 2",
        "--decay.threshold mean --decay.memory 0.9",
        "--decay.pull pseudo_huber --decay.proximal True",
        "--decay.proximal True --decay.cautious True",
        "--optimizer.name lion --optimizer.eps 1e-6",
        "--optimizer.schedule constant --optimizer.final 0.5",
        "--optimizer.schedule constant --optimizer.schedule_steps 5",
        "--decay.pull l2 --decay.width_rule constant",
        "--model.preset gpt-toy --model.rope_base 100",
        "--model.preset gpt-toy --model.kv_heads 2",
        "--model.layers 3 --model.bias False",
        "--model.layers 3 --model.positions 512",
        "--model.layers 3 --model.patch_size 8",
        "--model.layers 3 --images.name cifar10",
        "--model.layers 3 --images.average 0.99",
        "--model.preset deit-tiny --data.text zipf",
        "--model.preset deit-tiny --data.length 12",
        "--model.preset deit-tiny --model.vocab_size 300",
        "--model.preset deit-tiny --model.tied True",
    ],
)
def test_a_field_that_would_do_nothing_is_refused(flags):
    rest = flags.split()[:-2]
    assert "no effect" in refused(*flags.split())
    assert arguments.parse(rest) != arguments.parse([])  # what stands before it is fine alone


def test_a_typo_in_a_flag_names_the_flag_that_was_meant(capsys):
    with pytest.raises(SystemExit) as error:
        arguments.parse(["--optimizer.learning_rat", "1"])
    said = capsys.readouterr()
    assert error.value.code == 2
    assert "--optimizer.learning_rate" in said.err + said.out


def test_help_shows_every_field_with_its_text_and_every_experiment(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in text for name in flatten(Config()))
    assert all(f"{name}:" in text for name in EXPERIMENTS)
    assert all(name in text for name in families.PRESETS)
    assert "Peak learning rate" in text


def test_every_field_has_a_docstring():
    import inspect

    for group in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[group.name]
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            after = source.split(f"\n    {field.name}: ")[1].split("\n")[1]
            assert after.startswith('    """'), f"{group.name}.{field.name}"


def test_a_run_starts_from_an_experiment_a_file_or_a_folder(tmp_path):
    plain = arguments.parse([])
    assert plain == arguments.parse([DEFAULT]) == arguments.parse(["--experiment", DEFAULT])
    assert plain == EXPERIMENTS[DEFAULT]()
    path = tmp_path / "config.json"
    path.write_text('{"run": {"steps": 7}, "decay": {"mask": ["head"]}}')
    read = arguments.parse(["--config", str(path), "--run.seed", "3"])
    assert (read.run.steps, read.run.seed, read.decay.mask) == (7, 3, ("head",))
    resumed = arguments.parse([f"--resume={tmp_path}", "--run.steps", "20"])
    assert resumed.run.folder == str(tmp_path)
    # The schedule keeps the length it had; only the run gets longer.
    assert (resumed.run.steps, resumed.optimizer.schedule_steps) == (20, 7)
    assert "one place" in refused(DEFAULT, "--resume", str(tmp_path))
    assert "no config.json" in refused("--resume", str(tmp_path / "config"))
    assert "needs a value" in refused("--resume")


def test_json_round_trip_of_every_experiment():
    for make in EXPERIMENTS.values():
        assert arguments.from_json(arguments.to_json(make()), "there") == make()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "groups of fields"),
        ('{"run": 3}', "groups of fields"),
        ('{"run": {"stepz": 3}}', "nearest: 'run.steps'"),
        ('{"runn": {"steps": 3}}', "nearest: 'run.steps'"),
        ('{"run": {"steps": "3"}}', "expected int"),
        ('{"run": {"steps": 3.5}}', "expected int"),
        ('{"run": {"steps": true}}', "expected int"),
        ('{"run": {"steps": null}}', "expected int"),
        ('{"run": {"tensorboard": 1}}', "expected bool"),
        ('{"optimizer": {"schedule": "cosin"}}', "nearest: 'cosine'"),
        ('{"decay": {"threshold": "maen"}}', "nearest: 'mean'"),
        ('{"decay": {"mask": ["hiden"]}}', "nearest: 'hidden'"),
        ('{"decay": {"mask": "hidden"}}', "expected a list"),
    ],
)
def test_a_bad_json_config_is_refused(text, said):
    with pytest.raises(UserError, match="there") as error:
        arguments.from_json(text, "there")
    assert said in str(error.value)


def test_noise_in_a_config_is_a_config_or_refused_in_words():
    """A thousand files with bytes changed, and values of other types: never another exception."""
    generator, plain = random.Random(0), arguments.to_json(Config())
    strange = [None, True, -1, 0.5, 1e400, "", "x", "\0", "\ud800", "../..", [], ["hidden", 3]]
    strange += [{}, {"a": {}}, 10**30, 10**400, -(10**400)]
    refusals = 0
    for number in range(1000):
        text = bytearray(plain.encode())
        if number % 2:
            for _ in range(generator.randrange(1, 4)):
                text[generator.randrange(len(text))] = generator.randrange(256)
        else:
            groups = json.loads(plain)
            part = groups[generator.choice(list(groups))]
            part[generator.choice(list(part))] = generator.choice(strange)
            text = json.dumps(groups).encode()
        try:
            config = arguments.from_json(text.decode(errors="replace"), "there")
            arguments.check(config)
        except UserError:
            refusals += 1
        else:
            assert arguments.from_json(arguments.to_json(config), "there") == config
    assert 300 < refusals < 1000  # some noise is in the digits of a number


def test_resolved_leaves_nothing_open_that_is_known():
    full = flatten(Config())
    open_ends = {name for name, value in full.items() if value is None}
    # Of these only the tokenizer, the devices and the clock know; memory belongs to "ema", a rule to a base width.
    assert open_ends == {
        *("model.vocab_size", "model.weights", "mesh.data", "run.folder", "run.wandb"),
        *("run.keep_every", "optimizer.spike_sigma", "optimizer.spike_window"),
        *("decay.memory", "model.kv_heads", "model.positions", "model.bias"),
        *("model.image_size", "model.patch_size", "model.drop_path"),
        *("images.folder", "images.held_out", "images.average"),
        *("model.base_width", "model.base_head_width", "decay.width_rule"),
        # Adam has none of these, and no spectrum is measured.
        *("optimizer.momentum", "optimizer.refresh_every", "optimizer.scale", "optimizer.gamma"),
        *("optimizer.freeze", "optimizer.layout", "optimizer.bias_correction"),
        "optimizer.largest_direction",
        *("decay.spectral", *(f"decay.{name}" for name in SPECTRAL)),
    } - ({"model.kv_heads"} if families.PRESETS[Config().model.preset].kv_heads else set())
    assert resolved(Config()) == Config()
    assert replace(Config(), {"decay.threshold": "ema"}).decay.memory == 0.99


def test_differences_are_those_of_the_resolved_configs():
    a = Config()
    b = replace(a, {"decay.threshold": "mean", "run.steps": 9})
    changed = differences(a, b)
    assert "decay.threshold" not in changed
    assert changed["run.steps"] == (a.run.steps, 9)
    assert "optimizer.schedule_steps" in changed
    assert set(MAY_CHANGE) <= set(flatten(a))


def test_the_embedding_must_hold_every_token():
    config = replace(Config(), {"model.vocab_size": 300})
    assert model_config(config, 257).vocab_size == 300
    assert model_config(Config(), 257).vocab_size == 257
    with pytest.raises(UserError, match="301"):
        model_config(config, 301)


def test_a_model_of_another_family():
    config = arguments.parse(["--model.preset", "gpt2-355M", "--model.layers", "2"])
    assert (config.model.positions, config.model.bias, config.model.rope_base) == (1024, True, None)
    model = model_config(config, 300)
    assert (type(model), model.layers, model.heads, model.vocab_size) == (gpt.Config, 2, 16, 300)
    assert "nearest: gpt2-1.5B" in refused("--model.preset", "gpt2-1.5")
    longer = ["--model.preset", "gpt-toy", "--data.length"]
    assert "data.length = 513" in refused(*longer, "513") and "nearest: 512" in refused(
        *longer, "513"
    )
    assert arguments.parse([*longer, "512"]).data.length == 512


def test_ranges():
    assert Range(0, 1, above=True).holds(1) and not Range(0, 1, above=True).holds(0)
    assert Range(0, 1, below=True).holds(0) and not Range(0, 1, below=True).holds(1)
    assert not Range(0, 1).holds(float("nan"))


def test_experiments_state_only_what_differs_and_say_what_they_are():
    for name, make in EXPERIMENTS.items():
        text = make.__doc__ or ""
        assert make().run.name == name
        for word in ("Command:", "Hardware:", "Tokens:", "Time:", "Result:"):
            assert word in text, f"{name} does not say its {word}"
        assert f"-m train {name}" in text
        assert arguments.parse([name]) == make()  # as it stands it is a valid config


def test_config_json_holds_every_field():
    saved = json.loads(arguments.to_json(Config()))
    assert {f"{g}.{f}" for g, part in saved.items() for f in part} == set(flatten(Config()))


def test_an_experiments_own_value_gives_way_to_a_flag():
    """Its tokenizer, to a store that has one; one that is asked for is refused beside a store, as before."""
    given = ["llama_60m", "--data.text", "store:somewhere"]
    assert EXPERIMENTS["llama_60m"]().data.tokenizer == "bpe-32000"
    assert arguments.parse(given).data.tokenizer == Config().data.tokenizer != "bpe-32000"
    with pytest.raises(UserError, match=r"data.tokenizer = bpe-300 would have no effect"):
        arguments.parse([*given, "--data.tokenizer", "bpe-300"])
