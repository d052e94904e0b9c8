"""What features.json of a prepared data set may name: classes of tfds only.

tfds imports the module of every class that the file names, which would run any module of the working directory.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from train import disk
from train.errors import UserError

CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
ALLOWED = "tensorflow_datasets."


def check_features(folder: pathlib.Path) -> None:
    """Raises UserError if features.json in a folder names a class outside of tfds; a missing file is no error."""
    path = folder / "features.json"
    if disk.kind(path) is None:
        return
    try:
        names = sorted(set(_classes(json.loads(disk.read_json_text(path)))))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {disk.reason(error)}.") from None
    for name in names:
        if not name.startswith(ALLOWED):
            raise UserError(
                f"{path} names the class {name!r}, which would be imported and run; allowed are the classes of tfds,"
                " tensorflow_datasets.*."
            )


def _classes(node: Any) -> Iterator[str]:
    """Every text that tfds would read as the name of a class."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from (node[key] for key in CLASS_KEYS if isinstance(node.get(key), str))
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
