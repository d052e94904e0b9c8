"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, W&B.

Records of metrics.jsonl, one JSON object per line, in the order of their steps:

    {"kind": "train", "step", "loss", "gradient_norm", "learning_rate", "tokens", "seconds",
     "skipped"}
    {"kind": "held_out", "step", "loss", "perplexity", "bits_per_byte", "seconds"}   of a text; of images with
        "top1" for the last two, and with images.average "average_loss", "average_top1"
    {"kind": "weights", "step", ROLE: {...}}                         see observe.py
    {"kind": "spectrum", "step", "metric": {MATRIX: number}, "multiplier": {...}}    with decay.spectrum
    {"kind": "gains", "step", "matrix": {MATRIX/LAYER: number}, "sublayer": {...}}   with a width

`step` counts finished updates; losses are nats per token or image; "images" stand in place of "tokens"
where a model learns from them; seconds are of training alone (compiling
included, evaluation and saving not), over all parts of the run. When a run goes on, records after
the restored step are dropped, and so are lines that cannot be read: the last, torn by a kill, or, with
a copy of the file kept, damaged ones. `skipped` counts the
steps that were left out (skip_on_spike) since the start; what is not a number is null.
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from train import disk
from train.config.fields import UserError
from train.display import Speed, make_display, say
from train.run.folder import write

PATIENCE = (0.5, 1.0, 2.0, 4.0)  # seconds: a checkpoint that did not fit is about to be removed


class Diverged(UserError):
    """Too many steps in a row were left out."""


def read(path: pathlib.Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The records up to `last_step`, without lines that are none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [r for r in map(_record, lines) if r is not None and r["step"] <= last_step]


def _record(line: bytes) -> dict[str, Any] | None:
    """None: not a record."""
    try:
        record = json.loads(line)
        numbers = [record["step"], record.get("seconds", 0.0)]
        good = isinstance(record["kind"], str) and all(type(x) in (int, float) for x in numbers)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if good else None


def keep_damaged(path: pathlib.Path) -> None:
    """Puts a copy of a file of records aside if some lines are none, but for a last one that a kill has torn."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines()
    if lines and not content.endswith(b"\n"):
        lines.pop()
    bad = [number for number, line in enumerate(lines, 1) if _record(line) is None]
    if bad:
        copy = disk.aside(path)
        copy.write_bytes(content)
        say(
            f"{path}: {len(bad)} of {len(lines)} lines cannot be read, line {bad[0]} the first; they are left out,"
            f" and the file as it was is kept as {copy.name}."
        )


class Recorder:
    """Takes the numbers of each step to the display and to the files of a run.

    Numbers of a step are read from the device one step late, so that the device never waits.
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
        """Continues the file at `path` after step `start`; `sinks` get the numbers as well, or are None.

        Without a path nothing is written: in all processes but one, which must read the same numbers all the same.
        """
        kept = [] if path is None else read(path, start)
        if path is not None:
            keep_damaged(path)
            write(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path or pathlib.Path(os.devnull)
        self._file = self._path.open("ab", buffering=0)
        self._sinks = [sink for sink in sinks if sink is not None]
        self._start, self._steps, self._every = start, steps, every
        self._per_step, self._unit = per_step, unit
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        self._evaluated = {r["step"] for r in kept if r["kind"] == "held_out"}
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
        with contextlib.suppress(OSError):  # of a full disk, which has been told
            self._file.close()
        for sink in self._sinks:
            sink.close()

    @property
    def seconds_per_step(self) -> float | None:
        return self._speed.seconds_per_step

    @property
    def skipping(self) -> bool:
        """Whether the last step whose numbers are known was left out."""
        return self._skipped_in_a_row > 0

    def evaluated(self, step: int) -> bool:
        """Whether the weights after `step` have been evaluated."""
        return step in self._evaluated

    def train(self, step: int, noted: dict[str, Any]) -> None:
        """Takes the numbers of the step that was just started, and reads those of the one before."""
        before, self._pending = self._pending, (step, noted)
        if before is not None:
            self._finish(*before)

    def flush(self) -> None:
        """Waits for the last step, and for its numbers to be in the file."""
        if self._pending is not None:
            last, self._pending = self._pending, None
            self._finish(*last)

    def held_out(self, step: int, scores: dict[str, float], words: str) -> None:
        """Takes the scores of an evaluation; `words` say those besides the loss."""
        self._write("held_out", step, {**scores, "seconds": round(self._seconds, 3)})
        self._display.held_out = scores["loss"]
        self._evaluated.add(step)
        say(f"step {step}: held-out loss {scores['loss']:.4f}, {words}")

    def weights(self, step: int, seen: dict[str, Any]) -> None:
        self._write("weights", step, seen)

    def spectrum(self, step: int, seen: dict[str, Any]) -> None:
        if seen:
            self._write("spectrum", step, seen)

    def gains(self, step: int, seen: dict[str, Any]) -> None:
        if seen:
            self._write("gains", step, seen)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here is not training time."""
        self.flush()
        yield
        self._speed.go()

    def _finish(self, step: int, noted: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in noted.items()}
        self._seconds += self._speed.tick()
        self._skipped_in_a_row = int(values.pop("skipped_in_a_row", 0))
        self._last.append((step, values))
        if step % self._every == 0 or step == self._steps:
            more = {self._unit: step * self._per_step, "seconds": round(self._seconds, 3)}
            if "skipped" in values:
                more["skipped"] = int(values.pop("skipped"))
            self._write("train", step, {**values, **more})
        self._display.step(step, values["loss"], self._per_step, self._speed.seconds_per_step)
        if self._skipped_in_a_row >= self._max_skipped or (self.skipping and step == self._steps):
            raise Diverged(self._report(step))

    def _report(self, step: int) -> str:
        """What there is to know about a run whose steps are left out one after the other."""
        lines = [
            f"  step {n}: loss {v['loss']:.4g}, gradient norm {v['gradient_norm']:.4g},"
            f" learning rate {v['learning_rate']:.3g}"
            for n, v in self._last
        ]
        return (
            f"Training has diverged: the last {self._skipped_in_a_row} steps up to {step} were left out,"
            " because their numbers are NaN, infinite or far too high. Weights are as they were"
            f" before, and nothing was saved since:\n" + "\n".join(lines) + "\n"
            "Lower --optimizer.learning_rate or lengthen --optimizer.schedule.warmup_steps and start a new run;"
            " or, if the data are to blame, go on with a larger --run.max_skipped."
        )

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps(finite({"kind": kind, "step": step, **values}), allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        for pause in (*PATIENCE, None):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                break
            except OSError as error:
                if pause is None:
                    raise UserError(
                        f"The metrics of step {step} cannot be written: {error.strerror or error}"
                        f" ({self._path}). Everything up to the last checkpoint is safe: make room,"
                        f" and go on with --resume {self._path.parent}."
                    ) from None
            time.sleep(pause)
        for sink in self._sinks:
            sink.add(step, {f"{kind}/{name}": value for name, value in numbers(values).items()})


def finite(values: Any) -> Any:
    """With None for what is not a number, which JSON cannot hold."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A nested record as "name/name" to number."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


class TensorBoard:
    """Events for TensorBoard, written without TensorFlow."""

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
    """A run on Weights & Biases, which goes on under the same id when ours does."""

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
            f"run.wandb = {project!r} needs the package wandb: pip install wandb into the environment"
            " that runs this, or leave the flag out."
        )
    return Wandb(project, folder, config)
