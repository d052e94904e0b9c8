"""A ViT in the training program: what a run leaves, that it goes on bit for bit, what it refuses."""

import json
import re
import signal

import pytest

from tests.support import pictures
from tests.support.runs import interrupt_after, losses, records
from train import __main__ as command
from train import main
from train.weights.trained import load_trained

# With paths that are dropped at random, two micro batches and the mean of the weights in the state.
ASKED = [
    *("--model.drop_path", "0.5", "--images.average", "0.8", "--run.micro_batches", "2"),
    *("--run.steps", "5", "--optimizer.learning_rate", "1e-2"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of five steps that nothing disturbed; its folder is `whole / "run"`."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.main(pictures.flags(folder, *ASKED)) == 0
    return folder


def test_a_run_leaves_what_runs_on_text_leave(whole, capsys):
    run = whole / "run"
    figures = {path.name for path in (run / "figures").iterdir()}
    assert figures == {"loss.png", "top1.png", "decay.png"}
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["images"]["train_images"] == 30 and "text" not in start
    seen = records(run)
    steps = [r for r in seen if r["kind"] == "train"]
    assert [r["images"] for r in steps] == [8, 16, 24, 32, 40]
    held_out = [r for r in seen if r["kind"] == "held_out"]
    assert [r["step"] for r in held_out] == [0, 2, 4, 5]
    assert held_out[0]["loss"] == held_out[0]["average_loss"]
    assert held_out[-1]["loss"] != held_out[-1]["average_loss"]
    # Of 11 images each is right or not.
    for record in held_out:
        for name in ("top1", "average_top1"):
            assert record[name] * 11 == pytest.approx(round(record[name] * 11), abs=1e-9)
    assert command.main(["sample", str(run)]) == 2
    assert "sample is for language models" in capsys.readouterr().err
    trained = load_trained(run)
    assert trained.model.classes == pictures.CLASSES and trained.step == 5


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    (tmp_path / "shapes").symlink_to(whole / "shapes")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert main.main(pictures.flags(tmp_path, *ASKED)) == 128 + signal.SIGINT
    assert max(losses(tmp_path / "run")) == 3
    line = re.search(r"go on +\S.* -m train (--resume \S+)", capsys.readouterr().out)
    assert line is not None and main.main(line.group(1).split()) == 0
    assert records(tmp_path / "run") == records(whole / "run")
    a, b = (
        (folder / "run/checkpoints/5/meta/metadata").read_text() for folder in (tmp_path, whole)
    )
    digests = [json.loads(text)["digests"] for text in (a, b)]
    assert digests[0] == digests[1] and any(path.startswith("average/") for path in digests[0])


def test_missing_images_say_what_to_run_and_where(tmp_path, capsys):
    assert command.main(["vit_tiny", "--images.folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "tfds build imagenet2012" in said and f"{tmp_path}/imagenet2012" in said
    assert "--images.folder" in said and "Traceback" not in said
    assert command.main(["plan", "vit_tiny"]) == 2
    assert "plan is for language models" in capsys.readouterr().err
