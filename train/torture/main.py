"""Measures the reliability of training: how runs survive kills, signals, damage and changed devices.

    python -m train torture [--kills 5] [--damages 30] [--seed 0] [--out FOLDER]

The same toy run is trained many times: killed at random moments, stopped by signals in every phase, on 8, 4, 1 and 8
devices, in two processes of which one may be killed or missing, on a GPU if there is one, with a full disk, with
damaged checkpoints, after changes of the optimizer, with NaN in the batches, and for a few steps with many optimizers
and decays on several layouts. Every loss is compared with that of an undisturbed run. The command prints a table,
writes results.json into the folder of the runs, and exits with 1 if a figure misses its target. The full size is
`--kills 100 --damages 200`, about an hour on two CPU cores.
"""

import argparse
import json
import pathlib
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from train.display import clock, say
from train.errors import UserError
from train.run.folder import environment
from train.torture import accelerator, in_process, layouts, runs, two_processes

Row = tuple[str, str, str, bool]  # figure, target, measured value, whether the target is reached


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train torture", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=5, help="number of kill -9 at random moments")
    parser.add_argument("--damages", type=int, default=30, help="number of damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a new folder; default: a temporary one")
    parser.add_argument(
        "--only", choices=FIGURES, action="append", help="measure only this figure; repeatable"
    )
    options = parser.parse_args(arguments)
    for name in ("kills", "damages", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} is negative; nearest: 0.")
    folder = options.out or pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
    if options.out is not None:
        if folder.exists():
            raise UserError(f"{folder} exists; name a new folder with --out.")
        folder.mkdir(parents=True)
    workspace = runs.Workspace(folder.resolve())
    workspace.write_text()
    chosen = options.only or list(FIGURES)
    steps = max(60, 12 * options.kills) if "kills" in chosen else 60
    begun, results, rows = time.monotonic(), {}, []

    def report(text: str) -> None:
        say(f"{clock(time.monotonic() - begun)}  {text}")

    report(f"an undisturbed run of {steps} steps, in {folder}")
    runs.clean(workspace, steps)
    for name in chosen:
        measured, new = FIGURES[name](workspace, steps, options, report)
        results[name] = measured
        rows += new
    reached = all(row[-1] for row in rows)
    more = environment(arguments=arguments, seconds=round(time.monotonic() - begun))
    table = [dict(zip(("figure", "target", "measured", "reached"), row)) for row in rows]
    whole = {"reached": reached, "figures": table, "results": results, "environment": more}
    (folder / "results.json").write_text(json.dumps(whole, indent=2) + "\n")
    say("\n" + markdown_table(rows) + f"\n\n{folder / 'results.json'}")
    if reached and options.out is None:
        for part in folder.iterdir():
            if part.name != "results.json":
                shutil.rmtree(part) if part.is_dir() else part.unlink()
    return 0 if reached else 1


def markdown_table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    head = ["| figure | target | measured | |", "| --- | --- | --- | --- |"]
    body = [f"| {a} | {b} | {c} | {'yes' if ok else 'NO'} |" for a, b, c, ok in rows]
    return "\n".join([*head, *body])


def measure_kills(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = runs.kills(workspace, options.kills, steps, options.seed, report)
    count, inside = measured["killed"], measured["inside_a_save"]
    good = measured["wrong_losses"] == 0 == measured["failed_restarts"] and count == options.kills
    bound = 2 * runs.INTERVAL
    lost = f"median {measured['steps_lost_median']}, most {measured['steps_lost_most']}"
    return measured, [
        (
            "`kill -9` at random moments survived",
            f"{options.kills} of {options.kills}, 30 % inside a save",
            f"{count}, {inside} inside a save; {measured['wrong_losses']} wrong losses",
            good and inside >= 0.3 * count,
        ),
        (
            "steps lost by a kill",
            f"at most {bound}: an interval and a save in flight",
            lost,
            measured["steps_lost_most"] <= bound,
        ),
    ]


def measure_signals(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured, rows = {}, []
    for number in (signal.SIGTERM, signal.SIGINT):
        outcomes = runs.signals(workspace, steps, number, report)
        good = sum(text in ("saved", "fell back") for text in outcomes.values())
        stored = sum(text == "saved" for text in outcomes.values())
        measured[signal.Signals(number).name] = outcomes
        rows.append(
            (
                f"{signal.Signals(number).name} in {', '.join(runs.PHASES)}",
                "saved, or cleanly fell back, 5 of 5",
                f"{good} of 5, {stored} saved",
                good == 5,
            )
        )
    return measured, rows


def measure_elastic(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = runs.elastic(workspace, steps, report)
    worst = measured.get("largest_difference", float("inf"))
    row = ("8 → 4 → 1 → 8 devices", "losses within 1e-5", f"{worst:.1e}", worst <= 1e-5)
    return measured, [row]


def measure_layouts(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = layouts.compare_layouts(workspace, report)
    worst = max(
        (x["difference"] for x in measured.get("largest", {}).values()), default=float("inf")
    )
    effect, orders = measured.get("least_effect_of_a_decay", 0.0), measured.get("orders_of_data", 0)
    count = f"{len(layouts.OPTIMIZERS)} optimizers, {len(layouts.DECAYS)} decays"
    return measured, [
        (
            f"{count}: 2, 4 and 8 devices, and 2 processes with 4 each",
            "the same data as on one device, losses within 1e-5",
            f"{orders} order of the data, {worst:.1e}; a decay changes losses by {effect:.0e} or more",
            orders == 1 and worst <= 1e-5 and effect >= 1e-4,
        )
    ]


def measure_processes(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = two_processes.two_processes(workspace, report)
    worst, bound = measured["largest_difference"], 2 * runs.INTERVAL
    return measured, [
        (
            "two processes, SIGTERM to one",
            "both save the same step",
            "saved" if measured["saved_on_SIGTERM"] else "not saved",
            measured["saved_on_SIGTERM"],
        ),
        (
            "two processes, `kill -9` of one",
            f"the other ends; at most {bound} steps lost, losses within 1e-5 of one process",
            f"{'ended' if measured['ended_after_kill'] else 'not ended'}, {measured['steps_lost']} lost, {worst:.1e}",
            measured["ended_after_kill"]
            and measured["continued"]
            and measured["steps_lost"] <= bound
            and worst <= 1e-5,
        ),
    ]


def measure_peers(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured: dict[str, Any] = {}
    for number in range(2):
        measured[f"process {number} killed"] = two_processes.survivor(workspace, number)
        measured[f"process {1 - number} missing"] = two_processes.absent(workspace, number)
    rows = []
    for what, bound in (("killed", 30), ("missing", 60)):
        found = [value for name, value in measured.items() if name.endswith(what)]
        good = sum(x["named"] and x["code"] == 2 and not x["stack"] for x in found)
        slowest = max(x["seconds"] for x in found)
        rows.append(
            (
                f"either of two processes {what}",
                f"the other names it and ends with code 2 within {bound} s, 2 of 2",
                f"{good} of 2, after {slowest:.0f} s at most",
                good == 2 and slowest <= bound,
            )
        )
        report(f"a process {what}: {rows[-1][2]}")
    return measured, rows


def measure_gpu(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    figure, target = "stop and go on, on a GPU", "every loss equal, bit for bit"
    if not accelerator.present("cuda"):
        return {"present": False}, [(figure, target, "no GPU here: not measured", True)]
    measured = accelerator.stop_and_go_on(workspace, "cuda")
    good = measured["stopped"] and measured["wrong_losses"] == 0
    text = f"{measured['losses']} losses, {measured['wrong_losses']} differ"
    report(f"a GPU: {text}")
    return measured, [(figure, target, text, good)]


def measure_damages(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = in_process.damage_checkpoints(
        workspace.run("clean"), options.damages, options.seed, report
    )
    good = measured["detected"] + measured["seal_gone_and_equal"]
    return measured, [
        (
            "flipped bits, truncations and deletions detected",
            f"{options.damages} of {options.damages}, and the previous checkpoint used",
            f"{good} of {options.damages}"
            + f" ({', '.join(f'{n} {kind}' for kind, n in measured['kinds'].items())})",
            measured["silent"] == 0 and good == options.damages,
        )
    ]


def measure_edits(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = in_process.edit_chains(workspace.folder / "edits", report)
    good = sum(text == "kept by name" for text in measured.values())
    row = (
        "edits of a chain, state kept by name",
        "9 of 9",
        f"{good} of {len(measured)}",
        good == 9,
    )
    return measured, [row]


def measure_numbers(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = in_process.broken_batches(workspace.run("clean"), 1000)
    good = measured["skipped"] == 1000 and measured["arrays_changed"] == 0 == measured["not_finite"]
    return measured, [
        (
            "NaN and infinite batches",
            "1000 skipped, 0 bits changed, 0 in the weights",
            f"{measured['skipped']} skipped, {measured['arrays_changed']} arrays changed,"
            f" {measured['not_finite']} in the weights",
            good,
        )
    ]


def measure_disk(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = {"full": runs.full_disk(workspace), "second": runs.second_run(workspace)}
    report("a full disk, and a second run on one folder")
    full, second = measured["full"], measured["second"]
    return measured, [
        (
            "full disk",
            "reported; equal losses once there is room",
            f"reported: {full['refused']}, equal: {full['equal']}",
            full["refused"] and full["equal"],
        ),
        (
            "a second run on one folder",
            "refused; free after `kill -9` of the first",
            f"refused: {second['refused']}, free: {second['free']}",
            second["refused"] and second["free"],
        ),
    ]


def measure_cost(
    workspace: runs.Workspace, steps: int, options: Any, report: Any
) -> tuple[Any, list[Row]]:
    measured = in_process.digest_speed(workspace.folder / "cost")
    text = ", ".join(f"{name.split('_')[0]} {speed:.0f} MB/s" for name, speed in measured.items())
    return measured, [("speed of digests", "no target", text, True)]


FIGURES: dict[str, Callable[..., tuple[Any, list[Row]]]] = {
    "kills": measure_kills,
    "signals": measure_signals,
    "elastic": measure_elastic,
    "layouts": measure_layouts,
    "processes": measure_processes,
    "peers": measure_peers,
    "gpu": measure_gpu,
    "damages": measure_damages,
    "edits": measure_edits,
    "numbers": measure_numbers,
    "disk": measure_disk,
    "cost": measure_cost,
}
