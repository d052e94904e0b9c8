"""Pictures that a report has written."""

import pathlib

import numpy as np
from PIL import Image


def is_drawn(path: pathlib.Path) -> bool:
    """Whether a file is a picture of some size, neither blank nor full."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"))
    dark = float((grey < 200).mean())
    return min(grey.shape) > 300 and 0.003 < dark < 0.6
