"""The plan of a population: its options, its table, and what the compiled program for an H200 may not have.

Programs are compiled only where NVIDIA's compiler is installed.
"""

import dataclasses
import importlib.util
import re

import pytest

from tests.train.plan.test_kernel_model import PROGRAM
from train.errors import UserError
from train.plan import ahead_of_time, kernel_model
from train.plan import population as plan
from train.plan.population import Compiled, Options
from train.study.small_runs import SmallTask

TASK = SmallTask(
    width=160, mlp_width=432, layers=2, heads=5, length=128, batch_size=8, dtype="bfloat16", chunk=5
)


def test_of_two_branches_the_shorter_one_counts_in_a_usual_step():
    rare, usual = (kernel_model.kernels(PROGRAM, due) for due in (True, False))
    assert [k.name for k in rare][:-1] == [k.name for k in usual]
    assert rare[-1].name == "copied"
    assert kernel_model.conditions(PROGRAM) == 1
    nested = PROGRAM.replace(
        "ROOT %copied = f32[100]{0} copy(%s)",
        "ROOT %copied = f32[100]{0} conditional(%s, %s, %s), true_computation=%often, false_computation=%often",
    )
    assert kernel_model.conditions(nested) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "hubert"}, "--arm hubert is not one of .*; nearest: huber."),
        ({"arm": "one_bit_adam"}, "one_bit_adam is not one of"),
        ({"devices": 9}, "--devices 9 must be 1 to 8"),
        ({"members": (8, 13), "devices": 4}, "--members 13 must be a multiple .*; nearest: 12."),
        ({"members": (0,)}, "--members 0 must be a multiple of --devices 1; nearest: 1."),
        ({"members": ()}, "--members: give one number or more"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(UserError, match=message):
        Options(**change)


def test_the_tables_of_a_program_that_is_there(monkeypatch):
    """Kernels of a chunk are shared by its steps."""
    read = lambda rare: kernel_model.kernels(PROGRAM, rare)
    seen = ahead_of_time.Report(None, 3 * 10**6, 2 * 10**6, 5, {}, PROGRAM)
    monkeypatch.setattr(
        plan, "compiled", lambda options, n: Compiled(n, read(False), read(True), 1, seen, 2)
    )
    said = plan.report(Options(members=(2, 4), kernels=2, task=dataclasses.replace(TASK, layers=1)))
    # taken, made, written in three turns; mixed, pair, gathered: 12 runs in two steps.
    rows = [line.split() for line in said.splitlines() if re.match(r"[24] ", line)]
    assert [row[:2] for row in rows] == [["2", "6"], ["4", "6"]]
    assert [row[-4:] for row in rows] == [["2", "MB", "5", "MB"]] * 2
    assert "1 condition: a step in which everything rare is due" in said
    assert "products           2" in said and said.count("jit(f)/dot(x)") == 0
    assert [row.split()[0] for row in said.split("longest kernels")[1].splitlines()[2:]] == [
        "mixed",
        "gathered",
    ]


def compiled(**changes):
    try:
        ahead_of_time.devices("h200")
    except ahead_of_time.NotInstalled as error:
        pytest.skip(str(error))
    if not importlib.util.find_spec("nvidia.cudnn"):
        pytest.skip("cuDNN is not installed: pip install --no-deps nvidia-cudnn-cu12")
    options = Options(**{"members": (3,), "task": TASK, **changes})
    return plan.compiled(options, options.members[0])


@pytest.mark.usefixtures("as_for_users")
def test_a_population_on_an_h200_copies_no_weights_and_scatters_nothing():
    found = compiled()
    text, layers = found.report.text, TASK.layers
    assert " scatter(" not in text and not found.report.collectives
    attention = [k for k in found.usual if k.kind == "attention"]
    assert len(attention) == 2 * layers and all(k.times == TASK.chunk for k in attention)
    # A layer has 4 products and 8 of its backward pass; the head has 3, the embedding's gradient is one.
    products = [k for k in found.usual if k.kind == "products"]
    assert sum(k.times for k in products) == (12 * layers + 4) * TASK.chunk
    # Of each layer only its values, which are cut out of the product with queries and keys.
    activation = 2 * 3 * 8 * 128 * 160
    copied = sum(k.bytes for k in found.usual if k.kind == "copies" and k.times == TASK.chunk)
    one_hot = 2 * 3 * 8 * 128 * 264
    assert copied < 1.1 * (layers * 2 * activation + one_hot)
    # 149 when this was written.
    assert found.starts < 160


@pytest.mark.usefixtures("as_for_users")
@pytest.mark.parametrize("arm", ["alphadecay", "conda"])
def test_rare_work_stands_behind_one_condition(arm):
    found = compiled(arm=arm)
    assert found.conditions == 1
    hard = r'custom_call_target="[^"]*(syevd|sytrd|potrf|geqrf)'
    assert re.search(hard, found.report.text)
    names = {k.name for k in found.usual}
    lines = [x for x in found.report.text.splitlines() if re.search(hard, x)]
    assert not [x for x in lines if x.split("=")[0].strip().lstrip("%") in names]
    assert sum(k.bytes for k in found.rare) > sum(k.bytes for k in found.usual)


@pytest.mark.usefixtures("as_for_users")
def test_two_gpus_have_half_of_the_members_each_and_send_nothing():
    found, alone = compiled(members=(4,), devices=2), compiled(members=(2,))
    assert "num_partitions=2" in found.report.text and not found.report.collectives
    attention = lambda one: sum(k.operations for k in one.usual if k.kind == "attention")
    assert attention(found) == attention(alone) > 0
    assert found.report.temporary == pytest.approx(alone.report.temporary, rel=0.1)
