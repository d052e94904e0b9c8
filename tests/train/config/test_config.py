"""Configs: what is refused and how, what may be left open, where a run starts from."""

import json
import random

import pytest

from models import gpt
from train import cli as arguments
from train.config import saved
from train.config.checks import check
from train.config.derived import derived
from train.config.experiments import EXPERIMENTS
from train.config.fields import Config, UserError, differences, model_config
from train.config.ranges import Range
from train.config.rules import MAY_CHANGE
from train.config.tree import as_dict, flatten, leaves, replace, slots, texts
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
        ("--optimizer.schedule.final 1.5", "1.5", "0 <= value <= 1", "nearest: 1"),
        ("--decay.weight_decay -0.5", "-0.5", "0 or more", "nearest: 0"),
        ("--decay.threshold 0", "0.0", "above 0", "above 0"),
        ("--decay lp --decay.p 0.8", "0.8", "1 <= value <= 2", "nearest: 1"),
        ("--decay cpr --decay.bound uniform --decay.bound.size 0", "0.0", "above 0", "above 0"),
        ("--optimizer.spikes.window 3", "3", "4 <= value <= 100000", "nearest: 4"),
        ("--optimizer.spikes.window 2000000000", "2000000000", "<= 100000", "nearest: 100000"),
        ("--optimizer.learning_rate inf", "inf", "numbers above 0", "nearest: a finite number"),
        ("--data.batch_size 2147483647 --run.micro_batches 2", "2", "2147483647", "nearest: 1"),
        ("--width.base 0", "0", "1 or more", "nearest: 1"),
        ("--run.steps 0", "0", "1 or more", "nearest: 1"),
        ("--run.seed 99999999999", "99999999999", "at most 2147483647", "nearest: 2147483647"),
        ("--run.name ../x", "'../x'", "no slashes", "nearest: '..-x'"),
        ("--run.steps 9 --optimizer.schedule.warmup_steps 12", "12", "0 to 9", "nearest: 9"),
        ("--data.batch_size 6 --run.micro_batches 4", "4", "batch_size = 6", "nearest: 3"),
        ("--model.preset 60m", "'60m'", "tiny", "nearest: 60M"),
        ("--model.heads 5", "5", "divide width=128", "nearest: heads=4"),
        ("--model.width 25", "25", "heads=4 must divide", "nearest: width=24"),
        ("--model.width 25 --model.heads 3", "25", "heads=3", "nearest: width=24 with heads=4"),
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
        assert flags.split()[-2].split(".")[-1] in message  # the field's name


@pytest.mark.parametrize(
    "flags",
    [
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


@pytest.mark.parametrize(
    ("flags", "owner", "nearest"),
    [
        ("--decay l2 --decay.threshold 0.1", "--decay huber, fair,", "nearest: --decay.timescale"),
        (
            "--decay.threshold 0.1 --decay.threshold.factor 2",
            "--decay.threshold mean, rms or running_mean; fixed has",
            "nearest: --decay.threshold.value",
        ),
        (
            "--decay.threshold mean --decay.threshold.memory 0.9",
            "--decay.threshold running_mean; mean has",
            "nearest: --decay.threshold.factor",
        ),
        ("--decay cpr --decay.spectrum.low 1", "--decay huber, adadecay,", "--decay.measure"),
        (
            "--optimizer.name lion --optimizer.eps 1e-6",
            "--optimizer adam, adam_hyperball,",
            "optimizer.b2",
        ),
        (
            "--optimizer.gamma 0.1",
            "--optimizer sophia; adam has: --optimizer.b1, --optimizer.b2, --optimizer.eps;",
            "nearest: --optimizer.b2",
        ),
        (
            "--optimizer.schedule constant --optimizer.schedule.final 0.5",
            "--optimizer.schedule cosine, linear or trapezoid; constant has",
            "nearest: --optimizer.schedule.warmup_steps",
        ),
        (
            "--optimizer.schedule constant --optimizer.schedule.steps 5",
            "--optimizer.schedule cosine, linear or trapezoid",
            "nearest: --optimizer.schedule.warmup_steps",
        ),
    ],
)
def test_a_field_of_another_class_is_refused_with_that_class(flags, owner, nearest):
    *rest, flag, _ = flags.split()
    message = refused(*flags.split())
    assert f"{flag} belongs to {owner}" in message and nearest in message
    arguments.parse(rest)  # fine alone


def test_forms_that_a_pull_does_not_have_cannot_be_written(capsys):
    for pull in ("pseudo_huber", "log_cosh", "lp", "awd"):
        with pytest.raises(SystemExit):
            arguments.parse(["--decay", pull, "--decay.form", "proximal"])
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "Expected one of ('explicit', 'cautious')" in said


def test_a_typo_in_a_flag_names_the_flag_that_was_meant(capsys):
    with pytest.raises(SystemExit) as error:
        arguments.parse(["--optimizer.learning_rat", "1"])
    said = capsys.readouterr()
    assert error.value.code == 2
    assert "--optimizer.learning_rate" in said.err + said.out


def test_help_all_shows_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--help", "all"])
    plain = capsys.readouterr().out
    text = " ".join(plain.replace("│", " ").split())
    hidden = {f"--{name} " for name in leaves(Config()) if f"--{name} " not in text}
    # Those of other families of models, which another preset shows.
    assert {name.split(".")[0] for name in hidden} == {"--model", "--images"}
    assert not {"--model.heads ", "--model.rope_base ", "--model.preset "} & hidden
    for choice in (
        "optimizer adam",
        "optimizer.schedule cosine",
        "decay huber",
        "decay.threshold mean",
        "decay.schedule constant",
    ):
        assert f"--{choice} is chosen" in text
    for absent in ("optimizer.spikes.sigma 6.0", "decay.spectrum.score hill", "width.base NUMBER"):
        assert f"any of its flags switches it on, such as --{absent}" in text
    assert len(plain.splitlines()) < 240
    assert all(name in text for name in families.PRESETS)
    assert "Peak learning rate" in text


def test_every_field_has_a_docstring():
    for make in all_classes():
        for slot in slots(make):
            # Parts have the docstring of their class.
            assert slot.classes or texts(make)[slot.field.name], (
                f"{make.__name__}.{slot.field.name}"
            )
        assert make.__doc__ and not make.__doc__.startswith(make.__name__ + "("), make


def test_a_run_starts_from_an_experiment_a_file_or_a_folder(tmp_path):
    plain = arguments.parse([])
    assert plain == arguments.parse([DEFAULT]) == arguments.parse(["--experiment", DEFAULT])
    assert plain == derived(EXPERIMENTS[DEFAULT]())
    path = tmp_path / "config.json"
    path.write_text('{"run": {"steps": 7}, "decay": {"mask": ["head"]}}')
    read = arguments.parse(["--config", str(path), "--run.seed", "3"])
    assert (read.run.steps, read.run.seed, read.decay.strength.mask) == (7, 3, ("head",))
    resumed = arguments.parse([f"--resume={tmp_path}", "--run.steps", "20"])
    assert resumed.run.folder == str(tmp_path)
    # The schedule keeps the length it had; only the run gets longer.
    assert (resumed.run.steps, resumed.optimizer.schedule.steps) == (20, 7)
    assert "one place" in refused(DEFAULT, "--resume", str(tmp_path))
    assert "no config.json" in refused("--resume", str(tmp_path / "config"))
    assert "needs a value" in refused("--resume")


def test_json_round_trip_of_every_experiment():
    for make in EXPERIMENTS.values():
        for config in (make(), derived(make())):
            assert saved.from_json(saved.to_json(config), "there") == config


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
        ('{"optimizer": {"schedule": {"name": "cosin"}}}', "nearest: 'cosine'"),
        ('{"optimizer": {"schedule": "cosine"}}', "optimizer.schedule must hold fields, such as"),
        ('{"decay": {"threshold": {"name": "maen"}}}', "nearest: 'mean'"),
        (
            '{"decay": {"threshold": {"memory": 0.9}}}',
            "belongs to decay.threshold running_mean; nearest",
        ),
        ('{"optimizer": {"name": "conda", "gamma": 1}}', "belongs to optimizer sophia; nearest"),
        ('{"optimizer": {"name": "cond"}}', "nearest: 'conda'"),
        ('{"optimizer": {"name": 3}}', "optimizer = 3 is not one of"),
        ('{"width": {"rule": "constant"}}', "width.base is missing"),
        ('{"decay": null}', "decay must hold fields, such as"),
        ('{"decay": {"mask": ["hiden"]}}', "nearest: 'hidden'"),
        ('{"decay": {"mask": "hidden"}}', "expected a list"),
    ],
)
def test_a_bad_json_config_is_refused(text, said):
    with pytest.raises(UserError, match="there") as error:
        saved.from_json(text, "there")
    assert said in str(error.value)


def test_noise_in_a_config_is_a_config_or_refused_in_words():
    """A thousand files with bytes changed, and values of other types: never another exception."""
    generator, plain = random.Random(0), saved.to_json(Config())
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
            part = generator.choice([part for part in groups.values() if part])
            part[generator.choice(list(part))] = generator.choice(strange)
            text = json.dumps(groups).encode()
        try:
            config = saved.from_json(text.decode(errors="replace"), "there")
            check(derived(config))
        except UserError:
            refusals += 1
        else:
            assert saved.from_json(saved.to_json(config), "there") == config
    assert 300 < refusals < 1000  # some noise is in the digits of a number


def test_none_means_off_or_as_the_preset_has_it():
    full = flatten(derived(Config()))
    assert {name for name, value in full.items() if value is None} == {
        # As the preset has it.
        *(f"model.{name}" for name in vars(Config().model) if name != "preset"),
        # Left to the devices and the clock, or off.
        *("mesh.data", "run.folder", "run.wandb", "run.keep_every"),
        *("images.folder", "images.held_out", "images.average"),
        *("optimizer.spikes", "decay.spectrum", "decay.timescale", "width"),
    }


def test_differences_do_not_tell_the_presets_value_from_none():
    a = derived(Config())
    layers = families.PRESETS[a.model.preset].layers
    b = replace(a, {"model.layers": layers, "run.steps": 9, "optimizer.name": "lion"})
    changed = differences(a, b)
    assert changed["run.steps"] == (a.run.steps, 9) and "model.layers" not in changed
    assert changed["optimizer.name"] == ("adam", "lion")
    assert changed["optimizer.eps"] == (1e-8, "absent")
    assert differences(a, replace(a, {"model.layers": layers + 1})).keys() == {"model.layers"}
    assert set(MAY_CHANGE) <= set(flatten(a))


def test_the_embedding_must_hold_every_token():
    config = replace(Config(), {"model.vocab_size": 300})
    assert model_config(config, 257).vocab_size == 300
    assert model_config(Config(), 257).vocab_size == 257
    with pytest.raises(UserError, match="301"):
        model_config(config, 301)


def test_a_model_of_another_family():
    config = arguments.parse(["--model.preset", "gpt2-355M", "--model.layers", "2"])
    model = model_config(config, 300)
    assert (model.positions, model.bias, hasattr(model, "rope_base")) == (1024, True, False)
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
        assert arguments.parse([name]) == derived(make())  # as it stands it is a valid config


def test_config_json_holds_every_field_of_what_is_chosen_and_no_other():
    written = json.loads(saved.to_json(Config()))
    assert written == json.loads(json.dumps(as_dict(Config())))
    assert set(dotted(written)) == set(flatten(Config()))
    assert written["optimizer"]["name"] == "adam" and "gamma" not in written["optimizer"]


def dotted(nested: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in nested.items():
        full = f"{prefix}{name}"
        found += dotted(value, full + ".") if isinstance(value, dict) else [full]
    return found


def all_classes() -> set[type]:
    """The dataclasses that a config can be made of."""
    found, waiting = set(), [Config]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        inside = [other for slot in slots(kind) for other in slot.classes.values()]
        waiting += [other for other in inside if other not in found]
    return found


def test_an_experiments_own_value_gives_way_to_a_flag():
    """Its tokenizer, to a store that has one; one that is asked for is refused beside a store, as before."""
    given = ["llama_60m", "--data.text", "store:somewhere"]
    assert EXPERIMENTS["llama_60m"]().data.tokenizer == "bpe-32000"
    assert arguments.parse(given).data.tokenizer == Config().data.tokenizer != "bpe-32000"
    with pytest.raises(UserError, match=r"data.tokenizer = bpe-300 would have no effect"):
        arguments.parse([*given, "--data.tokenizer", "bpe-300"])


@pytest.mark.parametrize(
    ("flags", "reason", "nearest"),
    [
        ("--optimizer adam_hyperball --decay l2", "hidden would decay in proportion", "mask head"),
        ("--optimizer muon_hyperball --decay stable", "hidden would decay", "decay.mask head"),
        ("--optimizer adam_hyperball --decay cpr", "hidden would decay", "decay.mask head"),
        (
            "--optimizer adam_hyperball --decay l2 --decay.mask hidden",
            "fixes the norm and undoes that",
            "decay.weight_decay 0",
        ),
        (
            "--decay hyperball --decay.sphere hidden head",
            "head would decay in proportion",
            "decay.weight_decay 0",
        ),
        (
            "--optimizer muon_hyperball --decay hyperball",
            "norm set by two links, hyperball and hyperball",
            "decay.name l2 with decay.mask head",
        ),
        (
            "--optimizer muon_hyperball --decay radial_brake --decay.mask head",
            "norm set by two links, radial_brake and hyperball",
            "decay.name l2 with decay.mask head",
        ),
        (
            "--optimizer muon_hyperball --optimizer.sphere vector",
            "roles whose parameters",
            "hidden",
        ),
        (
            "--decay l2 --decay.schedule log_time",
            "decay.coupling = learning_rate",
            "decay.coupling schedule",
        ),
    ],
)
def test_rules_about_norms_and_decays_that_contradict_each_other(flags, reason, nearest):
    with pytest.raises(UserError) as error:
        arguments.parse(flags.split())
    assert reason in str(error.value)
    assert str(error.value).endswith(f"{nearest}.")


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adam_hyperball",  # huber is not proportional to the weights
        "--optimizer adam_hyperball --decay l2 --decay.form cautious",
        "--optimizer muon_hyperball --decay l2 --decay.mask head",
        "--optimizer muon_hyperball --decay l2 --decay.weight_decay 0",
        "--optimizer muon_hyperball --decay toward_initial",
        "--optimizer muon --decay radial_brake",
        "--optimizer root --decay hyperball",
        "--decay l2 --decay.schedule log_time --decay.coupling schedule --decay.weight_decay 4",
    ],
)
def test_rules_about_norms_that_go_with_a_decay(flags):
    arguments.parse(flags.split())
