"""1-bit Adam in the trainer: each replica of the mesh a worker, weights split inside of it."""

import re
import shutil

import jax
import numpy as np
import pytest

from optax_decay.axes import leaf_paths, signatures
from optax_decay.one_bit import one_bit_phase
from tests.support.runs import flags, losses, program, records
from train import main
from train.cli import parse
from train.config.fields import UserError
from train.plan.collectives import collectives, operations
from train.run.checkpoints import Checkpoints, describe
from train.step import sharding

ONE_BIT = [
    "--optimizer.name",
    "one_bit_adam",
    "--optimizer.freeze",
    "3",
    "--optimizer.clip",
    "None",
    "--run.save_every",
    "4",
]
GRID = ["--mesh.replica", "2", "--mesh.data", "1", "--mesh.fsdp", "2"]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.figures, "draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps, of them three with a plain mean; its folder is `whole / "run"`."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.main(flags(folder, *ONE_BIT, *GRID)) == 0
    return folder


def cut(whole, folder):
    """A copy of `whole` as it was after step 4: in the compressed phase, with errors."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "run/checkpoints/6")
    return folder


def restored(folder, *grid):
    """The newest state in a folder, placed for a mesh, and what was said."""
    ready, said = program(folder, *ONE_BIT, *grid), []
    meta = describe(ready.config, ready.data.digest, ready.program.shapes)
    with Checkpoints(folder / "run/checkpoints", 9) as checkpoints:
        (step,) = checkpoints.steps
        found = checkpoints.restore(ready.program.placed_shapes(), meta, said.append)
    assert found is not None and found[1] == step == 4
    return ready, found[0], said


def test_the_warm_up_is_adam_and_the_rest_is_not(whole, tmp_path):
    ready = program(tmp_path, "--optimizer.clip", "None")  # one device
    state, plain = ready.program.init(jax.random.key(0)), {}
    for i in range(6):
        state, noted = ready.program.update(state, ready.batch(i))
        plain[i + 1] = float(noted["loss"])
    ours = losses(whole / "run")
    # Means of the workers' means are in another order: some float32 roundings.
    np.testing.assert_allclose(
        [ours[i] for i in range(1, 5)], [plain[i] for i in range(1, 5)], rtol=1e-5
    )
    # Step 4 is the first with signs, and step 5 the first to see its weights.
    assert all(1e-4 < abs(ours[i] - plain[i]) / plain[i] < 0.1 for i in (5, 6))


def test_a_run_goes_on_bit_for_bit(whole, tmp_path):
    folder = cut(whole, tmp_path)
    assert main.main(["--resume", str(folder / "run")]) == 0
    assert records(folder / "run") == records(whole / "run")


def crossing(text: str, part: int) -> list[str]:
    """Lines with a collective between devices of different replicas, of `part` devices each."""
    found = []
    for line in text.splitlines():
        groups = re.search(
            r"replica_groups=(\{\{.*?\}\}|\[[0-9,]+\]<=\[[0-9,]+\](?:T\([0-9,]+\))?)", line
        )
        if not groups:
            continue
        if listed := re.findall(r"\{([0-9,]+)\}", groups[1]):
            rows = [[int(i) for i in row.split(",")] for row in listed]
        else:
            shape, grid, order = re.fullmatch(
                r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", groups[1]
            ).groups()
            ids = np.arange(np.prod(sizes(grid))).reshape(sizes(grid))
            rows = ids.transpose(sizes(order) if order else None).reshape(sizes(shape)).tolist()
        if any(len({i // part for i in row}) > 1 for row in rows):
            found.append(line)
    return found


def sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def test_only_signs_scales_and_what_is_not_compressed_cross_replicas(whole, as_for_users):
    ready = program(whole, *ONE_BIT, *GRID)
    text = (
        ready.program.update.lower(ready.program.placed_shapes(), ready.batch(0))
        .compile()
        .as_text()
    )
    lines = crossing(text, 2)
    found = collectives("HloModule step, num_partitions=4\n" + "\n".join(lines))
    assert operations([c for c in found if c.kind != "all-reduce"]) == (
        "2 all-gather f32, 1 all-gather u8, 1 all-to-all u8"
    )
    # Of the plain means one is of the warm-up, one of everything that is never compressed, one of the two scalars by
    # which a step is left out before (the loss and the gradient's norm), and one of the number of tokens.
    compressed = {"hidden", "head"}
    count = {True: 0, False: 0}
    for path, signature in signatures(ready.program.axes, ready.program.shapes["params"]).items():
        split = dict(
            zip(
                leaf_paths(ready.program.shardings["params"]),
                jax.tree.leaves(ready.program.shardings["params"]),
            )
        )
        shape = split[path].shard_shape(signature.shape)
        count[signature.role in compressed] += int(np.prod(shape))
    sums = sorted(sum(n for _, n in c.arrays) for c in found if c.kind == "all-reduce")
    assert sums == sorted([1, 2, count[True], count[False]])


@pytest.mark.parametrize(
    ("grid", "rows", "said"),
    [
        (
            "--mesh.replica 4 --mesh.data 1 --mesh.fsdp 2",
            8,
            "errors of 2 workers were redistributed for 4 workers",
        ),
        ("--mesh.replica 1 --mesh.data 4", 1, "split in another way"),
        ("--mesh.replica 2 --mesh.data 1 --mesh.tensor 2", 4, "split in another way"),
        ("--mesh.replica 2 --mesh.data 2 --mesh.fsdp 2", 4, None),
    ],
)
def test_other_numbers_of_workers(whole, tmp_path, grid, rows, said):
    folder = cut(whole, tmp_path)
    _, same, silent = restored(folder, *GRID)
    ready, other, notes = restored(folder, *grid.split())
    assert not silent
    assert [said in note for note in notes] == ([] if said is None else [True])
    a, b = (s["optimizer"].inner_state["direction"] for s in (same, other))
    assert one_bit_phase(other["optimizer"]) == "compressed"
    for name in ("mu", "nu"):
        jax.tree.map(np.testing.assert_array_equal, getattr(a, name), getattr(b, name))
    assert np.any(a.worker_error["blocks/mlp/up/kernel"]) and np.any(
        a.server_error["blocks/mlp/up/kernel"]
    )
    assert np.any(b.worker_error["blocks/mlp/up/kernel"]) == (
        said is None or "redistributed" in said
    )
    assert np.any(b.server_error["blocks/mlp/up/kernel"]) == (said is None)
    assert b.worker_error["blocks/mlp/up/kernel"].shape[0] == rows
    assert jax.tree.map(lambda x: x.sharding, other) == ready.program.shardings


@pytest.mark.parametrize(
    ("grid", "nearest"),
    [
        ("--mesh.fsdp 2", "nearest: mesh.replica 2, or"),
        ("--mesh.tensor 2", "nearest: mesh.replica 2, or"),
        (
            "--mesh.replica 2 --model.attention cudnn --model.dtype bfloat16",
            "nearest: model.attention xla",
        ),
        ("--mesh.replica 2 --mesh.fsdp 3 --mesh.tensor 2", "nearest: mesh.fsdp 6 mesh.tensor 1"),
    ],
)
def test_grids_that_end_in_the_compiler_are_refused(tmp_path, grid, nearest):
    with pytest.raises(UserError, match=nearest):
        parse(flags(tmp_path, *ONE_BIT, *grid.split()))


def test_weights_that_are_split_over_replicas_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sharding.LETTERS, "F", "replica")
    with pytest.raises(
        ValueError, match="sharded over 'replica', the axis that one_bit_adam compresses over"
    ):
        program(tmp_path, *ONE_BIT, *GRID)


def test_when_the_variance_freezes():
    def freeze(*more):
        return parse(["toy", "--optimizer.name", "one_bit_adam", *more]).optimizer.direction.freeze

    assert freeze("--run.steps", "50") == 10
    assert freeze("--run.steps", "50", "--optimizer.schedule.warmup_steps", "20") == 20
    assert (
        freeze("--optimizer.freeze", "7") == 7
        and freeze("--optimizer.freeze", "settled") == "settled"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "--optimizer.name one_bit_adam --decay.spectrum.score gradient_norm",
            "never forms; nearest: decay.spectrum.score frobenius_norm",
        ),
        ("--optimizer.freeze 5", "belongs to --optimizer one_bit_adam"),
        (
            "--optimizer.name one_bit_adam --optimizer.freeze 0",
            "optimizer.freeze = 0 is out of range",
        ),
    ],
)
def test_choices_that_cannot_be_meant(asked, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse(asked.split())
