"""The training program as a whole: what it leaves, that it goes on where it stopped, what it says."""

import json
import os
import pathlib
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from models import gpt, vit
from tests.support import pictures
from tests.support.runs import TOY, flags, interrupt_after, losses, program, records, write_text
from train import __main__ as command
from train import main
from train.cli import parse
from train.config.experiments import EXPERIMENTS
from train.run import checkpoints as checkpoint
from train.run import integrity
from train.run.records import line
from train.step import families
from train.weights.trained import load_trained

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing disturbed; its folder is `whole / "run"`."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.main(flags(folder)) == 0
    return folder


@pytest.fixture(autouse=True)
def no_pictures(whole, monkeypatch):
    """They take a second, and one run has drawn its own before this."""
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])


def final_state(folder: pathlib.Path):
    """The newest checkpoint of a toy run, as arrays."""
    ready = program(folder)
    meta = integrity.verify_digest(
        json.loads((folder / "run/checkpoints/6/meta/metadata").read_text())
    )
    with checkpoint.Checkpoints(folder / "run/checkpoints", 9) as checkpoints:
        state, step = checkpoints.restore(ready.program.placed_shapes(), meta, print)
    assert step == 6
    return jax.device_get(state)


def test_a_run_leaves_its_folder(whole):
    run = whole / "run"
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "environment.json", "decay.txt", "metrics.jsonl", "saved.json", "lock"),
        *("checkpoints", "figures", "tokenizer"),
    }
    assert {p.name for p in (run / "figures").iterdir()} == {"loss.png", "decay.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (run / "figures").iterdir())
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["versions"]["jax"] == jax.__version__ and start["devices"]["count"] == 8
    assert re.fullmatch("[0-9a-f]{64}", start["text"]["digest"])
    assert start["commit"] is None or re.fullmatch("[0-9a-f]{40}", start["commit"])
    assert "head/kernel" in (run / "decay.txt").read_text()


def test_records_have_every_step_and_numbers_that_agree(whole):
    seen = records(whole / "run")
    assert [r["step"] for r in seen if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    held_out = [r for r in seen if r["kind"] == "held_out"]
    assert [r["step"] for r in held_out] == [0, 2, 4, 6]
    assert [r["step"] for r in seen if r["kind"] == "weights"] == [0, 2, 4, 6]
    start = json.loads((whole / "run/environment.json").read_text())[0]
    for record in held_out:
        assert record["perplexity"] == pytest.approx(np.exp(record["loss"]), rel=1e-12)
        bits = record["loss"] / np.log(2) / start["text"]["bytes_per_token"]
        assert record["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    # Before training every token is about as likely as any other.
    assert held_out[0]["loss"] == pytest.approx(np.log(257), abs=0.05)
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.01
    last = [r for r in seen if r["kind"] == "weights"][-1]
    assert last["hidden"]["decaying"] == last["head"]["decaying"] == 1
    assert last["embedding"]["decaying"] == last["vector"]["decaying"] == 0
    assert (
        0.1 < last["hidden"]["beyond"] < 0.4
    )  # about 23 % of normal weights are beyond 1.5 mean|w|


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, number)
        assert main.main(flags(tmp_path)) == 128 + number
    said = capsys.readouterr().out
    assert "stopped after step 3 of 6" in said
    assert max(losses(tmp_path / "run")) == 3
    # As if the process had been killed while it wrote about a step after the last checkpoint.
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(line({"kind": "train", "step": 4, "loss": 99.0}) + '{"kind": "train", "st')
    command_line = re.search(r"go on +\S.* -m train (--resume \S+)", said)
    assert command_line is not None
    assert main.main(command_line.group(1).split()) == 0
    assert records(tmp_path / "run") == records(whole / "run")
    a, b = final_state(tmp_path), final_state(whole)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert [start["start"] for start in starts] == [0, 3]


def test_a_complete_run_says_so_and_can_be_made_longer(whole, tmp_path, capsys):
    assert main.main(flags(whole)) == 0
    said = capsys.readouterr().out
    assert "complete: step 6 of 6" in said and "--run.steps 12" in said
    assert len(losses(whole / "run")) == 6


def test_two_runs_without_a_folder_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [*flags(tmp_path), "--run.folder", "None", "--run.steps", "1", "--run.name", "mine"]
    assert [main.main(asked), main.main(asked)] == [0, 0]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mine-001", "mine-002"]


# These differ from an experiment that is run here in numbers alone: they are traced, not compiled.
SIBLINGS = {
    *(
        "alphadecay_130m",
        "alphadecay_350m",
        "alphadecay_1b",
        "conda_130m",
        "conda_350m",
        "conda_1b",
    ),
    *("conda_gpt2_355m", "sophia_gpt2_355m", "sophia_gpt2_774m"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_starts(name, tmp_path):
    (tmp_path / "texts").mkdir()
    for seed in range(12):  # documents
        write_text(tmp_path, seed).rename(tmp_path / f"texts/{seed}.txt")
    steps = ["--run.steps", "2", "--run.micro_batches", "1", "--data.text", str(tmp_path / "texts")]
    family = families.of(families.PRESETS[EXPERIMENTS[name]().model.preset]).__name__
    toy = flags_of(family.split(".")[1], TOY)
    small = [*toy, *steps, "--data.cache", str(tmp_path), "--run.folder", str(tmp_path / "run")]
    if family == vit.__name__:
        small = pictures.flags(tmp_path, "--run.steps", "2")
    if name in SIBLINGS:
        config = parse([name, *small])
        ready = main.assemble(config, main.read_data(config))
        ready.program.update.lower(ready.program.placed_shapes(), ready.batch(0))
        return
    assert main.main([name, *small]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["optimizer"]["learning_rate"] == EXPERIMENTS[name]().optimizer.learning_rate
    assert records(tmp_path / "run")[-1]["step"] == 2


def test_a_gpt_trains_and_goes_on(tmp_path):
    """Without a line of its own in the trainer: records, decay by role, a checkpoint to go on from."""
    asked = flags_of("gpt", flags(tmp_path))
    assert main.main([*asked, "--run.steps", "4"]) == 0
    assert main.main([*asked, "--optimizer.schedule.steps", "4"]) == 0  # the six steps of TOY
    seen = losses(tmp_path / "run")
    assert list(seen) == [1, 2, 3, 4, 5, 6] and seen[6] < seen[1]
    table = (tmp_path / "run/decay.txt").read_text()
    assert all(name in table for name in ("position/embedding", "blocks/mlp/down/bias"))
    trained = load_trained(tmp_path / "run")
    assert (type(trained.model), trained.model.vocab_size, trained.step) == (gpt.Config, 257, 6)
    assert trained.params["position"]["embedding"].shape == (512, 16)


def flags_of(family: str, asked: list[str]) -> list[str]:
    """The flags of a toy run for a model of another family."""
    if family == "llama":
        return asked
    drop = asked.index("--model.kv_heads")
    asked = [*asked[:drop], *asked[drop + 2 :]]
    return ["gpt-toy" if value == "toy" else value for value in asked]


def test_eight_devices_give_the_losses_of_one(whole, tmp_path):
    grid = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    ready = program(tmp_path, *grid)
    split = ready.program.shardings["params"]["blocks"]["mlp"]["up"]["kernel"].spec
    assert tuple(split) == (None, "fsdp", "tensor")
    moment = (
        ready.program.shardings["optimizer"]
        .inner_state["direction"]
        .mu["blocks"]["mlp"]["up"]["kernel"]
    )
    assert moment.spec == split
    assert main.main(flags(tmp_path, *grid)) == 0
    one, eight = losses(whole / "run"), losses(tmp_path / "run")
    assert set(one) == set(eight)
    # The bound; sums in another order move a loss of 5 by about 1e-6.
    np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-5)
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert starts[0]["mesh"] == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}


def test_a_run_that_diverges_stops_with_advice(tmp_path, capsys):
    wild = [
        "--optimizer.learning_rate",
        "1e30",
        "--optimizer.clip",
        "None",
        "--run.save_every",
        "1",
    ]
    assert command.main(flags(tmp_path, *wild)) == 2
    said = capsys.readouterr()
    assert "diverged" in said.err and "--optimizer.learning_rate" in said.err
    assert "Traceback" not in said.out + said.err
    found = re.search(r"the last (\d+) steps up to (\d+) were skipped", said.err)
    saved = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()]
    # Weights that give no numbers do not push out checkpoints of better ones.
    assert found is not None
    count, last = map(int, found.groups())
    assert count > 0 and max(saved, default=0) <= last - count


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--data.text", "EMPTY"], "contains no text"),
        (["--data.text", "ABSENT"], "no file or folder"),
        (["--data.length", "5000"], "is too short"),
        (["--run.folder", "/proc/x"], "cannot be written"),
        (["--run.folder", "EMPTY/../cache"], "is neither empty nor a run folder"),
        (["--optimizer.learning_rate", "-1"], "learning_rate = -1.0"),
        (["--mesh.tensor", "16"], "there are 8"),
        (["--mesh.data", "3"], "nearest"),
        (["--run.wandb", "mine"], "needs the package wandb"),
    ],
)
def test_what_a_newcomer_meets_is_one_paragraph(whole, tmp_path, capsys, changed, said):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/something").write_text("else")
    changed = [re.sub("^(EMPTY|ABSENT)", rf"{tmp_path}/\1", word) for word in changed]
    text = ["--data.text", str(whole / "text.txt"), "--data.cache", str(whole / "cache")]
    asked = [*TOY, *text, "--run.folder", str(tmp_path / "run"), *changed]
    assert command.main(asked) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "Traceback" not in error and "\n\n" not in error


def start(asked: list[str], **options) -> subprocess.Popen:
    variables = {k: v for k, v in os.environ.items() if k != "CI"}
    cache = jax.config.jax_compilation_cache_dir
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "TERM": "xterm"}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "COLUMNS": "120"}
    line = [sys.executable, "-m", "train", *asked]
    return subprocess.Popen(line, cwd=ROOT, env=variables, **options)


def test_ctrl_c_in_a_pipe_then_on_in_a_terminal(whole, tmp_path):
    long = flags(tmp_path, "--run.steps", "100000", "--run.eval_every", "100000")
    piped = start(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert piped.stdout is not None
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert piped.poll() is None, piped.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    piped.send_signal(signal.SIGINT)
    said, _ = piped.communicate(timeout=120)
    assert piped.returncode == 130
    assert "\x1b" not in said and "\r" not in said and "Traceback" not in said
    assert "saving" in said and f"--resume {tmp_path}/run" in said
    reached = max(losses(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoints/{reached}").is_dir()

    ours, theirs = pty.openpty()
    more = ["--resume", str(tmp_path / "run"), "--run.steps", str(reached + 2)]
    live = start(more, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 120)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    assert live.wait(timeout=60) == 0
    screen = shown.decode()
    assert "\x1b[" in screen and f"step {reached + 2}/{reached + 2}" in screen
    assert f"continued after step {reached}" in screen
    assert max(losses(tmp_path / "run")) == reached + 2


def test_the_command_that_goes_on_works_where_it_is_read(monkeypatch):
    """In an environment that is not activated there may be no `python`."""
    config, folder = parse(["toy"]), pathlib.Path("runs/toy-001")
    monkeypatch.setattr(main.sys, "prefix", str(main.ROOT / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    launched = main.further(config, folder, 3)
    monkeypatch.setenv("VIRTUAL_ENV", str(main.ROOT / ".venv"))
    activated = main.further(config, folder, 3)
    monkeypatch.setattr(main.sys, "prefix", "/anywhere")
    assert launched.split(maxsplit=2)[2] == (
        "python3 train/environment.py -m train --resume runs/toy-001"
    )
    assert activated.split(maxsplit=2)[2] == "python -m train --resume runs/toy-001"
    assert main.further(config, folder, 3) == activated


def test_the_readme_gives_the_two_commands_and_flags_that_exist():
    lines = [
        line[4:] for line in (ROOT / "README.md").read_text().splitlines() if line[:4] == " " * 4
    ]
    launcher = "python3 train/environment.py"
    assert {f"{launcher} -m train", f"{launcher} -m pytest -n 2"} <= set(lines)
    assert f"{launcher} -m pytest -n 2" in (ROOT / ".ci/run").read_text()
    # Only the set-up uses the launcher: everything after it runs in the activated environment.
    assert sum(line.startswith(launcher) for line in lines) == 2
    activated = lines.index("source .venv/bin/activate")
    asked = [(i, line) for i, line in enumerate(lines) if line.startswith("python -m train ")]
    assert len(asked) >= 5 and all(i > activated for i, _ in asked)
    for _, shown in asked:
        rest = shlex.split(shown, comments=True)[3:]
        if rest[0] in command.COMMANDS:
            continue
        if rest[0] == "--resume":  # a folder that the command before it would have made
            assert re.fullmatch(r"runs/[a-z_]+-\d{3}", rest[1])
            rest = rest[2:]
        if (
            rest != ["--help"] and "FOLDER" not in rest
        ):  # FOLDER: something that only the reader has
            parse(rest)
