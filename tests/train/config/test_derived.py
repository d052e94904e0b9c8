"""Values that follow from other fields: computed once, kept in config.json, the same when a run is prolonged."""

import json

import pytest

from train.cli import parse
from train.config.continuation import refuse_changes
from train.config.derived import derived
from train.config.fields import Config
from train.config.saved import from_json, to_json
from train.config.tree import flatten, parts, replace

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
