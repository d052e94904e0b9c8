"""The help of the program: one screen first, then topics; and what a misspelt word is answered."""

import re
import subprocess
import sys

import pytest

from train import __main__ as program
from train import help
from train.cli import parse
from train.commands import COMMANDS
from train.config.experiments import EXPERIMENTS
from train.config.fields import Config
from train.config.tree import flatten, leaves
from train.errors import UserError


def shown(capsys, *arguments):
    """What a request for help prints, without boxes."""
    with pytest.raises(SystemExit) as left:
        parse(list(arguments))
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def flags_in(text):
    return {name for name in leaves(Config()) if f"--{name} " in text}


def test_the_first_screen_is_one_screen_and_names_everything(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 92
    words = set(re.findall(r"\w+", "\n".join(lines)))
    commands = set(" ".join(COMMANDS).split())
    assert words >= {*EXPERIMENTS, *commands, *help.groups()} - {"run"}
    assert not [line for line in lines if re.match(r" +\w+ *$", line)], "a name without a text"


def test_the_first_screen_needs_neither_models_nor_devices():
    """Flax, Orbax and a backend take seconds."""
    code = (
        "import sys\nfrom train.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "from jax._src import xla_bridge\n"
        "assert not {'flax', 'orbax', 'models', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "inside", "outside"),
    [
        (["--help", "optimizer"], {"optimizer.b1", "optimizer.schedule.final"}, {"run.steps"}),
        (["-h", "mesh", "run"], {"mesh.fsdp", "run.steps"}, {"optimizer.b1", "model.width"}),
        (["--help", "decay.threshold"], {"decay.threshold.factor"}, {"decay.weight_decay"}),
        (["--help", "batch"], {"data.batch_size", "run.micro_batches"}, {"data.text"}),
        (["--help", "--run.save-every"], {"run.save_every", "run.steps"}, {"optimizer.b1"}),
        (["--optimizer", "--help"], {"optimizer.b1"}, {"run.steps"}),
    ],
)
def test_a_topic_shows_its_flags_alone(capsys, arguments, inside, outside):
    found = flags_in(shown(capsys, *arguments))
    assert inside <= found and not outside & found


def test_a_choice_beside_help_is_its_topic(capsys):
    text = shown(capsys, "--optimizer", "conda", "--help")
    assert "--optimizer.refresh_every INT" in text and "--optimizer conda is chosen" in text
    assert "--run.steps" not in text and "--decay.mask" not in text
    both = shown(capsys, "--help", "--optimizer=root", "--decay", "lp")
    assert "--optimizer.outliers" in both or "--optimizer root is chosen" in both
    assert "--decay.p FLOAT" in both and "--run.steps" not in both


def test_a_preset_beside_help_decides_which_fields_of_a_model_are_shown(capsys):
    gpt = shown(capsys, "--model.preset", "gpt2-124M", "--help")
    assert "--model.bias" in gpt and "--model.rope_base" not in gpt and "gpt2-124M)" in gpt
    llama = shown(capsys, "--help", "model")
    assert "--model.bias" not in llama and "--model.rope_base" in llama


def test_a_part_that_is_off_shows_its_flags(capsys):
    assert "--decay.spectrum.high FLOAT" in shown(capsys, "--help", "decay.spectrum")
    assert "--width.base INT" in shown(capsys, "--help", "width")


def test_an_experiment_shows_its_text_and_its_flags_make_it(capsys):
    with pytest.raises(SystemExit):
        program.main(["toy", "--help"])
    text = capsys.readouterr().out
    assert "Result: held-out loss" in text
    flags = re.findall(r"^  --(\S+) (.*)$", text, re.M)
    again = parse([word for name, value in flags for word in (f"--{name}", *value.split())])
    assert again == parse(["toy"]) and flatten(again) != flatten(parse([]))


def test_a_command_is_a_topic(capsys):
    for arguments in (["--help", "sample"], ["help", "sample"], ["sample", "--help"]):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert "python -m train sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["--help", "optimiser"], "optimizer"),
        (["--help", "wdith"], "width"),
        (["--help", "learning_rat"], "optimizer.learning_rate"),
        (["--help", "tunne"], "tune"),
        (["benhc"], "bench"),
        (["conda_60"], "conda_60m"),
        (["sampel"], "sample"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(capsys, arguments, nearest):
    try:
        assert program.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"nearest: {nearest}." in said
    except SystemExit:
        assert f"--{nearest} " in capsys.readouterr().out


def test_every_command_can_be_imported_and_says_what_it_does():
    import importlib.util

    for name, command in COMMANDS.items():
        assert importlib.util.find_spec(command.module) is not None, name
        assert 10 < len(command.does) <= 70 and not command.does.endswith("."), name


def test_no_topic_is_a_user_error():
    with pytest.raises(UserError, match="There is no help on 'xyzzy'"):
        parse(["--help", "xyzzy"])
