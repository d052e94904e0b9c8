"""Every command that the program prints can be given as it stands, in folders with spaces too."""

import contextlib
import io
import pathlib
import re
import shlex

import pytest

from tests.support.runs import flags, losses, write_text
from tests.train.config.test_derived import DECAYS, OPTIMIZERS, SCHEDULES
from train import __main__ as command
from train import main
from train.cli import parse
from train.config.continuation import refuse_changes
from train.config.saved import to_json
from train.config.tree import replace
from train.data import token_store
from train.errors import UserError

PLACE = "my runs; 'a' $HOME (2)"


def arguments(text: str) -> list[str]:
    """Those of the only command in a text, as a shell would split them."""
    (line,) = re.findall(r"python\S*(?: \S*environment\.py)? -m train (.*)$", text, re.M)
    return shlex.split(line)


def began(folder: pathlib.Path, *asked: str) -> main.Config:
    """The config of a run of eight steps, in its folder as it stands after the start."""
    folder.mkdir(parents=True)
    config = parse(["toy", *asked, "--run.steps", "8", "--run.folder", str(folder)])
    (folder / "config.json").write_text(to_json(config))
    return config


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_command_that_continues_a_run_is_taken(optimizer, schedule, tmp_path):
    """After the last step with twice as many, and after a stop as it was."""
    run = tmp_path / PLACE
    config = began(run, "--optimizer", optimizer, "--optimizer.schedule", schedule)
    for done, steps in ((8, 16), (5, 8)):
        goes_on = parse(arguments(main.further(config, run, done)))
        assert goes_on == replace(config, {"run.steps": steps})
        refuse_changes(config, goes_on, str(run))


@pytest.mark.parametrize("decay", DECAYS)
def test_so_is_that_of_a_run_with_any_decay(decay, tmp_path):
    run = tmp_path / PLACE
    config = began(run, "--decay", decay)
    goes_on = parse(arguments(main.further(config, run, 8)))
    assert goes_on == replace(config, {"run.steps": 16})
    refuse_changes(config, goes_on, str(run))


def test_flags_of_errors_can_be_given(tmp_path):
    """`--resume FOLDER` in the errors of a run that cannot go on, that is full, and whose checkpoint is not written."""
    run = tmp_path / PLACE
    config = began(run)
    with pytest.raises(UserError) as changed:
        refuse_changes(config, replace(config, {"optimizer.learning_rate": 0.5}), str(run))

    class Full:
        steps = (4,)

        def wait(self):
            raise OSError("the disk is full")

    with pytest.raises(UserError) as full:
        main.finish(Full(), run)
    for error in (changed, full):
        (given,) = re.findall(r"--resume (.*?)(?:\. To start|\.$)", str(error.value), re.M)
        assert parse(["--resume", *shlex.split(given)]) == config


def test_the_command_that_makes_a_token_store_can_be_given(tmp_path):
    store = tmp_path / PLACE
    with pytest.raises(FileNotFoundError) as error:
        token_store.open_store(store)
    text = str(error.value)
    words = shlex.split(text[text.index("python -m train tokenise") :])
    assert words[3:] == ["tokenise", "--out", str(store), "--source", "TEXT"]


def test_a_printed_command_goes_on_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    place = tmp_path / PLACE
    place.mkdir()
    write_text(place)
    more = [
        "--run.steps",
        "2",
        "--run.eval_every",
        "9",
        "--run.save_every",
        "9",
        "--optimizer.schedule",
        "constant",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert command.main(flags(place, *more)) == 0
    with contextlib.redirect_stdout(io.StringIO()) as again:
        assert command.main(arguments(said.getvalue())) == 0
    assert sorted(losses(place / "run")) == [1, 2, 3, 4]
    assert arguments(again.getvalue())[-1] == "8"
    assert "warning" not in said.getvalue()
