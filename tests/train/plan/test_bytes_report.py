"""Reading collectives out of compiled programs, and the report made of them."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import workers
from train.plan import bytes_report
from train.plan.collectives import Collective, collectives, operations, sent

# One line per way in which compilers write results and groups; tokens are told apart by shape, not by position.
LINES = {
    "%a = f32[1000]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add": (
        "all-reduce", (("f32", 1000),), 4, 2 * 3 / 4 * 4000,
    ),
    "%a = (bf16[10,3]{1,0}, f32[]) all-reduce(%x, %y), replica_groups=[2,8]<=[16], to_apply=%add": (
        "all-reduce", (("bf16", 30), ("f32", 1)), 8, 2 * 7 / 8 * 64,
    ),
    "ROOT %a = u8[8,16]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','b'}, dimensions={0}": (
        "all-gather", (("u8", 128),), 8, 7 / 8 * 128,
    ),
    "%a = (u8[1,2]{1,0}, u8[1,2]{1,0}, /*index=2*/u8[1,2]{1,0}) all-to-all(%x, %y, %z), replica_groups={{0,1,2}}": (
        "all-to-all", (("u8", 2),) * 3, 3, 2 / 3 * 6,
    ),
    "%a = (f32[4]{0}, f32[32]{0:T(1024)}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}": (
        "all-gather", (("f32", 32),), 8, 7 / 8 * 128,
    ),
    "%a = s8[12]{0} all-gather(%x), replica_groups=mesh['p'=4,'q'=2], device_ids=([2,4]T(1,0)) {'p'}, dimensions={0}": (
        "all-gather", (("s8", 12),), 4, 3 / 4 * 12,
    ),
    "%a = (f32[6]{0}, f32[6]{0}) all-to-all(%x, %y), replica_groups=mesh['q'=4], device_ids=([4]T(0)) {'q':(2)2}": (
        "all-to-all", (("f32", 6),) * 2, 2, 1 / 2 * 48,
    ),
    "%a = f32[32]{0} all-gather-done(%b)": None,
    "%a = s32[5]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add": (
        "reduce-scatter", (("s32", 5),), 6, 5 * 20,
    ),
    "%a = f64[7]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}": (
        "collective-permute", (("f64", 7),), 2, 56,
    ),
    "%a = f32[8]{0} get-tuple-element(%all-reduce), index=0": None,
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_reads_a_line(line):
    found = collectives(f"HloModule jit_f, num_partitions=6\n  {line}\n")
    if LINES[line] is None:
        assert found == []
        return
    kind, arrays, devices, size = LINES[line]
    assert found == [Collective(kind, arrays, devices)]
    assert found[0].sent() == pytest.approx(size)


@pytest.mark.parametrize("groups", ["?", "mesh['p'=4] {'p':2}"])
def test_unknown_groups_are_refused(groups):
    with pytest.raises(ValueError, match="cannot read the groups"):
        collectives(f"%a = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add")


def test_reads_a_compiled_program(as_for_users):
    mesh = workers.mesh_of(2, 4, names=("a", "b"))

    def body(x):
        y = jax.lax.psum(x, "a")
        z = jax.lax.all_gather(x, "b")
        return y, z, jax.lax.psum_scatter(x, "b", tiled=True)

    specs = jax.P(("a", "b"))
    step = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    text = jax.jit(step).lower(jax.ShapeDtypeStruct((8 * 12,), jnp.float32)).compile().as_text()
    found = collectives(text)
    assert sorted((c.kind, c.devices, c.arrays) for c in found) == [
        ("all-gather", 4, (("f32", 48),)),
        ("all-reduce", 2, (("f32", 12),)),
        ("reduce-scatter", 4, (("f32", 3),)),
    ]
    assert sent(found) == 3 / 4 * 48 * 4 + 2 * 1 / 2 * 12 * 4 + 3 * 3 * 4
    assert operations(found) == "1 all-gather f32, 1 all-reduce f32, 1 reduce-scatter f32"


@pytest.mark.parametrize("fsdp", [1, 2])
def test_report_agrees_with_the_formulas(fsdp, as_for_users):
    options = bytes_report.Options("toy", workers=4, fsdp=fsdp, run_steps=100, warmup_steps=10)
    programs = bytes_report.Programs(options)
    found = bytes_report.phases(programs)
    total = programs.elements(None)
    matrices = programs.elements(("hidden", "head"))
    assert 0 < matrices < total
    single = found[bytes_report.SINGLE].size
    assert single == 2 * 3 / 4 * 4 * total
    assert found[bytes_report.HALF].size == single / 2
    assert found[bytes_report.WARM].size == single
    # P/4 · (N-1)/N of signs; for each matrix padding of at most N · 8 elements, and 8 (N-1) bytes of scales. The toy
    # has 3 layers of 7 kernels and a head, and beside them 2 norms in each layer, a last norm and an embedding.
    for name, packed, vectors in (
        (bytes_report.MATRIX, matrices, 22),
        (bytes_report.ALL, total, 30),
    ):
        least = 3 / 4 * packed / 4 + 2 * 3 / 4 * 4 * (total - packed) + vectors * 8 * 3
        most = least + vectors * 3 / 4 * 4 * 8 / 4
        assert least < found[name].size <= most, name
    text = bytes_report.report(options)
    row = next(line for line in text.splitlines() if line.startswith("1-bit Adam, matrices"))
    assert f"{single / found[bytes_report.MATRIX].size:.1f}" in row.split()
    assert "Faster than a float32 mean below" in text


def test_break_even_is_where_times_are_equal():
    options = bytes_report.Options("toy", workers=4, codec=0.001, gigabits=(1.0,))
    text = bytes_report.report(options)
    even = float(re.search(r"mean below ([0-9.e+-]+) Gbit/s", text)[1])
    programs = bytes_report.Programs(options)
    found = bytes_report.phases(programs)
    codec = programs.elements(("hidden", "head")) / 1e6
    plain, one = (
        found[name].size * 8 / (even * 1e9) for name in (bytes_report.SINGLE, bytes_report.MATRIX)
    )
    assert plain == pytest.approx(one + codec, rel=1e-2)


def test_codec_time_grows_with_the_size():
    assert 0 < bytes_report.codec_seconds(2**12, 8) < bytes_report.codec_seconds(2**21, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "2B"}, "preset='2B'"),
        ({"workers": 1}, "workers=1"),
        ({"warmup_steps": 0}, "warmup_steps=0"),
        ({"run_steps": 10, "warmup_steps": 11}, "warmup_steps=11"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        bytes_report.Options(**change)


def test_runs_from_the_command_line():
    command = [sys.executable, "-m", "train.plan.bytes_report", "--preset", "toy", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "toy: " in done.stdout and "Gbit/s" in done.stdout
    assert np.array([line.startswith("1-bit Adam") for line in done.stdout.splitlines()]).sum() == 3
