"""The task of a run: to go on with a text, or to say what an image shows.

Both are instances of one interface, `Task`, which is all that the rest of the trainer knows of them; a family of models
learns one of the two (`families.TASKS`). The mathematics is in `update.py` and in `image_task.py`.
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from train.config.fields import Config, UserError, model_config
from train.data import batches, images
from train.display import say
from train.run.figures import Labels
from train.step import families, image_task, update

State = update.State


class Task(Protocol):
    """Built from a complete config (`complete`) alone; batches are arrays, or dicts of them, with a row per example."""

    noun: ClassVar[str]  # of the data
    unit: ClassVar[str]  # that steps are measured in
    words: ClassVar[Labels]

    @staticmethod
    def read(config: Config) -> Any:
        """The data of a config, with `digest`, `shape` of a batch, `batch`, `held_out` and `summary`."""
        ...

    @staticmethod
    def outputs(data: Any) -> int:
        """Scores that a model has to give for each example: one per token or class."""
        ...

    @property
    def per_step(self) -> int:
        """Units in a step."""
        ...

    @property
    def batch(self) -> Any:
        """A training batch as `jax.ShapeDtypeStruct`."""
        ...

    def first_state(self, params: Any, tx: Any) -> State:
        """The state before the first step."""
        ...

    def train_step(
        self,
        forward: Any,
        tx: Any,
        rate: Any,
        micro_batches: int,
        curvature: bool,
        state: State,
        batch: Any,
        /,
    ) -> tuple[State, dict[str, jax.Array]]:
        """The state after one step, and scalars to note; as `update.train_step`."""
        ...

    def gradient(self, forward: Any, micro_batches: int, params: Any, batch: Any, /) -> Any:
        """Gradient of the mean loss of a batch."""
        ...

    def sums(self, forward: Any, state: State, batch: Any, /) -> tuple[jax.Array, ...]:
        """Sums over a held-out batch; `scores` takes their total over batches. Pure; to be jitted."""
        ...

    def scores(self, sums: np.ndarray, facts: dict[str, Any]) -> dict[str, float]:
        """Record of an evaluation on data with the summary `facts`; its "loss" is in nats."""
        ...

    def say_scores(self, scores: dict[str, float]) -> str: ...

    def introduction(self, facts: dict[str, Any]) -> str:
        """One line about data with the summary `facts`."""
        ...

    def baseline(self, facts: dict[str, Any]) -> float:
        """Loss of a model that looks at nothing, in nats."""
        ...


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """The next token of a text, from those before it."""

    config: Config

    noun: ClassVar[str] = "text"
    unit: ClassVar[str] = "tokens"
    words: ClassVar[Labels] = Labels("nats per token", "held-out text", "token frequencies alone")

    @staticmethod
    def read(config: Config) -> batches.TokenBatches:
        wanted = config.data
        encoded = wanted.text.startswith(batches.STORE)
        say(f"reading {wanted.text}{'' if encoded else f' as {wanted.tokenizer} tokens'} ...")
        try:
            return batches.load_text(
                wanted.text,
                wanted.tokenizer,
                length=wanted.length,
                batch_size=wanted.batch_size,
                seed=config.run.seed,
                documents=wanted.documents,
                cache=pathlib.Path(wanted.cache),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"There is nothing to train on: {error}.") from None

    @staticmethod
    def outputs(data: batches.TokenBatches) -> int:
        return data.vocab_size

    @property
    def per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.length

    @property
    def batch(self) -> jax.ShapeDtypeStruct:
        shape = (self.config.data.batch_size, self.config.data.length + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    first_state = staticmethod(update.first_state)
    train_step = staticmethod(update.train_step)
    gradient = staticmethod(update.gradient)

    def sums(self, forward: Any, state: State, batch: jax.Array) -> tuple[jax.Array, ...]:
        return update.summed(forward, state["params"], batch)

    def scores(self, sums: np.ndarray, facts: dict[str, Any]) -> dict[str, float]:
        total, count = sums.tolist()
        loss = total / max(count, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / facts["bytes_per_token"],
        }

    def say_scores(self, scores: dict[str, float]) -> str:
        return f"perplexity {scores['perplexity']:.1f}, {scores['bits_per_byte']:.3f} bits per byte"

    def introduction(self, facts: dict[str, Any]) -> str:
        return (
            f"{facts['source']}: {facts['documents']} documents, {facts['train_bytes'] / 1e6:.1f} MB,"
            f" {facts['train_tokens'] / 1e6:.2f}M tokens ({facts['tokenizer']})"
        )

    def baseline(self, facts: dict[str, Any]) -> float:
        return facts["unigram_entropy"]


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """The class of an image, by the mathematics of `image_task.Classifier`."""

    config: Config

    noun: ClassVar[str] = "images"
    unit: ClassVar[str] = "images"
    words: ClassVar[Labels] = Labels("nats per image", "held-out images", "all classes alike")

    @staticmethod
    def read(config: Config) -> images.ImageBatches:
        wanted = config.images
        say(f"reading {wanted.name} ...")
        recipe = images.Recipe(
            **{
                field.name: getattr(wanted, field.name)
                for field in dataclasses.fields(images.Recipe)
            }
        )
        return images.load_images(
            wanted.name,
            size=model_config(config).image_size,
            batch_size=config.data.batch_size,
            seed=config.run.seed,
            recipe=recipe,
            split=wanted.split,
            held_out=wanted.held_out,
            data_dir=wanted.folder,
            workers=wanted.workers,
        )

    @staticmethod
    def outputs(data: images.ImageBatches) -> int:
        return data.classes

    @property
    def per_step(self) -> int:
        return self.config.data.batch_size

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        size = self.config.model.image_size or 1
        return images.batch_shapes(self.config.data.batch_size, size)

    def classifier(self, forward: Any) -> image_task.Classifier:
        wanted, classes = self.config.images, self.config.model.vocab_size or 1
        return image_task.Classifier(forward, classes, wanted.smoothing, wanted.average)

    def first_state(self, params: Any, tx: Any) -> State:
        return image_task.first_state(self.classifier(None), params, tx)

    def train_step(self, forward: Any, *arguments: Any) -> tuple[State, dict[str, jax.Array]]:
        return image_task.train_step(self.classifier(forward), *arguments)

    def gradient(self, forward: Any, micro_batches: int, params: Any, batch: Any) -> Any:
        classifier = self.classifier(forward)
        return image_task.loss_and_gradient(classifier, params, batch, micro_batches)[1]

    def sums(self, forward: Any, state: State, batch: Any) -> tuple[jax.Array, ...]:
        return image_task.sums(self.classifier(forward), state, batch)

    def scores(self, sums: np.ndarray, facts: dict[str, Any]) -> dict[str, float]:
        return image_task.scores(sums)

    def say_scores(self, scores: dict[str, float]) -> str:
        text = f"top-1 {100 * scores['top1']:.2f} %"
        if "average_loss" in scores:
            text += (
                f"; of the mean of the weights: loss {scores['average_loss']:.4f},"
                f" top-1 {100 * scores['average_top1']:.2f} %"
            )
        return text

    def introduction(self, facts: dict[str, Any]) -> str:
        return (
            f"{facts['source']}: {facts['train_images']} images of {facts['classes']} classes to train"
            f" on, {facts['held_out_images']} to evaluate on"
        )

    def baseline(self, facts: dict[str, Any]) -> float:
        return math.log(facts["classes"])


TASKS: dict[str, type[LanguageTask] | type[ImageTask]] = {
    "language": LanguageTask,
    "images": ImageTask,
}


def of(config: Config) -> type[LanguageTask] | type[ImageTask]:
    """The task that a config's model learns."""
    return TASKS[families.task(config.model.preset)]


def complete(config: Config, outputs: int) -> Config:
    """A config with the one number that only the data knows: tokens of the tokenizer, or classes.

    Raises:
        UserError: the config asks for fewer.
    """
    if config.model.vocab_size is not None:
        model_config(config, outputs)  # raises
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=outputs))


def only_language(config: Config, command: str) -> None:
    """Raises UserError for a model that is not one of language."""
    if families.task(config.model.preset) != "language":
        raise UserError(
            f"{command} is for language models; model.preset = {config.model.preset} is one for"
            f" images. Nearest: a preset of {' or '.join(families.learning('language'))}."
        )
