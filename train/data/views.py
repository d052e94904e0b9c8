"""Views of images: read, decoded, cropped and changed. It does not import JAX, which would delay each worker process.

A view is a pure function of what is wanted, so the numbers do not depend on which thread or process makes it.
"""

import concurrent.futures
import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from train import cores
from train.data import augment, datasets
from train.errors import UserError

LARGEST = 64_000_000  # pixels of an image that is decoded, such as 8000 x 8000; 200 MB
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # EPS would start another program
Image.MAX_IMAGE_PIXELS = None  # `decoded` checks, and Pillow would warn as well


class Wanted(NamedTuple):
    """One view of one image."""

    number: int  # of the image in its split
    step: int | None = None  # of training; None: the central crop of a held-out image
    row: int = 0  # in the batch of that step


class Views(NamedTuple):
    """Several views, in the order in which they were wanted."""

    image: np.ndarray  # uint8 [views, size, size, 3]
    label: np.ndarray  # int32 [views]
    noise: np.ndarray  # uint32 [views], a random number for each in training, else 0


@dataclasses.dataclass(frozen=True)
class ViewMaker:
    """Makes views, one at a time."""

    train: datasets.RandomAccessSplit  # the image is encoded bytes, the label a number
    held: datasets.RandomAccessSplit  # held out
    fields: tuple[str, str]  # names of the fields for image and label
    size: int  # side of a view [pixels]
    seed: int
    magnitude: float  # of RandAugment, 0 to 10
    erasing: float  # probability

    def make(self, wanted: Wanted) -> tuple[np.ndarray, int, int]:
        """Image, label and noise of a view; random numbers depend on (seed, step, row).

        Raises:
            UserError: the image cannot be read.
        """
        if wanted.step is None:
            image, label = self.read(self.held, wanted.number)
            return augment.evaluation_view(image, self.size), label, 0
        rng = np.random.default_rng((self.seed, wanted.step, wanted.row))
        image, label = self.read(self.train, wanted.number)
        view = augment.training_view(image, self.size, rng, self.magnitude, self.erasing)
        return view, label, int(rng.integers(1 << 32))

    def read(self, source: datasets.RandomAccessSplit, number: int) -> tuple[Image.Image, int]:
        """The whole image and its label.

        Raises:
            UserError: the file is damaged, or holds no image that can be read.
        """
        example = source[int(number)]
        try:
            image = decoded(example[self.fields[0]])
        # Each of Pillow's formats raises its own exceptions.
        except Exception as error:
            where = source.place(int(number))
            raise UserError(
                f"{where} holds no image that can be read: {error}. {datasets.PREPARE_AGAIN}"
            ) from None
        return image, int(example[self.fields[1]])

    def empty(self, count: int) -> Views:
        """Arrays for so many views."""
        return Views(
            np.empty((count, self.size, self.size, 3), np.uint8),
            np.empty(count, np.int32),
            np.empty(count, np.uint32),
        )


def by_threads(maker: ViewMaker, wanted: Sequence[Wanted]) -> Views:
    """Makes views in threads of this process, as many as there are cores."""
    views = maker.empty(len(wanted))
    for i, made in enumerate(_threads().map(maker.make, wanted)):
        for array, value in zip(views, made):
            array[i] = value
    return views


def decoded(content: bytes) -> Image.Image:
    """An encoded image as RGB.

    Raises:
      Exception: whatever Pillow's decoders raise; ValueError if the image has more than `LARGEST` pixels, before any
        of them is decoded.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if math.prod(image.size) > LARGEST:
        width, height = image.size
        raise ValueError(
            f"it has {width} x {height} pixels; allowed are at most {LARGEST // 10**6} million, since every thread"
            " or worker decodes one at a time"
        )
    return image.convert("RGB")


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Pillow releases Python's global lock while it decodes and resizes, so threads run in parallel."""
    return concurrent.futures.ThreadPoolExecutor(cores.usable())
