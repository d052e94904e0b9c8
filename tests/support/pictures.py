"""A small tfds set of labelled pictures, and flags for a toy ViT run on it."""

import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tests.support import tfds_files

CLASSES = 5
WIDTH = (
    "--model.preset vit-toy --model.image_size 12 --model.width 16 --model.mlp_width 20 --model.layers 2"
    " --model.heads 2"
)
TOY = (
    f"{WIDTH} --images.name shapes --data.batch_size 8 --mesh.data 1 --run.steps 6 --run.eval_every 2"
    " --run.eval_batches 2 --run.save_every 2 --run.keep 9 --run.tensorboard False"
).split()


def picture(number: int) -> np.ndarray:
    """A picture of its own size, whose colours say its number: red 3 n, green 20 + 50 label."""
    rng = np.random.default_rng(number)
    pixels = np.empty((14 + number % 3, 20 - number % 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 3 * number, 20 + 50 * (number % CLASSES)
    pixels[..., 2] = rng.integers(256, size=pixels.shape[:2])
    return pixels


def png(number: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "png")
    file.seek(0)
    return file


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """The data set `shapes` below `folder`: 30 pictures to train on, 11 to test; returns its own folder."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=CLASSES),
        "file": tfds.features.Text(),
    }
    rows = {
        "train": [{"image": png(n), "label": n % CLASSES, "file": f"{n}"} for n in range(30)],
        "test": [{"image": png(n), "label": n % CLASSES, "file": "x"} for n in range(40, 51)],
    }
    return tfds_files.prepare(folder, tfds_files.make_builder("shapes", features, rows))


def flags(folder: pathlib.Path, *more: str) -> list[str]:
    """Of a toy run in folder/run on the pictures in `folder`; `more` overrides."""
    if not (folder / "shapes").exists():
        prepare(folder)
    return [*TOY, "--images.folder", str(folder), "--run.folder", str(folder / "run"), *more]
