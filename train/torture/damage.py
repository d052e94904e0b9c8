"""Damages files as failing disks and people do: flipped bits, truncation, deletion."""

import pathlib
import random


def one(folder: pathlib.Path, generator: random.Random, kind: str) -> str:
    """Flips one bit of a random file, truncates it, or deletes it; returns a description."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = generator.choice(paths)
    content = bytearray(path.read_bytes())
    match kind:
        case "flip":
            bit = generator.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: generator.randrange(len(content))])
        case "delete":
            path.unlink()
    return f"{kind} {path.relative_to(folder).as_posix()}"
