"""What a run learns: to go on with a text, or to say what an image shows.

Both are instances of one interface, `Task`, which is all that `main.py` knows of them; a family of models
learns one of the two (`families.TASKS`). The mathematics is in `step.py` and in `image_task.py`.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
import optax

from train.config.fields import Config, UserError
from train.data import batches as data_lib
from train.data import images
from train.display import say
from train.run import figures
from train.step import families, image_task
from train.step import update as step


class Task(Protocol):
    """Built of a resolved config and its data; batches are arrays, or dicts of them, with a row per example."""

    noun: ClassVar[str]  # of what is learned from
    unit: ClassVar[str]  # what a step is measured in
    words: ClassVar[figures.Labels]

    @property
    def data(self) -> Any:
        """With `digest`, `shape` of a batch, `batch`, `held_out` and `summary`, as `data.Data` has them."""
        ...

    @staticmethod
    def read(config: Config) -> Any:
        """The data of a resolved config."""
        ...

    @property
    def outputs(self) -> int:
        """Scores that a model gives: of tokens, or of classes."""
        ...

    @property
    def per_step(self) -> int:
        """Units in a step."""
        ...

    def init(self, weights: Callable[[jax.Array], Any], tx: Any, key: jax.Array, /) -> step.State:
        """The state before the first step."""
        ...

    def compile_update(
        self, forward: Any, tx: Any, rate: Any, micro_batches: int, shardings: Any, each: bool, /
    ) -> Any:
        """The jitted step, as `step.compile_update`."""
        ...

    def gradient(self, forward: Any, micro_batches: int, params: Any, batch: Any, /) -> Any:
        """Of the mean loss of a batch."""
        ...

    def sums(self, forward: Any, state: step.State, batch: Any) -> tuple[jax.Array, ...]:
        """Of a held-out batch, what adds up over batches to what `scores` takes. Pure; to be jitted."""
        ...

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        """Record of an evaluation; its "loss" is in nats."""
        ...

    def say_scores(self, scores: dict[str, float]) -> str: ...

    def introduction(self, facts: dict[str, Any]) -> str:
        """One line about the data, of their `summary`."""
        ...

    def baseline(self, facts: dict[str, Any]) -> float:
        """Loss of a model that looks at nothing, in nats."""
        ...


@dataclasses.dataclass(frozen=True)
class Language:
    """The next token of a text, from those before it."""

    config: Config
    data: data_lib.TokenBatches

    noun: ClassVar[str] = "text"
    unit: ClassVar[str] = "tokens"
    words: ClassVar[figures.Labels] = figures.Labels(
        "nats per token", "held-out text", "token frequencies alone"
    )

    @staticmethod
    def read(config: Config) -> data_lib.TokenBatches:
        wanted = config.data
        encoded = wanted.text.startswith(data_lib.STORE)
        say(f"reading {wanted.text}{'' if encoded else f' as {wanted.tokenizer} tokens'} ...")
        try:
            return data_lib.load_text(
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

    @property
    def outputs(self) -> int:
        return self.data.vocab_size

    @property
    def per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.length

    init = staticmethod(step.init)
    compile_update = staticmethod(step.compile_update)
    gradient = staticmethod(step.gradient)

    def sums(self, forward: Any, state: step.State, batch: jax.Array) -> tuple[jax.Array, ...]:
        return step.summed(forward, state["params"], batch)

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        total, count = sums.tolist()
        loss = total / max(count, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self.data.bytes_per_token,
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
class Images:
    """The class of an image; what else the state holds and what is drawn at random is `image_task.Task`'s."""

    config: Config
    data: images.ImageBatches

    noun: ClassVar[str] = "images"
    unit: ClassVar[str] = "images"
    words: ClassVar[figures.Labels] = figures.Labels(
        "nats per image", "held-out images", "all classes alike"
    )

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
            size=config.model.image_size or 1,
            batch_size=config.data.batch_size,
            seed=config.run.seed,
            recipe=recipe,
            split=wanted.split,
            held_out=wanted.held_out,
            data_dir=wanted.folder,
        )

    @property
    def outputs(self) -> int:
        return self.data.classes

    @property
    def per_step(self) -> int:
        return self.config.data.batch_size

    def task(self, forward: Any) -> image_task.Task:
        wanted = self.config.images
        return image_task.Task(forward, self.outputs, wanted.smoothing, wanted.average)

    def init(self, weights: Callable[[jax.Array], Any], tx: Any, key: jax.Array) -> step.State:
        return image_task.init(self.task(None), weights, tx, key)

    def compile_update(
        self,
        forward: Any,
        tx: optax.GradientTransformationExtraArgs,
        rate: optax.Schedule,
        micro_batches: int,
        shardings: step.State,
        each: bool,
    ) -> Any:
        update = functools.partial(image_task.update, self.task(forward), tx, rate, micro_batches)
        return step.compiled(update, shardings, each)

    def gradient(self, forward: Any, micro_batches: int, params: Any, batch: Any) -> Any:
        task = self.task(forward)
        return image_task.loss_and_gradient(task, params, batch, micro_batches)[1]

    def sums(self, forward: Any, state: step.State, batch: Any) -> tuple[jax.Array, ...]:
        return image_task.sums(self.task(forward), state, batch)

    def scores(self, sums: np.ndarray) -> dict[str, float]:
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


TASKS: dict[str, type[Language] | type[Images]] = {"language": Language, "images": Images}


def of(config: Config) -> type[Language] | type[Images]:
    """What a config's model learns."""
    return TASKS[families.task(config.model.preset)]


def only_language(config: Config, command: str) -> None:
    """Raises UserError for a model that a command has no use for."""
    if families.task(config.model.preset) != "language":
        raise UserError(
            f"{command} is for language models; model.preset = {config.model.preset} is one for"
            f" images. Nearest: a preset of {' or '.join(families.learning('language'))}."
        )
