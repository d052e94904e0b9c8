"""Do activations keep their size when the model gets wider? A check of initial weights, forward
multipliers and learning rates together, after a few steps of training.

    python -m train coordinate_check [--family gpt] [--widths 32 64 128 256] [--steps 5] ...

Under μP no activation grows or shrinks with the width, neither at the start nor after training;
with one learning rate for everything, activations grow, and the more steps the more. Sizes are root
mean squares over tokens and features, on the same text:

    embedding    the input of the first layer
    attention    added to the residual stream by attention, mean over layers
    mlp          added to it by the MLP, mean over layers
    residual     the residual stream after the last layer
    logits       the input of the loss
    Δ NAME       change of that since the start of training

Logits are ∝ 1/sqrt(width) at the start (the read-out is multiplied by 1/width); their change is not.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from models import gpt, llama
from train.display import say
from train.run import figures
from train.study.population import Member, population
from train.study.small_runs import SmallTask
from train.study.width.runs import check_widths, program, proxy

ENDLESS = 10**9  # steps, of which the first few have one learning rate
TITLES = {"standard": "one learning rate for all", "mup": "μP"}
NAMES = ("embedding", "attention", "mlp", "residual", "logits")


@dataclasses.dataclass(frozen=True)
class Options:
    """A coordinate check."""

    family: Literal["llama", "gpt"] = "llama"
    """File of models/ that the models come from."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Widths of the models [features]; the first is the proxy's."""
    steps: int = 5
    """Updates."""
    learning_rate: float = 0.01
    """Of the proxy."""
    seeds: int = 3
    """Runs per width; sizes are geometric means over them."""
    folder: str = "runs/coordinate_check"
    """Where the picture goes."""


def activations(config: Any, params: Any, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """The activations of `NAMES` of a LLaMA or a GPT, with a leading axis for layers where there are several."""
    rotated = isinstance(config, llama.Config)
    kind: Any = llama.Llama if rotated else gpt.GPT
    graph = nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))[0]
    network: Any = nnx.merge(graph, params)
    T = tokens_BT.shape[1]
    x_BTD = network.embed.embedding[...][tokens_BT]
    x_BTD = x_BTD if rotated else x_BTD + network.position.embedding[...][:T]
    x_BTD = x_BTD.astype(config.dtype)
    where = (llama.rotary_angles(T, config.head_width, config.rope_base),) if rotated else ()
    embedding_BTD = x_BTD

    def layer(x_BTD: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        attention_BTD = block.attention(block.attention_norm(x_BTD), *where)
        x_BTD += attention_BTD
        mlp_BTD = block.mlp(block.mlp_norm(x_BTD))
        return x_BTD + mlp_BTD, (attention_BTD, mlp_BTD)

    x_BTD, (attention_LBTD, mlp_LBTD) = jax.lax.scan(layer, x_BTD, network.blocks)
    logits_BTV = (llama if rotated else gpt).forward(config, params, tokens_BT)
    return dict(zip(NAMES, (embedding_BTD, attention_LBTD, mlp_LBTD, x_BTD, logits_BTV)))


def sizes_by_width(
    task: SmallTask,
    parametrisation: str,
    widths: Sequence[int],
    batches: Sequence[np.ndarray],
    vocab_size: int,
    *,
    learning_rate: float,
    seeds: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Sizes of activations at several widths, before and after every update.

    Args:
        task: of the proxy.
        parametrisation: "standard" or "mup".
        widths: of the models.
        batches: tokens [B, T + 1] of each update; sizes are taken on the first.
        vocab_size: of the tokens.
        learning_rate: of the proxy, constant.
        seeds: of the initial weights; one run each.

    Returns:
        One record per width, seed, step and name: {"width", "seed", "step", "name", "rms"}.
    """
    # A constant learning rate; one step per call, so that runs of all lengths share a program.
    task = dataclasses.replace(task, warmup=1 / ENDLESS, chunk=1)
    same: Any = SameBatches(np.stack(batches))
    records = []
    for width in widths:
        small = program(task, ENDLESS, parametrisation, width, vocab_size)

        def look(state: Any, model: Any = small.model) -> dict[str, jax.Array]:
            return activations(model, state["params"], jnp.asarray(batches[0][:, :-1]))

        members = [Member(learning_rate, 0.0, seed) for seed in seeds]
        seen: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        for steps in range(len(batches) + 1):
            for found in population(small, members, same, steps, look=look):
                seen[found.member.seed, steps] = found.seen
        for (seed, steps), now in sorted(seen.items()):
            at = {"width": width, "seed": seed, "step": steps}
            for name in NAMES:
                records.append({**at, "name": name, "rms": _rms(now[name])})
                change = _rms(now[name] - seen[seed, 0][name])
                records.append({**at, "name": f"Δ {name}", "rms": change})
    return records


@dataclasses.dataclass(frozen=True)
class SameBatches:
    """Batches that are the same for every seed, in place of a text."""

    tokens: np.ndarray  # int32 [steps, B, T + 1]
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of one batch."""
        _, rows, length = self.tokens.shape
        return rows, length

    def batches(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def held_out(self, batches: int) -> list[np.ndarray]:
        return [self.tokens[0]]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x.astype(np.float32)))))


def slopes(records: Sequence[dict[str, Any]], at: int) -> dict[str, float]:
    """Exponents b of RMS ∝ width^b after `at` updates, by name; nan where nothing has changed yet."""
    found = {}
    for name in dict.fromkeys(record["name"] for record in records):
        chosen = [r for r in records if r["name"] == name and r["step"] == at]
        sizes = np.array([r["rms"] for r in chosen])
        widths = np.array([r["width"] for r in chosen])
        usable = len(set(widths.tolist())) > 1 and bool(np.all(sizes > 0))
        found[name] = (
            float(np.polyfit(np.log(widths), np.log(sizes), 1)[0]) if usable else float("nan")
        )
    return found


def draw(found: dict[str, list[dict[str, Any]]], at: int, path: pathlib.Path) -> pathlib.Path:
    """Sizes against width: a column per parametrisation; above after `at` updates, below the change."""
    plt = figures.pyplot()
    colors = dict(zip(NAMES, ("#a0a0a0", "#10305a", "#b4521e", "#3c8c84", "#7a3b8f")))
    marks = dict(zip(NAMES, "os^Dv"))
    with plt.rc_context(figures.RC_PARAMS):
        picture, panels = plt.subplots(
            2,
            len(found),
            sharex=True,
            sharey="row",
            squeeze=False,
            figsize=(8, 7.2),
            layout="constrained",
        )
        for column, (title, records) in enumerate(found.items()):
            powers = slopes(records, at)
            for name in NAMES:
                for row, label in enumerate((name, f"Δ {name}")):
                    chosen = [r for r in records if r["name"] == label and r["step"] == at]
                    widths = sorted({r["width"] for r in chosen})
                    sizes = [
                        np.exp(np.mean([np.log(r["rms"]) for r in chosen if r["width"] == w]))
                        for w in widths
                    ]
                    panels[row, column].loglog(
                        *(widths, sizes),
                        color=colors[name],
                        marker=marks[name],
                        label=f"{label}: width^{powers[label]:.2f}",
                    )
            panels[0, column].set_title(TITLES.get(title, title))
            for row in range(2):
                panels[row, column].legend(
                    fontsize=6.5,
                    loc="upper center",
                    bbox_to_anchor=(0.5, -0.06 - 0.14 * row),
                    ncols=2,
                )
            panels[1, column].set_xlabel("width [features]")
            widths = sorted({r["width"] for r in records})
            panels[1, column].set_xticks(widths, labels=map(str, widths), minor=False)
            panels[1, column].minorticks_off()
        panels[0, 0].set_ylabel("RMS of activations")
        panels[1, 0].set_ylabel("RMS of their change")
        words = f"after {at} updates; where hyperparameters transfer, no line rises with the width"
        figures.heading(picture, "Sizes of activations by width", words)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path)
        plt.close(picture)
    return path


def main(arguments: list[str]) -> int:
    """`python -m train coordinate_check`: prints the exponents and draws coordinate_check.png."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="python -m train coordinate_check",
        description=__doc__,
        use_underscores=True,
    )
    task = proxy(options.widths[0], family=options.family)
    check_widths(task, options.widths)
    data = task.read_text("stdlib")
    batches = [data.batch(i) for i in range(options.steps)]
    found: dict[str, list[dict[str, Any]]] = {}
    for parametrisation in ("standard", "mup"):
        found[parametrisation] = sizes_by_width(
            *(task, parametrisation, options.widths, batches, data.vocab_size),
            learning_rate=options.learning_rate,
            seeds=range(options.seeds),
        )
        powers = slopes(found[parametrisation], options.steps)
        say(f"\n{parametrisation}: RMS ∝ width^b after {options.steps} updates")
        for name, power in powers.items():
            say(f"  {name:12s} b = {power:+.2f}")
    path = draw(found, options.steps, pathlib.Path(options.folder) / "coordinate_check.png")
    say(f"\npicture   {path}")
    return 0
