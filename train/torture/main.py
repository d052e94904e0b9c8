"""What a run survives, measured: the figures of reliability, each with its counts.

    python -m train torture [--kills 5] [--damages 30] [--seed 0] [--out FOLDER]

Trains the same toy run many times over: killed at random moments, asked to end in every phase, on
8, 4, 1 and 8 devices, in two processes, with a full disk, damaged checkpoints, other optimizers and
numbers that are none, and for some steps with many optimizers and decays on several layouts.
Every loss is compared with those of a run that nothing disturbed. Prints a table, writes
results.json beside the runs, and exits with 1 if any figure fails. `--kills 100 --damages 200` is
the full size: about an hour on two CPU cores.
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

from train.config.fields import UserError
from train.display import clock, say
from train.run.folder import environment
from train.torture import checks, runs
from train.torture import layouts as torture_layouts
from train.torture import processes as torture_processes

Row = tuple[str, str, str, bool]  # figure, target, measured, whether it is reached


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train torture", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=5, help="kill -9 at random moments")
    parser.add_argument("--damages", type=int, default=30, help="of files of a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a new folder; else a temporary one")
    parser.add_argument("--only", choices=FIGURES, action="append", help="single figures")
    asked = parser.parse_args(arguments)
    for name in ("kills", "damages", "seed"):
        if getattr(asked, name) < 0:
            raise UserError(f"--{name} {getattr(asked, name)} is negative; nearest: 0.")
    folder = asked.out or pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
    if asked.out is not None:
        if folder.exists():
            raise UserError(f"{folder} exists; name a new folder with --out.")
        folder.mkdir(parents=True)
    place = runs.Place(folder.resolve())
    place.write_text()
    chosen = asked.only or list(FIGURES)
    steps = max(60, 12 * asked.kills) if "kills" in chosen else 60
    begun, results, rows = time.monotonic(), {}, []

    def told(text: str) -> None:
        say(f"{clock(time.monotonic() - begun)}  {text}")

    told(f"a run of {steps} steps that nothing disturbs, in {folder}")
    runs.clean(place, steps)
    for name in chosen:
        found, new = FIGURES[name](place, steps, asked, told)
        results[name] = found
        rows += new
    reached = all(row[-1] for row in rows)
    more = environment(arguments=arguments, seconds=round(time.monotonic() - begun))
    table = [dict(zip(("figure", "target", "measured", "reached"), row)) for row in rows]
    report = {"reached": reached, "figures": table, "results": results, "environment": more}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    say("\n" + text_of(rows) + f"\n\n{folder / 'results.json'}")
    if reached and asked.out is None:
        for part in folder.iterdir():
            if part.name != "results.json":
                shutil.rmtree(part) if part.is_dir() else part.unlink()
    return 0 if reached else 1


def text_of(rows: list[Row]) -> str:
    """The table, in Markdown."""
    head = ["| figure | target | measured | |", "| --- | --- | --- | --- |"]
    body = [f"| {a} | {b} | {c} | {'yes' if ok else 'NO'} |" for a, b, c, ok in rows]
    return "\n".join([*head, *body])


def kills(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = runs.kills(place, asked.kills, steps, asked.seed, told)
    count, inside = found["killed"], found["inside_a_save"]
    good = found["wrong_losses"] == 0 == found["failed_restarts"] and count == asked.kills
    bound = 2 * runs.INTERVAL
    lost = f"median {found['steps_lost_median']}, most {found['steps_lost_most']}"
    return found, [
        (
            "`kill -9` at random moments survived",
            f"{asked.kills} of {asked.kills}, 30 % inside a save",
            f"{count}, {inside} inside a save; {found['wrong_losses']} other losses",
            good and inside >= 0.3 * count,
        ),
        (
            "steps lost by a kill",
            f"at most {bound}: an interval and a save in flight",
            lost,
            found["steps_lost_most"] <= bound,
        ),
    ]


def signals(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found, rows = {}, []
    for number in (signal.SIGTERM, signal.SIGINT):
        seen = runs.signals(place, steps, number, told)
        good = sum(text in ("saved", "fell back") for text in seen.values())
        stored = sum(text == "saved" for text in seen.values())
        found[signal.Signals(number).name] = seen
        rows.append(
            (
                f"{signal.Signals(number).name} in {', '.join(runs.PHASES)}",
                "saved or cleanly fallen back, 5 of 5",
                f"{good} of 5, {stored} saved",
                good == 5,
            )
        )
    return found, rows


def elastic(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = runs.elastic(place, steps, told)
    worst = found.get("largest_difference", float("inf"))
    row = ("8 → 4 → 1 → 8 devices", "losses within 1e-5", f"{worst:.1e}", worst <= 1e-5)
    return found, [row]


def layouts(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = torture_layouts.layouts(place, told)
    worst = max((x["difference"] for x in found.get("largest", {}).values()), default=float("inf"))
    effect, orders = found.get("least_effect_of_a_decay", 0.0), found.get("orders_of_data", 0)
    count = f"{len(torture_layouts.OPTIMIZERS)} optimizers, {len(torture_layouts.DECAYS)} decays"
    return found, [
        (
            f"{count}: 2, 4 and 8 devices, and 2 processes with 4 each",
            "the data of one device, losses within 1e-5",
            f"{orders} order of the data, {worst:.1e}; a decay itself moves them by {effect:.0e} or more",
            orders == 1 and worst <= 1e-5 and effect >= 1e-4,
        )
    ]


def processes(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = torture_processes.two_processes(place, told)
    worst, bound = found["largest_difference"], 2 * runs.INTERVAL
    return found, [
        (
            "two processes, SIGTERM to one",
            "both save the same step",
            "saved" if found["saved_on_SIGTERM"] else "not saved",
            found["saved_on_SIGTERM"],
        ),
        (
            "two processes, `kill -9` of one",
            f"the other ends; at most {bound} steps lost, losses within 1e-5 of one process",
            f"{'ended' if found['ended_after_kill'] else 'not ended'}, {found['steps_lost']} lost, {worst:.1e}",
            found["ended_after_kill"]
            and found["gone_on"]
            and found["steps_lost"] <= bound
            and worst <= 1e-5,
        ),
    ]


def damages(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = checks.damages(place.run("clean"), asked.damages, asked.seed, told)
    good = found["found"] + found["seal_gone_and_equal"]
    return found, [
        (
            "flipped bits, truncations and deletions found",
            f"{asked.damages} of {asked.damages}, and the checkpoint before used",
            f"{good} of {asked.damages}"
            + f" ({', '.join(f'{n} {kind}' for kind, n in found['kinds'].items())})",
            found["silent"] == 0 and good == asked.damages,
        )
    ]


def edits(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = checks.edits(place.folder / "edits", told)
    good = sum(text == "kept by name" for text in found.values())
    row = ("edits of a chain, state kept by name", "9 of 9", f"{good} of {len(found)}", good == 9)
    return found, [row]


def numbers(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = checks.broken_batches(place.run("clean"), 1000)
    good = found["skipped"] == 1000 and found["arrays_changed"] == 0 == found["not_finite"]
    return found, [
        (
            "NaN and infinite batches",
            "1000 left out, 0 bits changed, 0 in the weights",
            f"{found['skipped']} left out, {found['arrays_changed']} arrays changed,"
            f" {found['not_finite']} in the weights",
            good,
        )
    ]


def disk(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = {"full": runs.full_disk(place), "second": runs.second_run(place)}
    told("a full disk, and a second run on one folder")
    full, second = found["full"], found["second"]
    return found, [
        (
            "full disk",
            "told; equal losses once there is room",
            f"told: {full['refused']}, equal: {full['equal']}",
            full["refused"] and full["equal"],
        ),
        (
            "a second run on one folder",
            "refused; free after `kill -9` of the first",
            f"refused: {second['refused']}, free: {second['free']}",
            second["refused"] and second["free"],
        ),
    ]


def cost(place: runs.Place, steps: int, asked: Any, told: Any) -> tuple[Any, list[Row]]:
    found = checks.cost(place.folder / "cost")
    text = ", ".join(f"{name.split('_')[0]} {speed:.0f} MB/s" for name, speed in found.items())
    return found, [("digests", "none: a cost", text, True)]


FIGURES: dict[str, Callable[..., tuple[Any, list[Row]]]] = {
    "kills": kills,
    "signals": signals,
    "elastic": elastic,
    "layouts": layouts,
    "processes": processes,
    "damages": damages,
    "edits": edits,
    "numbers": numbers,
    "disk": disk,
    "cost": cost,
}
