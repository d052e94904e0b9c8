"""How the results of a study were made: command, commits, versions, devices, texts and fields."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def how_it_was_made(study: Any, records: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> str:
    """The last section of a report; the folder holds environment.json."""
    starts = json.loads((folder / "environment.json").read_text())
    last = starts[-1]
    hours = sum(r.get("seconds", 0.0) for r in records) / 3600
    commits = list(dict.fromkeys(str(s["commit"]) for s in starts))
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    lines = ["## How it was made", "", f"* command: `{last['command']}`"]
    count = f"{len(starts)} starts" if len(starts) > 1 else "1 start"
    lines.append(f"* commits: {', '.join(commits)} ({count})")
    if any(s["uncommitted_changes"] for s in starts):
        lines.append("* some of these starts had uncommitted changes")
    lines.append(f"* versions: Python {last['python']}, {versions}")
    lines.append(f"* device: {last['devices']['kind']}, {last['cores']} cores, {last['system']}")
    lines.append(f"* {len(records)} runs, {hours:.2f} hours of training in all, over all processes")
    for text, facts in last.get("texts", {}).items():
        lines.append(
            f"* {text}: sha256 {facts['digest'][:16]}…, {facts['train_tokens']} training tokens,"
            f" {facts['held_out_tokens']} held out"
        )
    for name, value in dataclasses.asdict(study).items():
        if name != "folder":
            lines.append(f"* {name}: {value}")
    return "\n".join([*lines, ""])
