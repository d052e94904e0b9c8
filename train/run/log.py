"""The log of a run: metrics.jsonl, TensorBoard events, and Weights & Biases.

metrics.jsonl holds one record per line, a JSON object, ordered by step:

    {"kind": "train", "step", "loss", "gradient_norm", "learning_rate", "tokens", "seconds", "skipped"}
    {"kind": "held_out", "step", "loss", "perplexity", "bits_per_byte", "seconds"}   for text; for images, "top1"
        replaces perplexity and bits per byte, and images.average adds "average_loss" and "average_top1"
    {"kind": "weights", "step", ROLE: {...}}                         see observe.py
    {"kind": "spectrum", "step", "score": {MATRIX: number}, "multiplier": {...}}    with decay.spectrum
    {"kind": "gains", "step", "matrix": {MATRIX/LAYER: number}, "sublayer": {...}}   with a width

`step` is the number of completed updates. Losses are in nats per token or image. Models of images count "images"
instead of "tokens". `seconds` is the training time over all starts of the run; it includes compilation, but not
evaluation and saving. `skipped` is the number of steps that skip_on_spike has skipped since the first start. NaN and
infinite numbers are null.

The last entry of every line, "check", is a checksum of the others (records.py). The records of one evaluation are
written together, and "held_out" is the last of them: an evaluation without it is made again.

When a run continues, records after the restored step are removed. Lines that cannot be read are removed, too: an
incomplete last line after a kill, and damaged lines, after a copy of the file has been made.
"""

import collections
import contextlib
import importlib.util
import os
import pathlib
import shlex
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flax import traverse_util

from train.display import Speed, make_display, say
from train.errors import UserError
from train.run.folder import write
from train.run.records import keep_damaged, line, read_records

RETRY_AFTER = (
    0.5,
    1.0,
    2.0,
    4.0,
)  # seconds; a full disk has room again once a failed checkpoint is removed


class Diverged(UserError):
    """Too many consecutive steps were skipped."""


class Recorder:
    """Writes the numbers of each step to the display and to the files of a run.

    It reads the numbers of a step from the device one step late, so that the device never waits.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        start: int,
        steps: int,
        per_step: int,
        every: int = 1,
        sinks: Iterable[Any] = (),
        max_skipped: int = 10,
        unit: str = "tokens",
    ):
        """Opens the log.

        Args:
            path: of metrics.jsonl, which is continued after step `start`. None writes nothing; all processes except
                the first do this, since they must read the same numbers from the device.
            start: step that the run continues from.
            steps: total number of steps.
            per_step: units per step.
            every: steps between two records.
            sinks: further receivers of the numbers; None is ignored.
            max_skipped: number of consecutive skipped steps after which the run stops.
            unit: of the work in a step, "tokens" or "images".
        """
        kept = [] if path is None else read_records(path, start)
        evaluated = {r["step"] for r in kept if r["kind"] == "held_out"}
        if start not in evaluated:  # a kill came between the records of one evaluation
            kept = [r for r in kept if r["step"] < start or r["kind"] == "train"]
        if path is not None:
            keep_damaged(path)
            write(path, "".join(map(line, kept)))
        self._path = path or pathlib.Path(os.devnull)
        self._file = self._path.open("ab", buffering=0)
        self._sinks = [sink for sink in sinks if sink is not None]
        self._start, self._steps, self._every = start, steps, every
        self._per_step, self._unit = per_step, unit
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        self._evaluated = evaluated
        self._last = collections.deque(maxlen=max_skipped)
        self._max_skipped, self._skipped_in_a_row = max_skipped, 0
        self._speed = Speed()
        self._display = make_display(start, steps, unit)
        self._display.held_out = next(
            (r["loss"] for r in reversed(kept) if r["kind"] == "held_out"), None
        )

    def __enter__(self) -> "Recorder":
        self._display.start()
        self._speed.go()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.stop()
        with contextlib.suppress(OSError):  # a full disk has been reported before
            self._file.close()
        for sink in self._sinks:
            sink.close()

    @property
    def seconds_per_step(self) -> float | None:
        return self._speed.seconds_per_step

    @property
    def skipping(self) -> bool:
        """Whether the last step whose numbers are known was skipped."""
        return self._skipped_in_a_row > 0

    def evaluated(self, step: int) -> bool:
        """Whether the weights after `step` have been evaluated."""
        return step in self._evaluated

    def train(self, step: int, scalars: dict[str, Any]) -> None:
        """Receives the numbers of the step that was just started, and reads those of the previous step."""
        before, self._pending = self._pending, (step, scalars)
        if before is not None:
            self._finish(*before)

    def flush(self) -> None:
        """Waits for the last step, and writes its numbers."""
        if self._pending is not None:
            last, self._pending = self._pending, None
            self._finish(*last)

    def evaluation(
        self, step: int, scores: dict[str, float], words: str, more: dict[str, dict[str, Any]]
    ) -> None:
        """Records an evaluation.

        Args:
            step: after which it was made.
            scores: on held-out data.
            words: describe the scores other than the loss.
            more: what was measured beside them, by kind; what is empty is left out.
        """
        held_out = {**scores, "seconds": round(self._seconds, 3)}
        measured = {kind: values for kind, values in more.items() if values}
        self._write(step, {**measured, "held_out": held_out})
        self._display.held_out = scores["loss"]
        self._evaluated.add(step)
        say(f"step {step}: held-out loss {scores['loss']:.4f}, {words}")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside the context from the training time. All records are on the disk before."""
        self.flush()
        with contextlib.suppress(OSError):  # pipes and /dev/null cannot
            os.fsync(self._file.fileno())
        yield
        self._speed.go()

    def _finish(self, step: int, scalars: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        self._seconds += self._speed.tick()
        self._skipped_in_a_row = int(values.pop("skipped_in_a_row", 0))
        self._last.append((step, values))
        if step % self._every == 0 or step == self._steps:
            more = {self._unit: step * self._per_step, "seconds": round(self._seconds, 3)}
            if "skipped" in values:
                more["skipped"] = int(values.pop("skipped"))
            self._write(step, {"train": {**values, **more}})
        self._display.step(step, values["loss"], self._per_step, self._speed.seconds_per_step)
        if self._skipped_in_a_row >= self._max_skipped or (self.skipping and step == self._steps):
            raise Diverged(self._report(step))

    def _report(self, step: int) -> str:
        """Error message for a run with too many consecutive skipped steps."""
        lines = [
            f"  step {n}: loss {v['loss']:.4g}, gradient norm {v['gradient_norm']:.4g},"
            f" learning rate {v['learning_rate']:.3g}"
            for n, v in self._last
        ]
        return (
            f"Training has diverged: the last {self._skipped_in_a_row} steps up to {step} were skipped,"
            " because their loss or gradient norm is NaN, infinite or far too high. The weights have not"
            " changed since, and nothing was saved:\n" + "\n".join(lines) + "\n"
            "Lower --optimizer.learning_rate or lengthen --optimizer.schedule.warmup_steps and start a new run;"
            " or, if the data are the cause, continue with a larger --run.max_skipped."
        )

    def _write(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """Writes records of one step, by kind, at once."""
        lines = [line({"kind": kind, "step": step, **values}) for kind, values in records.items()]
        rest = memoryview("".join(lines).encode())
        for pause in (*RETRY_AFTER, None):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                break
            except OSError as error:
                if pause is None:
                    raise UserError(
                        f"The metrics of step {step} cannot be written: {error.strerror or error}"
                        f" ({self._path}). Everything up to the last checkpoint is safe: make room, and"
                        f" continue with --resume {shlex.quote(str(self._path.parent))}."
                    ) from None
            time.sleep(pause)
        for kind, values in records.items():
            named = {f"{kind}/{name}": value for name, value in numbers(values).items()}
            for sink in self._sinks:
                sink.add(step, named)


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers in a nested record, by "name/name"."""
    flat = traverse_util.flatten_dict(values, sep="/")
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


class TensorBoard:
    """Writes events for TensorBoard, without TensorFlow."""

    def __init__(self, folder: pathlib.Path, start: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            str(folder), purge_step=start + 1 if start else None
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run on Weights & Biases. It keeps its id when our run continues."""

    def __init__(self, project: str, folder: pathlib.Path, config: dict[str, Any]):
        import wandb  # pyrefly: ignore

        path = folder / "wandb_id"
        kept = path.read_text().strip() if path.exists() else None
        self._run = wandb.init(
            project=project, name=folder.name, id=kept, resume="allow", config=config, dir=folder
        )
        path.write_text(self._run.id + "\n")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def tensorboard(wanted: bool, folder: pathlib.Path, start: int) -> TensorBoard | None:
    installed = importlib.util.find_spec("tensorboardX") is not None
    return TensorBoard(folder / "tensorboard", start) if wanted and installed else None


def weights_and_biases(
    project: str | None, folder: pathlib.Path, config: dict[str, Any]
) -> Wandb | None:
    if project is None:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb = {project!r} needs the package wandb: install it into this environment with pip"
            " install wandb, or leave the flag out."
        )
    return Wandb(project, folder, config)
