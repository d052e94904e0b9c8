"""`python -m train tune`: its small runs, what it prints, and that a kill costs one run at most."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from models import llama
from optax_decay.axes import resolve
from tests.support.runs import flags, write_text
from tests.train.study.test_tune_search import planted
from train import cli
from train.config import tree
from train.config.fields import Config, UserError, model_config
from train.config.tree import flatten
from train.step import families, optimizer, update
from train.step.tasks import LanguageTask
from train.study import results as lines
from train.study.compare.tuning import FIRST_SEED
from train.study.population import Member, population
from train.study.small_runs import numbers
from train.study.tune import main as tune
from train.study.tune import options
from train.study.tune.options import Proxy, Tune, grid, small_config, small_program
from train.study.tune.report import command, report
from train.study.tune.surface import surface

TINY = Proxy(
    width=8,
    head_width=4,
    layers=1,
    length=12,
    batch_size=4,
    steps=6,
    eval_batches=2,
)
PROXY = [
    word
    for name, value in dataclasses.asdict(TINY).items()
    for word in (f"--proxy.{name}", str(value))
]


def real(tmp_path, *more):
    return cli.parse(flags(tmp_path, *more))


def test_the_small_run_is_the_real_one_with_another_shape(tmp_path):
    config = real(
        tmp_path,
        *(
            "--model.width",
            "32",
            "--model.heads",
            "4",
            "--model.kv_heads",
            "2",
            "--run.steps",
            "60",
        ),
        *("--optimizer", "conda", "--optimizer.refresh_every", "200", "--optimizer.clip", "0.5"),
        *("--decay", "huber", "--decay.spectrum.refresh_every", "50"),
    )
    small = small_config(Tune(proxy=TINY), config)
    values, before = flatten(small), flatten(config)
    assert values["optimizer.refresh_every"] == 20 and values["decay.spectrum.refresh_every"] == 10
    often = real(tmp_path, "--optimizer", "sophia", "--optimizer.refresh_every", "7")
    for steps in (2, 6000):
        proxy = dataclasses.replace(TINY, steps=steps)
        kept = flatten(small_config(Tune(proxy=proxy), often))
        assert kept["optimizer.refresh_every"] == 7
    assert values["optimizer.schedule.steps"] == 6 and before["optimizer.schedule.steps"] == 60
    assert values["optimizer.schedule.warmup_steps"] == round(
        before["optimizer.schedule.warmup_steps"] / 10
    )
    assert values["optimizer.clip"] == 0.5 and values["decay.name"] == "huber"
    shape = model_config(small, 11)
    assert (shape.width, shape.heads, shape.kv_heads, shape.layers) == (8, 2, 1, 1)
    # Under μP the real model's hidden matrices then start as its own config says.
    assert shape.init_std * math.sqrt(8 / 32) == pytest.approx(
        model_config(config).init_std, rel=0.01
    )


def test_a_small_run_is_a_run_of_the_trainer(tmp_path, monkeypatch):
    """The losses of a run that the trainer makes of the small config, step by step."""
    monkeypatch.chdir(tmp_path)
    config = real(
        tmp_path,
        "--decay",
        "huber",
        "--optimizer.learning_rate",
        "0.02",
        "--decay.weight_decay",
        "0.7",
    )
    small = small_config(Tune(proxy=TINY), config)
    data = LanguageTask.read(small)
    (found,) = population(
        small_program(Tune(proxy=TINY), small, data), [Member(0.02, 0.7, 0)], data, 6
    )
    model = model_config(small, data.vocab_size)
    params = llama.init(model, jax.random.key(0))
    chosen = tree.replace(small, {"optimizer.learning_rate": 0.02, "decay.weight_decay": 0.7})
    tx = optimizer.build(chosen, resolve(llama.axes(model), params))
    state = update.first_state(params, tx)
    rate = optimizer.schedule(chosen.optimizer)
    step = jax.jit(
        functools.partial(update.train_step, families.Forward(model), tx, rate, 1, False)
    )
    losses = []
    for i in range(6):
        state, noted = step(state, data.batch(i))
        losses.append(float(noted["loss"]))
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)


def names(part):
    """All classes that a choice of the config has."""
    (found,) = (p for p in tree.parts(Config()) if (p.path, p.field) == part)
    return list(found.slot.classes)


CHOICES = [f"--decay {name}" for name in names(("decay", "decay"))]
CHOICES += [f"--optimizer {name}" for name in names(("optimizer", "direction"))]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_decay_and_every_optimizer_can_be_tuned(tmp_path, choice):
    """Their numbers are traced, and a step of them keeps the types of the state."""
    config, chosen = real(tmp_path, *choice.split()), Tune(proxy=TINY)
    options.check(chosen, config)
    small = small_config(chosen, config)
    data = LanguageTask.read(small)
    program = small_program(chosen, small, data)
    rates, decays = grid(chosen, config)
    assert len(rates) == 3 and (len(decays) > 1) == options.decays(config)
    own = numbers(rates[0], decays[-1], 6, 0)
    state = jax.eval_shape(program.init, own)
    tokens = jax.ShapeDtypeStruct((2, 4, 13), np.int32)
    after, losses = jax.eval_shape(program.advance, state, own, tokens)
    assert losses.shape == (2,) and jax.tree.structure(after) == jax.tree.structure(state)


REFUSED = {
    "--proxy.epochs 0": "must be above 0; nearest: 1",
    "--model.preset vit-toy": "learns images",
    "--width.base 4": "leave it out",
    "--decay.timescale 1e6": "decay.timescale: tune finds .* leave it out",
    "--optimizer one_bit_adam --proxy.batch_size 5": "nearest: 6",
    "--proxy.width 12 --proxy.head_width 8": "nearest: --proxy.width 8",
    "--proxy.width 64": "nearest: --proxy.width 16",
    "--seeds 0": "must be 1 or more",
    "--minutes 0": "above 0",
    "--learning_rates 0.1 0.2": "3 or more increasing",
    "--learning_rates 0.1 0.2 0.8": "geometric",
    "--weight_decays 0 0.3": "2 or more",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_tuned_is_refused(tmp_path, words):
    base = flags(tmp_path) if "vit" not in words else []
    chosen, rest = tune.parse([*base, *PROXY, *words.split()])
    with pytest.raises(UserError, match=REFUSED[words]):
        options.check(chosen, cli.parse(rest))


def test_the_printed_command_trains_at_the_real_width(tmp_path):
    given = flags(tmp_path, "--optimizer.learning_rate=0.5", "--run.steps", "60")
    found, chosen = surface(planted()), Tune(proxy=TINY)
    text = command(chosen, cli.parse(given), given, found.best)
    (line,) = [line for line in text.splitlines() if "python -m train" in line]
    config = cli.parse(line.split("python -m train ")[1].split())
    assert config.width.base == 8 and config.width.base_head == 4
    assert config.optimizer.learning_rate == 0.01 and flatten(config)["decay.weight_decay"] == 1
    assert "learning_rate=0.5" not in text
    assert model_config(config).init_std == options.first_deviation(chosen, cli.parse(given))
    data = LanguageTask.read(small_config(chosen, cli.parse(given)))
    whole = report(chosen, cli.parse(given), given, planted(), found, data)
    assert "recommended" in whole and "diverged" in whole and "factors of two" in whole
    bounded = flags(tmp_path, "--decay", "cpr")
    text = command(chosen, cli.parse(bounded), bounded, found.best)
    assert "--width.base" not in text.split("python -m train")[1].split("\n")[0]
    assert "hold at width 8 only" in text and "--decay.weight_decay" not in text


def command_line(tmp_path, folder):
    return [
        *flags(tmp_path, "--decay", "l2"),
        *PROXY,
        *("--seeds", "2", "--trials", "10", "--folder", str(folder)),
    ]


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert tune.main(command_line(tmp_path, whole)) == 0
    said = capsys.readouterr().out
    assert "recommended" in said and "left" in said and "python -m train --model" in said
    assert (whole / "tune.txt").read_text().strip() in said and (whole / "tune.png").exists()
    usual = lines.read(whole / "results.jsonl")
    assert len(usual) >= 14 and len({r["seed"] for r in usual}) == 2

    # Another process, killed with no chance to tidy up as soon as it has a few results.
    root = os.getcwd()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "train", "tune", *command_line(tmp_path, killed)],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    path = killed / "results.jsonl"
    until = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    begun = path.read_bytes().count(b"\n")
    assert begun >= 3
    with path.open("a") as file:
        file.write('{"learning_rate": 0.00')  # a line that the kill has torn
    assert tune.main(command_line(tmp_path, killed)) == 0
    assert f"{begun} runs are done already" in capsys.readouterr().out
    again = lines.read(path)
    facts = lambda found: [
        [r[n] for n in ("learning_rate", "weight_decay", "seed", "loss")] for r in found
    ]
    assert facts(again) == facts(usual)
    assert json.loads((killed / "environment.json").read_text())[1]["text"]["digest"]


def test_runs_side_by_side_find_the_same(tmp_path, monkeypatch, capsys):
    """New points get all their seeds at once; on eight devices."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "together"
    assert tune.main([*command_line(tmp_path, folder), "--side_by_side", "True"]) == 0
    assert "runs train side by side" in capsys.readouterr().out
    found = lines.read(folder / "results.jsonl")
    assert [r["seed"] - FIRST_SEED for r in found[:18]] == [0] * 9 + [1] * 9
    alone = tmp_path / "alone"
    assert tune.main(command_line(tmp_path, alone)) == 0
    usual = {tuple(r.values())[:3]: r["loss"] for r in lines.read(alone / "results.jsonl")}
    for r in found:
        if tuple(r.values())[:3] in usual:
            assert r["loss"] == pytest.approx(usual[tuple(r.values())[:3]], rel=1e-4)


def test_a_search_in_which_every_run_diverges_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wild = [*command_line(tmp_path, tmp_path / "wild"), "--trials", "9"]
    wild += ["--learning_rates", "1e25", "1e27", "1e29", "--weight_decays", "1e20", "1e21"]
    with pytest.raises(UserError, match=r"diverged, down to the learning rate .*lower"):
        tune.main(wild)


def test_the_time_is_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "short"
    assert tune.main([*command_line(tmp_path, folder), "--minutes", "0.0001"]) == 0
    assert "minutes are over; the same command goes on" in capsys.readouterr().out
    assert len(lines.read(folder / "results.jsonl")) == 1


@pytest.mark.parametrize("flag", ["--processes", "--coordinator", "--process=1"])
def test_tune_does_not_start_in_several_processes(flag):
    with pytest.raises(UserError, match=f"{flag}: tune runs in one process"):
        tune.parse([flag, "2"])
