"""Training and evaluation of an image classifier; `update.py` does the same for language models.

    L = −Σ_c y_c log softmax(logits)_c      averaged over the images; y: smoothed and mixed labels
    a ← m a + (1−m) w                       the mean of the weights w, which is evaluated as well

The whole batch is mixed before it is worked through in parts, so that the number of parts does not
change what is mixed with what; where replicas are workers (`replicas.on_each`), each mixes its own rows.
The paths that a model drops follow from the batch's noise, so that a step is a function of state and batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from train.data import images
from train.step import replicas, update

# (params, images [B, H, W, C], key=None) -> logits [B, C]; the key says what is dropped in training.
Forward = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model of images and its loss.

    Attributes:
        forward: of the model.
        classes: number of them.
        smoothing: share of a label that all classes get alike.
        average: share m of the mean of the weights that a step keeps; None: no mean.
    """

    forward: Forward
    classes: int
    smoothing: float
    average: float | None = None

    def __post_init__(self) -> None:
        if self.average is not None and not 0 <= self.average < 1:
            nearest = "0" if self.average < 0 else "a number below 1, such as 0.9999"
            raise ValueError(
                f"average={self.average} is out of range: 0 <= average < 1; nearest: {nearest}"
            )


def first_state(
    classifier: Classifier, params: Any, tx: optax.GradientTransformation
) -> update.State:
    """The state before the first step; with `average`, the mean starts at the weights."""
    state = update.first_state(params, tx)
    if classifier.average is not None:
        # A copy: two leaves that share memory cannot both be given away to the next step.
        state["average"] = jax.tree.map(lambda w: w + 0, state["params"])
    return state


def loss(classifier: Classifier, params: Any, part: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of mixed images, in nats."""
    key = jax.random.key(part["noise"][0])
    logits = classifier.forward(params, part["image"], key=key).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy(logits, part["label"]))


def loss_and_gradient(
    classifier: Classifier, params: Any, batch: dict[str, jax.Array], micro_batches: int
) -> tuple[jax.Array, Any]:
    """Loss and gradient of a batch as `images.Images.batch` makes it, in equal parts one after the other."""
    pieces = _parts(classifier, batch, micro_batches)
    both = jax.value_and_grad(functools.partial(loss, classifier))
    params, nothing = replicas.own((params, jnp.zeros([], jnp.float32)))

    def add(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x / micro_batches, total, both(params, part)), None

    if micro_batches == 1:
        return both(params, jax.tree.map(lambda x: x[0], pieces))
    zero = (nothing, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, pieces)[0]


def train_step(
    classifier: Classifier,
    tx: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    micro_batches: int,
    curvature: bool,
    state: update.State,
    batch: dict[str, jax.Array],
) -> tuple[update.State, dict[str, jax.Array]]:
    """The state after one step, and float32 scalars to note of the step; arguments as in `update.train_step`."""
    value, gradient = loss_and_gradient(classifier, state["params"], batch, micro_batches)
    hessian = None
    if curvature:
        pieces = _parts(classifier, batch, micro_batches)["image"]
        hessian = optax_decay.curvature.gnb_hessian(classifier.forward, pieces, micro_batches=True)
    after, noted = update.advance(tx, rate, state, value, gradient, hessian)
    if classifier.average is not None:
        kept = classifier.average
        mean = lambda a, w: (kept * a + (1 - kept) * w).astype(a.dtype)
        after["average"] = jax.tree.map(mean, state["average"], after["params"])
    return after, noted


def sums(
    classifier: Classifier, state: update.State, batch: dict[str, jax.Array]
) -> tuple[jax.Array, ...]:
    """Loss [nats], right answers and images of a held-out batch: of the weights, then of their mean."""
    image, label = images.normalised(batch["image"]), batch["label"]
    found: tuple[jax.Array, ...] = ()
    for name in ("params", "average"):
        if name in state:
            found += images.top1(classifier.forward(state[name], image), label)
    return found


def scores(sums: np.ndarray) -> dict[str, float]:
    """Mean loss and top-1 share, from the total of `sums` over batches."""
    found = {}
    for prefix, (loss, right, count) in zip(("", "average_"), sums.reshape(-1, 3).tolist()):
        found |= {f"{prefix}loss": loss / max(count, 1), f"{prefix}top1": right / max(count, 1)}
    return found


def _parts(
    classifier: Classifier, batch: dict[str, jax.Array], micro_batches: int
) -> dict[str, jax.Array]:
    """Mixed images and labels with a leading axis of parts."""
    image, label = images.mixed(batch, classifier.classes, classifier.smoothing)
    whole = {"image": image, "label": label, "noise": batch["noise"]}
    return jax.tree.map(lambda x: update.parts(x, micro_batches), whole)
