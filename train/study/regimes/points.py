"""Points of a finished comparison, so that others can train at them without a search: points.json of its folder.

The file is a list of {"arm", "text", "learning_rate", "weight_decay"}, one entry for each arm on each text.
"""

import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from train.config.fields import UserError, nearest

FILE = "points.json"
FIELDS = ("arm", "text", "learning_rate", "weight_decay")
Points = Mapping[tuple[str, str], tuple[float, float]]  # of arm and text: learning rate and λ


@functools.lru_cache(maxsize=4)
def read(name: str) -> Points:
    """The points of a file.

    Raises:
        UserError: it cannot be read, or an entry is not a point.
    """
    path = pathlib.Path(name).expanduser()
    try:
        entries = json.loads(path.read_text())
        points = {(str(e["arm"]), str(e["text"])): (e[FIELDS[2]], e[FIELDS[3]]) for e in entries}
        numbers = [float(x) for point in points.values() for x in point]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--points {name} holds no points ({error}): it is a list of objects with {', '.join(FIELDS)}, as a"
            f" finished comparison leaves it in {FILE}."
        ) from None
    if not all(math.isfinite(x) and x >= 0 for x in numbers):
        raise UserError(f"--points {name}: a learning rate or λ is negative or not finite.")
    return points


def check(name: str, arms: Sequence[str], texts: Sequence[str]) -> None:
    """Raises UserError unless every arm has a point on every text."""
    points = read(name)
    for text in texts:
        for arm in arms:
            if (arm, text) not in points:
                there = [a for a, t in points if t == text]
                close = f"; nearest: {nearest(arm, there)}" if there else ""
                raise UserError(f"--points {name} has no point of {arm} on {text}{close}.")
