"""Image augmentation for training, following DeiT's recipe (arXiv 2012.12877), and the evaluation crop.

    crop      a random part of 8 to 100 % of the area, with an aspect ratio of 3/4 to 4/3, resized to the input size
    flip      left to right, with probability 1/2
    colours   RandAugment (arXiv 1909.13719): two operations, each applied with probability 1/2, at a magnitude
              drawn from N(m, 0.5²) and clipped to 0 to 10; a larger magnitude is always a stronger change
    erase     one rectangle of 2 to 33 % of the area becomes noise, with a given probability (arXiv 1708.04896)

Every function draws its random numbers from the generator that it is given. Pillow implements the operations. The
policy is written here because the libraries that ship it depend on TensorFlow, torch or OpenCV.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN = (124, 116, 104)  # of ImageNet, per channel; fills the area that a shift leaves empty
FLIP = Image.Transpose.FLIP_LEFT_RIGHT
STRONGEST = 10.0


def training_view(
    image: Image.Image, size: int, rng: np.random.Generator, magnitude: float, erasing: float
) -> np.ndarray:
    """One random view of an RGB image, uint8 [size, size, 3]. A magnitude of 0 switches RandAugment off."""
    view = random_crop(image, size, rng)
    if rng.random() < 0.5:
        view = view.transpose(FLIP)
    if magnitude:
        view = rand_augment(view, rng, magnitude)
    return erase(np.asarray(view, np.uint8), rng, erasing)


def evaluation_view(image: Image.Image, size: int) -> np.ndarray:
    """The central crop that is usual for ImageNet, uint8 [size, size, 3]: 7/8 of the side of the largest square."""
    shorter = min(image.size) * 7 / 8
    left, top = ((side - shorter) / 2 for side in image.size)
    box = (left, top, left + shorter, top + shorter)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.uint8)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of the image, resized. After ten draws that do not fit, the largest central part that does."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def rand_augment(image: Image.Image, rng: np.random.Generator, magnitude: float) -> Image.Image:
    """Draws two operations with replacement and applies each with probability 1/2."""
    for index in rng.integers(len(OPERATIONS), size=2).tolist():
        level = float(np.clip(rng.normal(magnitude, 0.5), 0, STRONGEST)) / STRONGEST
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            image = OPERATIONS[index](image, level, sign)
    return image


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable:
    def change(image: Image.Image, level: float, sign: int) -> Image.Image:
        return kind(image).enhance(1 + sign * 0.9 * level)

    return change


def _shift(
    matrix: Callable[[float, int, int], tuple[float, float, float, float, float, float]],
) -> Callable:
    """An operation that applies an affine map; `matrix` takes the signed level, and the image's width and height."""

    def change(image: Image.Image, level: float, sign: int) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(sign * level, *image.size),
            resample=Image.Resampling.BILINEAR,
            fillcolor=MEAN,
        )

    return change


def _brighter_darks(image: Image.Image, level: float, sign: int) -> Image.Image:
    add = int(110 * level)
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


# Each takes an RGB image, a level from 0 to 1, and a sign, which operations without a direction ignore.
OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: ImageOps.invert(image),
    lambda image, level, sign: image.rotate(
        sign * 30 * level, resample=Image.Resampling.BILINEAR, fillcolor=MEAN
    ),
    lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    _brighter_darks,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shift(lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0)),
    _shift(lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0)),
    _shift(lambda s, w, h: (1, 0, 0.45 * s * w, 0, 1, 0)),
    _shift(lambda s, w, h: (1, 0, 0, 0, 1, 0.45 * s * h)),
)


def erase(pixels: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """Replaces one rectangle by noise of the images' mean brightness, with the given probability."""
    if rng.random() >= probability:
        return pixels
    size = len(pixels)
    for _ in range(10):
        area = size * size * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < size and 0 < w < size:
            top, left = int(rng.integers(size - h + 1)), int(rng.integers(size - w + 1))
            noise = rng.normal(MEAN, 58.0, (h, w, 3))
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = np.clip(noise, 0, 255).astype(np.uint8)
            break
    return pixels
