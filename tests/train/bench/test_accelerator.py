"""The measurement of an accelerator in small form on a CPU: every part runs, and nothing is lost."""

import json
import math
import time

import pytest

from train.bench import accelerator, accelerator_parts
from train.errors import UserError

# Those that need two or three processes or many programs are tried out by the command alone.
QUICK = ("limits", "step-60M", "step-gpt2-124M", "optimizers", "spectra", "population", "contract")


def test_the_parts_are_those_that_are_measured():
    assert set(accelerator.PARTS) == set(accelerator_parts.PARTS)


@pytest.mark.parametrize("part", QUICK)
def test_a_part_in_small_form(part, monkeypatch):
    rows = list(accelerator_parts.PARTS[part](small=True))
    assert rows and all(list(row) for row in rows)
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert numbers and all(math.isfinite(n) and n >= 0 for n in numbers)
    if part.startswith("step"):
        kinds = {row["kernels"]: row["ms a step"] for row in rows if "kernels" in row}
        assert "products" in kinds and any(k.startswith("optimizer") for k in kinds)
        assert any(k.startswith("loss") for k in kinds)
    if part == "contract":
        assert [row["difference / change"] for row in rows] == [0.0] * 3  # both are this CPU


def test_a_peer_that_fails_says_why(monkeypatch):
    from train.bench import torch_peers

    def broken(*arguments):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch_peers, "hugging_face", broken)
    rows = list(accelerator_parts.peer("60M", small=True))
    assert [row["why"] for row in rows] == ["RuntimeError: no driver"] * 2


def test_the_command(tmp_path, capsys):
    words = ["--minutes", "1", "--out", str(tmp_path), "--small", "--parts", "limits", "peer-60M"]
    assert accelerator.main(words) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row.get("product", row.get("copy")) for row in found["rows"]["limits"]][-1]
    assert len(found["rows"]["limits"]) == 5 and found["ended"]["limits"][0] == "complete"
    report = (tmp_path / "report.md").read_text()
    assert "| bfloat16 to float32 |" in report and "## PyTorch, 60M" in report
    if accelerator.missing(accelerator.PEERS):
        assert "left out: pip install" in report
    assert "limits: complete" in capsys.readouterr().out


PROGRAM = """
import json, sys, time
with open(sys.argv[2], "a") as lines:
    for i in range(3):
        lines.write(json.dumps({"row": i}) + chr(10)); lines.flush()
    if KIND == "slow": lines.write('{"half'); lines.flush(); time.sleep(60)
    if KIND == "broken": raise ValueError("out of memory")
"""


@pytest.mark.parametrize("kind", ["slow", "broken"])
def test_rows_of_a_part_that_does_not_end_are_kept(tmp_path, monkeypatch, kind):
    program = tmp_path / "part.py"
    program.write_text(PROGRAM.replace("KIND", repr(kind)))
    start = accelerator.subprocess.Popen

    def instead(words, **options):
        return start([words[0], str(program), *words[3:]], **options)

    monkeypatch.setattr(accelerator.subprocess, "Popen", instead)
    report = accelerator.Report(tmp_path, {"environment": {}})
    began = time.monotonic()
    ended, _ = accelerator.measure("limits", tmp_path, 2.0, True, report)
    assert time.monotonic() - began < 30
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"]["limits"] == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert ended.startswith("ended after its 2 s" if kind == "slow" else "failed, see limits.log")
    assert kind == "slow" or ended.endswith("ValueError: out of memory")


def test_without_time_a_part_is_named(tmp_path):
    report = accelerator.Report(tmp_path, {"environment": {}})
    report.note("spectra", *accelerator.measure("spectra", tmp_path, 0.5, True, report))
    assert "`spectra`: left out: no time was left" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "0"), "minutes 0.0: allowed is a number above 0"),
        (("--parts", "limit"), "nearest: limits"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        accelerator.main([*words, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
