"""Worker processes make the same images as threads, report what is broken, and never outlive the program."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support import pictures
from train.data import datasets, images, view_workers, views
from train.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    pictures.prepare(root)
    return root


def load(folder, workers, **more):
    wanted = {"size": 12, "batch_size": 8, "seed": 3, "recipe": images.Recipe()}
    return images.load_images("shapes", data_dir=str(folder), workers=workers, **(wanted | more))


@pytest.mark.parametrize("workers", [1, 3])
def test_images_do_not_depend_on_the_number_of_workers(folder, workers):
    threads, processes = load(folder, 0), load(folder, workers)
    pool = processes._make.__self__
    assert isinstance(pool, view_workers.Workers) and len(set(pool.pids)) == workers
    for step, rows in ((7, None), (0, slice(2, 5)), (1000, slice(7, 8)), (7, None)):
        expected = threads.batch(step, rows)
        for name, value in processes.batch(step, rows).items():
            np.testing.assert_array_equal(value, expected[name])
            assert value.dtype == expected[name].dtype
    other = load(folder, 0, seed=4).batch(7)
    assert not np.array_equal(other["image"], threads.batch(7)["image"])
    for a, b in zip(threads.held_out(9), processes.held_out(9), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    with concurrent.futures.ThreadPoolExecutor(4) as callers:  # several at once, as other loops may
        for step, batch in enumerate(callers.map(processes.batch, range(12))):
            np.testing.assert_array_equal(batch["image"], threads.batch(step)["image"])
    pool.close()
    assert all(process.returncode == 0 for process in pool._processes)


def test_the_first_broken_image_is_named_and_the_others_go_on(folder):
    maker = load(folder, 0).maker
    whole = [maker.train[i] for i in range(6)]
    torn = [{**e, "image": e["image"][:-60]} if i in (2, 4) else e for i, e in enumerate(whole)]
    broken = datasets.RandomAccessSplit(torn, maker.train.ranges)
    maker = views.ViewMaker(broken, maker.held, maker.fields, 12, 3, 9.0, 0.25)
    pool = view_workers.Workers(maker, 2)
    with pytest.raises(
        UserError, match=r"Example 2 of .* holds no image that can be read: .*again"
    ):
        pool.make([views.Wanted(n, 0, n) for n in (0, 1, 3, 2, 5, 4)])
    healthy = [views.Wanted(n, 5, n) for n in (5, 0, 1)]
    for made, expected in zip(pool.make(healthy), views.by_threads(maker, healthy)):
        np.testing.assert_array_equal(made, expected)
    pool.close()


def test_a_killed_worker_is_reported(folder):
    batches = load(folder, 2)
    first = batches.batch(0)
    pool = batches._make.__self__
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # of a scheduler: workers wait
        os.kill(pool.pids[0], number)
    np.testing.assert_array_equal(batches.batch(0)["image"], first["image"])
    os.kill(pool.pids[1], signal.SIGKILL)
    with pytest.raises(UserError, match=r"has ended \(signal 9\)\. .*fewer --images\.workers"):
        for step in range(9):
            batches.batch(step)
    pool.close()


PROGRAM = """
import sys, time
from train.data import images
made = images.load_images("shapes", size=12, batch_size=8, seed=3, recipe=images.Recipe(),
                          data_dir=sys.argv[1], workers=2)
made.batch(0)
print(*made._make.__self__.pids, flush=True)
{then}
"""


def alive(pid):
    try:
        return "(Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().replace(") ", "(")
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("end", ["killed", "an error"])
def test_no_worker_outlives_the_program(folder, end):
    then = "time.sleep(100)" if end == "killed" else "raise SystemExit(3)"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2
    if end == "killed":
        for pid in pids:
            assert alive(pid)
            loaded = pathlib.Path(f"/proc/{pid}/maps").read_text()
            assert "PIL" in loaded and "jaxlib" not in loaded
        program.kill()
    assert program.wait(60) == (-signal.SIGKILL if end == "killed" else 3)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)
    program.stdout.close()
