"""The plan of a run: exact where it says so, the trainer's own shapes, and no device touched."""

import math
import re

import jax
import pytest

from tests.support.runs import flags, program
from train import __main__ as command
from train.cli import parse
from train.config.fields import UserError
from train.plan import ahead_of_time
from train.plan import main as plan
from train.step import sharding

BIG = [
    *("--model.preset", "7B", "--model.dtype", "bfloat16", "--data.tokenizer", "bpe-32000"),
    *("--data.batch_size", "512", "--data.length", "2048"),
]


def outline(asked: list[str], devices: int) -> plan.Outline:
    config = parse(asked)
    return plan.outline(
        config, sharding.abstract_mesh(config.mesh, config.data.batch_size, devices)
    )


def test_memory_is_what_a_device_of_the_trainer_holds(tmp_path):
    asked = flags(tmp_path, *["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"])
    planned = outline(asked, 8)
    state = program(tmp_path, *asked).init(jax.random.key(0))
    for part in ("params", "optimizer"):
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state[part]))
        assert planned.size(part) == held
    whole = sum(x.nbytes for x in jax.tree.leaves(state["params"]))
    assert whole / 4 < planned.size("params") < whole / 2  # not all is split over both axes


def test_seven_billion_weights_on_256_devices():
    planned = outline([*BIG, "--mesh.fsdp", "64"], 256)
    L, D, F, V = 32, 4096, 11008, 32000
    matrices = L * (4 * D * D + 3 * D * F) + V * D
    count = matrices + V * D + (2 * L + 1) * D
    assert plan.parameters(planned)["all"] == count
    assert planned.size("params") == 4 * count / 64
    # Two moments, counters, and the rings of 128 losses and norms that spikes are told by.
    assert 1024 < planned.size("optimizer") - 2 * planned.size("params") < 1124
    tokens = 512 * 2048
    assert plan.products(planned) == 3 * tokens * (2 * matrices + 4 * L * 2048 * D)
    sent = plan.traffic(planned)
    assert sent["fsdp: reduce gradients"] == pytest.approx(4 * count * 63 / 64)
    assert sent["data: mean of gradients"] == pytest.approx(2 * 3 / 4 * 4 * count / 64)
    assert len(sent) == 3


def test_signs_are_a_thirtieth_of_a_mean_of_the_matrices():
    grid = ["--mesh.replica", "8", "--mesh.fsdp", "8"]
    mean = plan.traffic(outline([*BIG, *grid], 64))
    signs = plan.traffic(outline([*BIG, *grid, "--optimizer.name", "one_bit_adam"], 64))
    own = plan.parameters(outline([*BIG, *grid], 64))
    ratio = own["matrix"] / (own["matrix"] + own["other"])
    assert signs["replica: signs of momenta"] * 32 == pytest.approx(
        mean["replica: mean of gradients"] * ratio
    )
    fsdp = [name for name in mean if name.startswith("fsdp")]
    assert fsdp and all(mean[name] == signs[name] for name in fsdp)


def test_activations_shrink_with_remat_micro_batches_and_tensor():
    def kept(*more: str) -> float:
        return plan.activations(outline([*BIG, *more], 8))

    assert kept() > kept("--model.remat", "dots") > kept("--model.remat", "full")
    assert kept("--run.micro_batches", "4") == pytest.approx(kept() / 4)
    four = kept("--mesh.data", "4")
    assert four > kept("--mesh.data", "4", "--mesh.tensor", "2") > four / 2


def test_the_command_prints_tables_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["plan", *BIG, "--mesh.fsdp", "8", "--devices=64", "--device", "v5e"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "data 8 x fsdp 8" in said and "TPU v5e" in said
    rows = dict(re.findall(r"^(\S.*?)  +([\d.]+ ?\w*)$", said, re.MULTILINE))
    assert rows["weights, float32"] == "3.37 GB"
    assert math.isclose(
        float(rows["matrix products at peak"]), 4.495e16 / 64 / 197e12 * 1e3, rel_tol=0.02
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--device h20", "nearest: h200"),
        ("--devices none", "a whole number above 0"),
        ("--network -1", "a number above 0"),
        ("--devices", "needs a value"),
        ("--mesh.fsdp 8 --devices 4", "needs 8 devices; there are 4 (planned)"),
        ("--data.tokenizer elsewhere", "set --model.vocab_size"),
    ],
)
def test_what_cannot_be_meant_is_one_paragraph(capsys, asked, said):
    assert command.main(["plan", *asked.split()]) == 2
    assert said in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    assert command.main(["plan", "toy", "--target", "v5e:2x4"]) == 2
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err
    assert command.main(["plan", "toy", "--target", "h200"]) == 2
    assert "nvidia-cuda-nvcc-cu12" in capsys.readouterr().err


def test_the_real_step_compiles_for_a_tpu(tmp_path):
    try:
        ahead_of_time.tpu_devices("v5e:2x4")
    except ahead_of_time.NotInstalled as error:
        pytest.skip(str(error))
    config = parse(flags(tmp_path, "--mesh.replica", "2", "--mesh.data", "1", "--mesh.fsdp", "4"))
    said = plan.compiled(config, "v5e:2x4")
    assert "compiled for v5e:2x4" in said and "all-gather" in said
    with pytest.raises(UserError, match="--target v5e:9x9"):
        plan.compiled(config, "v5e:9x9")
