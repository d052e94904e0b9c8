"""Values that follow from other fields: computed once, kept in config.json, the same when a run is prolonged."""

import json

import pytest

from train.cli import parse
from train.config.continuation import refuse_changes
from train.config.derived import derived
from train.config.fields import Config
from train.config.saved import from_json, to_json
from train.config.tree import flatten, parts, replace
from train.errors import UserError

OPTIMIZERS, SCHEDULES, DECAYS = (
    sorted(next(p for p in parts(Config()) if p.path == path and p.slot.choice).slot.classes)
    for path in ("optimizer", "optimizer.schedule", "decay")
)


def test_the_numbers():
    def found(*flags):
        return flatten(parse(["toy", *flags]))

    plain = found("--run.steps", "8")
    assert plain["optimizer.schedule.steps"] == 8 and plain["optimizer.schedule.warmup_steps"] == 0
    long = found("--run.steps", "90000")
    assert long["optimizer.schedule.warmup_steps"] == 2000
    own = found("--run.steps", "70", "--optimizer.schedule.steps", "50")
    assert (own["optimizer.schedule.steps"], own["optimizer.schedule.warmup_steps"]) == (50, 5)
    constant = found("--run.steps", "70", "--optimizer.schedule", "constant")
    assert constant["optimizer.schedule.warmup_steps"] == 7
    one_bit = ["--optimizer", "one_bit_adam", "--run.steps", "50"]
    assert found(*one_bit)["optimizer.freeze"] == 10
    assert found(*one_bit, "--optimizer.schedule.warmup_steps", "20")["optimizer.freeze"] == 20
    assert found(*one_bit, "--optimizer.freeze", "settled")["optimizer.freeze"] == "settled"
    bound = ["--decay", "cpr", "--decay.bound", "warm_start", "--run.steps", "50"]
    assert found(*bound)["decay.bound.steps"] == 10
    assert found(*bound, "--decay.bound.steps", "7")["decay.bound.steps"] == 7


def test_nothing_is_left_to_derive_and_it_is_done_once():
    for name in OPTIMIZERS:
        config = derived(replace(Config(), {"optimizer.name": name}))
        assert not {"run", "tenth", "fifth", "twice"} & set(map(str, flatten(config).values()))
        assert derived(config) == config
        with pytest.raises(TypeError, match="derived first"):
            Config().optimizer.schedule.build(1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_is_prolonged_as_it_was(optimizer, schedule, tmp_path):
    """What a run wrote goes on with --resume RUN --run.steps 16: nothing but run.steps has changed."""
    run = tmp_path / "run"
    run.mkdir()
    asked = ["toy", "--optimizer", optimizer, "--optimizer.schedule", schedule]
    began = parse([*asked, "--run.steps", "8", "--run.folder", str(run)])
    (run / "config.json").write_text(to_json(began))
    longer = parse(["--resume", str(run), "--run.steps", "16"])
    assert longer == replace(began, {"run.steps": 16})
    refuse_changes(began, longer, str(run))
    assert from_json(json.dumps(json.loads(to_json(longer))), "there") == longer


@pytest.mark.parametrize("decay", DECAYS)
def test_so_is_a_run_with_any_decay(decay, tmp_path):
    began = parse(["toy", "--decay", decay, "--run.steps", "8", "--run.folder", str(tmp_path)])
    (tmp_path / "config.json").write_text(to_json(began))
    longer = parse(["--resume", str(tmp_path), "--run.steps", "16"])
    assert longer == replace(began, {"run.steps": 16})


@pytest.mark.parametrize("coupling", ["learning_rate", "corrected", "schedule", "independent"])
def test_a_timescale_in_tokens_is_a_weight_decay(coupling):
    """At the peak rate, weights that get no gradient fade to 1/e within so many tokens, to first order in a step."""
    flags = [*("toy", "--data.batch_size", "4", "--data.length", "32", "--decay", "l2")]
    flags += [*("--decay.coupling", coupling, "--optimizer.learning_rate", "0.02")]
    config = parse([*flags, "--decay.timescale", "5e4"])
    strength = flatten(config)["decay.weight_decay"]
    shrink = strength * (0.02 if coupling in ("learning_rate", "corrected") else 1)
    assert shrink == pytest.approx(4 * 32 / 5e4, rel=1e-12) and strength != 0.1
    # The same config again: read from its file, prolonged, and with the number that it stands for.
    assert from_json(to_json(config), "it") == config == derived(config)
    again = parse([*flags, "--decay.timescale", "5e4", "--decay.weight_decay", repr(strength)])
    assert flatten(again)["decay.weight_decay"] == strength
    # The experiment has a weight_decay of its own, which gives way.
    images = ["vit_tiny", "--decay", "l2", "--decay.coupling", coupling, "--decay.timescale", "5e4"]
    shrink = 4 / 5e4 / (1 if coupling in ("schedule", "independent") else 0.5)
    more = ["--data.batch_size", "4", "--optimizer.learning_rate", "0.5"]
    found = flatten(parse([*images, *more]))["decay.weight_decay"]
    assert found == pytest.approx(shrink, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--decay.weight_decay", "0.37"],
            "stands for decay.weight_decay = 2.048 here, .* 0.37 is",
        ),
        (["--decay", "l1"], "does not go with decay.name l1.* allowed are decay.name l2"),
        (["--decay.schedule", "log_time", "--decay.coupling", "schedule"], "schedule log_time"),
        (["--data.batch_size", "4096"], "less than the data of one step, .*nearest"),
    ],
)
def test_a_timescale_that_contradicts_other_fields_is_refused(flags, says):
    with pytest.raises(UserError, match=f"decay.timescale = 50000 .*{says}"):
        parse(["toy", "--decay", "l2", "--decay.timescale", "5e4", *flags])
