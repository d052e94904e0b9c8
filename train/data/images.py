"""Batches of labelled images that are a pure function of (seed, step), like the batches of tokens in `batches.py`.

Images come from any tfds classification data set that is prepared as array_record. Threads or worker processes decode
them with Pillow (`views.py`). An epoch visits every image once, in an order that depends on (seed, epoch); the view of
an image depends on (seed, step, row). The parameters that mix two images are drawn here, once per batch, and the device
mixes:

    mixup    (arXiv 1710.09412)  x ← λ x + (1−λ) x',                      y ← λ y + (1−λ) y'
    cutmix   (arXiv 1905.04899)  x' replaces a rectangle of x,            λ: the share of x that is left

Here λ is drawn from Beta(α, α), and x' is the batch in reverse order. As in DeiT, one of the two applies to the whole
batch, each with probability 1/2.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.data import augment, datasets, view_workers, views
from train.data.batches import permutation
from train.data.views import Wanted
from train.errors import UserError

NO_LABEL = -1  # label of the rows that fill up the last evaluation batch
MEAN = np.array(
    [0.485, 0.456, 0.406], np.float32
)  # of ImageNet, per channel, for values from 0 to 1
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)  # standard deviation, likewise

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Augmentation of images and labels in training; 0 switches a part off."""

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
class ImageBatches:
    """Training and held-out images, and how to make batches of them."""

    name: str  # tfds name with version
    train: datasets.RandomAccessSplit  # the image is encoded bytes, the label a number
    held: datasets.RandomAccessSplit  # held out
    fields: tuple[str, str]  # names of the fields for image and label
    classes: int
    size: int  # side of the model's input [pixels]
    batch_size: int  # images per step, over all processes
    seed: int
    recipe: Recipe
    digest: str  # SHA-256 over names and sizes of all files, hexadecimal
    workers: int = 0  # processes that make views; 0: threads of this process do

    @functools.cached_property
    def maker(self) -> views.ViewMaker:
        wanted = (self.size, self.seed, self.recipe.magnitude, self.recipe.erasing)
        return views.ViewMaker(self.train, self.held, self.fields, *wanted)

    @functools.cached_property
    def _make(self) -> Callable[[Sequence[Wanted]], views.Views]:
        """Makes views; worker processes start when it is first asked for."""
        if self.workers:
            return view_workers.Workers(self.maker, self.workers).make
        return functools.partial(views.by_threads, self.maker)

    @property
    def steps_per_epoch(self) -> float:
        return len(self.train) / self.batch_size

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Of a training batch."""
        return {name: x.shape for name, x in batch_shapes(self.batch_size, self.size).items()}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The images of one training step.

        Args:
          step: from 0.
          rows: the rows that this process needs; None makes the whole batch.

        Returns:
          image: uint8 [rows, size, size, 3].
          label: int32 [rows].
          pixels, labels: float32 [rows], the shares of an image and of its label that are kept.
          box: int32 [rows, 4], top, bottom, left and right of the rectangle that another image replaces.
          noise: uint32 [rows], the seed of the model's random numbers for this row.
          `pixels`, `labels` and `box` are the same in all rows of a batch.
        """
        row = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        epoch, position = np.divmod(step * self.batch_size + row, len(self.train))
        number = np.empty_like(row)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            number[here] = permutation(position[here], len(self.train), (self.seed, e))

        made = self._make([Wanted(n, step, r) for n, r in zip(number.tolist(), row.tolist())])
        pixels, labels, box = self._mix(step)
        return {
            "image": made.image,
            "label": made.label,
            "pixels": np.full(len(row), pixels, np.float32),
            "labels": np.full(len(row), labels, np.float32),
            "box": np.tile(np.array(box, np.int32), (len(row), 1)),
            "noise": made.noise,
        }

    def _mix(self, step: int) -> tuple[float, float, tuple[int, int, int, int]]:
        """The shares of pixels and labels that are kept, and the rectangle that is replaced."""
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
        # The part of the rectangle that lies inside the image.
        top, left = (min(max(int(c - half), 0), self.size) for c in (y, x))
        bottom, right = (min(max(int(c + half), 0), self.size) for c in (y, x))
        left_over = 1 - (bottom - top) * (right - left) / self.size**2
        return 1.0, left_over, (top, bottom, left, right)

    def held_out(self, batches: int) -> Iterator[Batch]:
        """Evaluation batches, one at a time, spread evenly over the held-out images; the same at every call.

        Args:
          batches: number of batches; fewer if that is the whole set. Rows that fill up the last batch have the
            label NO_LABEL.
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
        made = self._make([Wanted(number) for number in numbers.tolist()])
        image = np.zeros((self.batch_size, self.size, self.size, 3), np.uint8)
        label = np.full(self.batch_size, NO_LABEL, np.int32)
        image[: len(numbers)], label[: len(numbers)] = made.image, made.label
        return {"image": image, "label": label}

    def summary(self) -> dict[str, Any]:
        """Facts to print and to store; JSON values only."""
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


def load_images(
    name: str,
    *,
    size: int,
    batch_size: int,
    seed: int,
    recipe: Recipe,
    split: str = "train",
    held_out: str | None = None,
    data_dir: str | None = None,
    workers: int = 0,
) -> ImageBatches:
    """Opens a prepared tfds data set of labelled images, such as imagenet2012 or cifar10.

    Args:
      name: tfds name of the data set.
      size: side of the model's input [pixels].
      batch_size: images per step, over all processes.
      seed: of the order of the images, of their views and of the mixing.
      recipe: of the augmentation.
      split: part to train on.
      held_out: part to evaluate on; None means validation, or else test.
      data_dir: folder of prepared data sets; see `datasets.data_folder`.
      workers: processes that make views; 0: threads of this process make them. The views are the same.

    Raises:
      UserError: the data set is not prepared, or is not a set of labelled images; the message says how to proceed.
    """
    source = datasets.builder(name, data_dir, "--images.folder")
    if not datasets.is_random_access(source):
        raise UserError(
            f"{source.info.full_name} is prepared as tfrecord, which does not allow reading images in random"
            " order. Convert it once, on a machine with TensorFlow:\n  tfds convert_format"
            f" --dataset_dir {source.data_path} --out_file_format array_record --out_dir FOLDER"
        )
    splits = list(source.info.splits)
    held_out = held_out or next((s for s in ("validation", "test") if s in splits), None)
    if held_out is None:
        raise UserError(
            f"{name} has no split validation or test; hold out a part of another, such as 'train[95%:]', and"
            " train on the rest."
        )
    names_of = {
        kind: [n for n, f in source.info.features.items() if type(f).__name__ == kind]
        for kind in ("Image", "ClassLabel")
    }
    if any(len(names) != 1 for names in names_of.values()):
        raise UserError(
            f"{source.info.full_name} is not a set of labelled images: it needs one Image and one ClassLabel,"
            f" and has {names_of['Image'] or 'no Image'} and {names_of['ClassLabel'] or 'no ClassLabel'}."
        )
    fields = names_of["Image"][0], names_of["ClassLabel"][0]
    datasets.check_disjoint(source, split, held_out)
    facts = datasets.describe(source) | {"split": split, "held_out": held_out}
    return ImageBatches(
        *(source.info.full_name,),
        *(datasets.open_split(source, s, fields[0]) for s in (split, held_out)),
        fields=fields,
        classes=source.info.features[fields[1]].num_classes,
        size=size,
        batch_size=batch_size,
        seed=seed,
        recipe=recipe,
        digest=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        workers=workers,
    )


def normalised(image: jax.Array) -> jax.Array:
    """uint8 [..., 3] to float32 with mean about 0 and standard deviation about 1."""
    return (image.astype(jnp.float32) / 255 - MEAN) / DEVIATION


def mixed(
    batch: dict[str, jax.Array], classes: int, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Mixed images and labels of a training batch: float32 [B, size, size, 3] and [B, classes], rows sum to 1."""
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
    """Sums over the images with a label: cross-entropy [nats], correct predictions and number of images; float32."""
    known = label >= 0
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(scores, jnp.maximum(label, 0)[:, None], 1)[:, 0]
    right = jnp.argmax(logits, -1) == label
    return (
        jnp.sum(jnp.where(known, loss, 0)),
        jnp.sum(known & right, dtype=jnp.float32),
        jnp.sum(known, dtype=jnp.float32),
    )
