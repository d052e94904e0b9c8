"""Batches of labelled images that are a pure function of (seed, step), as `data.py` makes of tokens.

Images come from any tfds classification set prepared as array_record, and are decoded with Pillow by
threads. An epoch visits every image once, in an order that depends on (seed, epoch); the view of an image
depends on (seed, step, row). What mixes two images is decided here, per batch, and done on the device:

    mixup    (arXiv 1710.09412)  x ← λ x + (1−λ) x',                   y ← λ y + (1−λ) y'
    cutmix   (arXiv 1905.04899)  a rectangle of x becomes that of x',  λ: the share of x that is left

with λ from Beta(α, α), x' the batch in reverse order, and one of the two, each half of the time, for a
whole batch, as in DeiT.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from train.data import augment, datasets
from train.data.batches import permutation
from train.errors import UserError

NO_LABEL = -1  # of rows that fill up the last evaluation batch
CENTRE = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, of values from 0 to 1
SPREAD = np.array([0.229, 0.224, 0.225], np.float32)

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to images and labels in training; 0 leaves a part out."""

    magnitude: float = 9.0  # of RandAugment, 0 to 10
    erasing: float = 0.25  # probability
    mixup: float = 0.8  # α of its Beta distribution
    cutmix: float = 1.0  # likewise
    smoothing: float = 0.1  # share of a label that is spread evenly over all classes

    def __post_init__(self) -> None:
        highest = {"magnitude": augment.STRONGEST, "erasing": 1.0, "smoothing": 1.0}
        for name, value in vars(self).items():
            high = highest.get(name, math.inf)
            if not (0 <= value <= high and math.isfinite(value)):
                near = min(max(value, 0.0), high) if math.isfinite(value) else 0.0
                raise ValueError(
                    f"{name}={value} is out of range: allowed is 0 to {high:g}; nearest: {near:g}"
                )


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train on and to evaluate on."""

    name: str  # as tfds names it, with its version
    train: datasets.Numbered  # the image is encoded bytes, the label a number
    held: datasets.Numbered  # held out
    fields: tuple[str, str]  # names of image and label
    classes: int
    size: int  # pixels along a side of what a model is given
    batch_size: int  # over all processes
    seed: int
    recipe: Recipe
    digest: str  # sha256 over names and sizes of all files, hexadecimal

    @property
    def steps_per_epoch(self) -> float:
        return len(self.train) / self.batch_size

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Of a training batch."""
        return {name: x.shape for name, x in batch_shapes(self.batch_size, self.size).items()}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """One training step's rows, or some of them.

        Args:
          step: from 0.
          rows: the part of the batch to make, for a process that needs no more; None is all.

        Returns:
          image: uint8 [rows, size, size, 3].
          label: int32 [rows].
          pixels, labels: float32 [rows], shares of an image and of its label that stay.
          box: int32 [rows, 4], top, bottom, left, right of what another image replaces.
          noise: uint32 [rows], for what a model draws at random.
          All rows of a batch have the same last four, but noise.
        """
        row = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        epoch, position = np.divmod(step * self.batch_size + row, len(self.train))
        number = np.empty_like(row)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            number[here] = permutation(position[here], len(self.train), (self.seed, e))

        def make(pair: tuple[int, int]) -> tuple[np.ndarray, int, int]:
            rng = np.random.default_rng((self.seed, step, pair[0]))
            image, label = self._read(self.train, pair[1])
            view = augment.training_view(
                image, self.size, rng, self.recipe.magnitude, self.recipe.erasing
            )
            return view, label, int(rng.integers(1 << 32))

        made = list(_threads().map(make, zip(row.tolist(), number.tolist())))
        pixels, labels, box = self._mix(step)
        return {
            "image": np.stack([view for view, _, _ in made]),
            "label": np.array([label for _, label, _ in made], np.int32),
            "pixels": np.full(len(row), pixels, np.float32),
            "labels": np.full(len(row), labels, np.float32),
            "box": np.tile(np.array(box, np.int32), (len(row), 1)),
            "noise": np.array([noise for _, _, noise in made], np.uint32),
        }

    def _mix(self, step: int) -> tuple[float, float, tuple[int, int, int, int]]:
        """Shares of pixels and labels that stay, and the rectangle that does not."""
        rng = np.random.default_rng((self.seed, step, self.batch_size))
        kinds = [k for k in ("mixup", "cutmix") if getattr(self.recipe, k)]
        if not kinds:
            return 1.0, 1.0, (0, 0, 0, 0)
        kind = kinds[int(rng.integers(len(kinds)))]
        alpha = getattr(self.recipe, kind)
        share = float(rng.beta(alpha, alpha))
        if kind == "mixup":
            return share, share, (0, 0, 0, 0)
        half = math.sqrt(1 - share) * self.size / 2
        y, x = rng.integers(self.size, size=2).tolist()
        # As much of the rectangle as is inside of the image.
        top, left = (min(max(int(c - half), 0), self.size) for c in (y, x))
        bottom, right = (min(max(int(c + half), 0), self.size) for c in (y, x))
        left_over = 1 - (bottom - top) * (right - left) / self.size**2
        return 1.0, left_over, (top, bottom, left, right)

    def held_out(self, batches: int) -> Iterator[Batch]:
        """The same evaluation batches at every call, evenly spread over the held-out images; one at a time.

        Args:
          batches: how many are wanted; of a small set fewer, and all of it. Rows that the last
            batch lacks have the label NO_LABEL.
        """
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        count = min(batches * self.batch_size, len(self.held))
        chosen = np.arange(count) * len(self.held) // count
        return (
            self._evaluation(chosen[i : i + self.batch_size])
            for i in range(0, count, self.batch_size)
        )

    def _evaluation(self, numbers: np.ndarray) -> Batch:
        def make(number: int) -> tuple[np.ndarray, int]:
            image, label = self._read(self.held, number)
            return augment.evaluation_view(image, self.size), label

        made = list(_threads().map(make, numbers.tolist()))
        image = np.zeros((self.batch_size, self.size, self.size, 3), np.uint8)
        label = np.full(self.batch_size, NO_LABEL, np.int32)
        image[: len(made)] = np.stack([view for view, _ in made])
        label[: len(made)] = [label for _, label in made]
        return {"image": image, "label": label}

    def _read(self, source: datasets.Numbered, number: int) -> tuple[Image.Image, int]:
        example = source[int(number)]
        try:
            image = Image.open(io.BytesIO(example[self.fields[0]])).convert("RGB")
        # Pillow's formats each have their own ways to fail.
        except Exception as error:
            where = source.place(int(number))
            raise UserError(
                f"{where} holds no image that can be read: {error}. {datasets.AGAIN}"
            ) from None
        return image, int(example[self.fields[1]])

    def summary(self) -> dict[str, Any]:
        """What to print and to store: JSON values only."""
        return {
            "source": self.name,
            "digest": self.digest,
            "classes": self.classes,
            "train_images": len(self.train),
            "held_out_images": len(self.held),
            "steps_per_epoch": self.steps_per_epoch,
        }


def batch_shapes(rows: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch of so many images of `size` pixels a side (`Images.batch`)."""
    shape = jax.ShapeDtypeStruct
    return {
        "image": shape((rows, size, size, 3), np.uint8),
        "label": shape((rows,), np.int32),
        "pixels": shape((rows,), np.float32),
        "labels": shape((rows,), np.float32),
        "box": shape((rows, 4), np.int32),
        "noise": shape((rows,), np.uint32),
    }


def load(
    name: str,
    *,
    size: int,
    batch_size: int,
    seed: int,
    recipe: Recipe,
    split: str = "train",
    held_out: str | None = None,
    data_dir: str | None = None,
) -> Images:
    """A prepared tfds set of labelled images, such as imagenet2012 or cifar10.

    Args:
      name: as tfds names it.
      size: pixels along a side of what a model is given.
      batch_size: images per step, over all processes.
      seed: of the order of the images, of their views and of what is mixed.
      recipe: of the views.
      split: to train on.
      held_out: to evaluate on; None: validation, or test.
      data_dir: where data sets are prepared; see `datasets.data_folder`.

    Raises:
      UserError: nothing there, or not a set of labelled images; says what to do.
    """
    source = datasets.builder(name, data_dir, "--images.folder")
    if not datasets.is_random_access(source):
        raise UserError(
            f"{source.info.full_name} is prepared as tfrecord, in which images cannot be read in a"
            " random order. Convert it once, on a machine with TensorFlow:\n  tfds convert_format"
            f" --dataset_dir {source.data_path} --out_file_format array_record --out_dir FOLDER"
        )
    splits = list(source.info.splits)
    held_out = held_out or next((s for s in ("validation", "test") if s in splits), None)
    if held_out is None:
        raise UserError(
            f"{name} has no split validation or test; name what to hold out, such as 'train[95%:]',"
            " and train on the rest."
        )
    of = {
        kind: [n for n, f in source.info.features.items() if type(f).__name__ == kind]
        for kind in ("Image", "ClassLabel")
    }
    if any(len(names) != 1 for names in of.values()):
        raise UserError(
            f"{source.info.full_name} is no set of labelled images: it needs one Image and one"
            f" ClassLabel, and has {of['Image'] or 'no Image'} and {of['ClassLabel'] or 'no ClassLabel'}."
        )
    fields = of["Image"][0], of["ClassLabel"][0]
    datasets.apart(source, split, held_out)
    facts = datasets.describe(source) | {"split": split, "held_out": held_out}
    return Images(
        *(source.info.full_name,),
        *(datasets.numbered(source, s, fields[0]) for s in (split, held_out)),
        fields=fields,
        classes=source.info.features[fields[1]].num_classes,
        size=size,
        batch_size=batch_size,
        seed=seed,
        recipe=recipe,
        digest=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
    )


def normalised(image: jax.Array) -> jax.Array:
    """uint8 [..., 3] to float32 of mean about 0 and deviation about 1."""
    return (image.astype(jnp.float32) / 255 - CENTRE) / SPREAD


def mixed(
    batch: dict[str, jax.Array], classes: int, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Images and labels of a training batch: float32 [B, size, size, 3] and [B, classes], rows summing to 1."""
    x, share = normalised(batch["image"]), batch["pixels"][:, None, None, None]
    top, bottom, left, right = (batch["box"][:, i, None, None, None] for i in range(4))
    y_axis = jnp.arange(x.shape[1])[:, None, None]
    x_axis = jnp.arange(x.shape[2])[:, None]
    inside = (y_axis >= top) & (y_axis < bottom) & (x_axis >= left) & (x_axis < right)
    other = jnp.flip(x, 0)
    x = jnp.where(inside, other, share * x + (1 - share) * other)
    label = jax.nn.one_hot(batch["label"], classes) * (1 - smoothing) + smoothing / classes
    kept = batch["labels"][:, None]
    return x, kept * label + (1 - kept) * jnp.flip(label, 0)


def top1(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the images with a label: cross-entropy [nats], right answers, images; float32."""
    known = label >= 0
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(scores, jnp.maximum(label, 0)[:, None], 1)[:, 0]
    right = jnp.argmax(logits, -1) == label
    return (
        jnp.sum(jnp.where(known, loss, 0)),
        jnp.sum(known & right, dtype=jnp.float32),
        jnp.sum(known, dtype=jnp.float32),
    )


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Pillow lets go of Python's lock while it decodes and resizes."""
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
