"""Recipes with fixed norms, Muon and scheduled decay, as their authors set them, and what differs here.

`--data.text` names the text, as for the recipes of recipes.py. One learning rate is the peak of all parameters; where
authors set one per kind of parameter, the docstring says which it is and what the others become. None of these has been
run here beyond its first steps, at toy width, but `small_muonh`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from train.config.decays.l2 import L2
from train.config.fields import Config, Data, Model, Optimizer, Run
from train.config.optimizers.muon import Muon
from train.config.optimizers.muon_hyperball import MuonHyperball
from train.config.optimizers.normuon import Normuon
from train.config.parts.decay_schedules import ToZero
from train.config.parts.orthogonal import Orthogonal
from train.config.parts.schedules import Cosine, Linear, Trapezoid
from train.config.parts.shape_scales import LargerSide
from train.config.parts.sphere import Sphere
from train.config.parts.strength import Strength


class HeroNumbers(NamedTuple):
    """What the rule of Marin's hero run gives for a run.

    Attributes:
        learning_rate: η of Adam.
        angle: of a step on the sphere, over η.
        b2: of Adam.
    """

    learning_rate: float
    angle: float
    b2: float


def hero_numbers(tokens: float, tokens_per_step: int, width: int) -> HeroNumbers:
    """The compute-scaled rule of marin's experiments/grug/moe_hero_ep/heuristic.py.

    η = 0.06602 · tokens^-0.395 · width^-0.150 · sqrt(tokens per step), and 13/3 of it on the sphere, each at most 0.05;
    b2 = 0.999^(tokens per step / 131072), from 0.95 to 0.9999.

    Args:
        tokens: of the whole run.
        tokens_per_step: of one batch.
        width: of the residual stream [features].
    """
    rate = 0.06602 * tokens**-0.395 * width**-0.150 * math.sqrt(tokens_per_step)
    rate = min(0.05, rate)
    on_sphere = min(0.05, 13 / 3 * rate)
    b2 = max(0.95, min(0.9999, 0.999 ** (tokens_per_step / 131_072)))
    return HeroNumbers(rate, on_sphere / rate, b2)


def small_muonh() -> Config:
    """MuonH, everything else as in small_adamw: hidden matrices keep their norms, and nothing else decays.

    Command: python -m train small_muonh
    Hardware: 2 CPU cores. Tokens: 1.4M, of a text of 3.0M. Time: about three minutes.
    Result: held-out loss 3.32 nats per token, 1.42 bits per byte (Python 3.11.7, one seed); one
        run tells nothing.
    """
    return Config(
        optimizer=Optimizer(
            MuonHyperball(sphere=Sphere(angle=13 / 3)),
            schedule=Linear(final=0.05),
        ),
        decay=L2(strength=Strength(weight_decay=0.0)),
        run=Run(name="small_muonh"),
    )


def hyperball_130m() -> Config:
    """Marin's hero run (MuonH for matrices, AdamH for the head, Adam for the rest) at the size of LLaMA-130M.

    Command: python -m train hyperball_130m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 40 GB. Tokens: 131,072 per step, 2.6G. Time: not measured.
    Result: the authors publish none at this size. Theirs (marin, experiments/grug/moe_hero_ep): a mixture of experts
        of 546G weights; one sphere for all experts of a layer; epsilon 9.7e-18 times the root of the number of steps.
        The same here: learning rates and b2 by their rule, angle 13/3 of Adam's rate, b1 0.9062, a line to 5 %, 1 %
        of warm-up, no decay, no clipping, initial deviation 0.5/sqrt(width). Not run here beyond its first steps.
    """
    steps, length, batch, width = 20_000, 512, 256, 768
    numbers = hero_numbers(steps * length * batch, length * batch, width)
    return Config(
        model=Model(preset="130M", dtype="bfloat16", init_std=0.018),
        data=Data(tokenizer="bpe-32000", length=length, batch_size=batch),
        optimizer=Optimizer(
            MuonHyperball(
                orthogonal=Orthogonal(
                    b1=0.9062, b2=numbers.b2, eps=1e-15, newton="dion", iteration="bfloat16"
                ),
                sphere=Sphere(sphere=("hidden", "head"), angle=numbers.angle),
            ),
            learning_rate=numbers.learning_rate,
            clip=None,
            schedule=Linear(steps, warmup_steps=steps // 100, final=0.05),
        ),
        decay=L2(strength=Strength(weight_decay=0.0)),
        run=Run("hyperball_130m", steps=steps, eval_every=500, save_every=500, log_every=10),
    )


def muon_moonlight() -> Config:
    """Muon with Moonshot's scale (arXiv 2502.16982), as in the example of Moonlight's repository.

    Command: python -m train muon_moonlight --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 40 GB. Tokens: 8192 per step. Time: not measured.
    Result: the authors report about half of AdamW's compute at equal loss, for other models. The same here: learning
        rate 0.001 and decay 0.1 for all parameters, steps of RMS 0.2, momentum 0.95 with Nesterov's term, five
        iterations in bfloat16, 100 steps of warm-up, cosine to zero, no clipping, a tied head, which is Adam's. Theirs:
        a vocabulary of 151,936, one pass through openwebtext-100k. Not run here beyond its first steps.
    """
    return Config(
        model=Model(
            preset="llama",
            width=1024,
            mlp_width=4864,
            layers=12,
            heads=16,
            tied=True,
            rope_base=1e6,
            dtype="bfloat16",
        ),
        data=Data(tokenizer="bpe-32000", length=512, batch_size=16),
        optimizer=Optimizer(
            Muon(orthogonal=Orthogonal(iteration="bfloat16")),
            learning_rate=1e-3,
            clip=None,
            schedule=Cosine(10_000, warmup_steps=100, final=0.0),
        ),
        decay=L2(strength=Strength(mask=("hidden", "head", "embedding", "vector"))),
        run=Run("muon_moonlight", steps=10_000, eval_every=500, save_every=500, log_every=10),
    )


def nanochat_d12() -> Config:
    """nanochat's optimizer at depth 12: NorMuon, and a cautious decay that falls to zero over the run.

    Command: python -m train nanochat_d12 --data.text 'corpus/**/*.txt'
    Hardware: one GPU of 80 GB, or eight. Tokens: 524,288 per step, 1.3G. Time: not measured.
    Result: the authors publish bits per byte of another model and text. The same here (nanochat, base_train.py): five
        iterations of Polar Express in bfloat16, output_memory 0.9, b1 0.8, 40 steps of warm-up, the peak, and a fall
        to 5 % in the last 65 % of the run; decay 0.28 at their matrices' rate of 0.02, gated, times half a cosine to
        zero, of hidden matrices alone; no clipping. Theirs: rates of 0.02 for matrices times the root of outputs over
        inputs, of 0.3 for the embedding and 0.008 for the head; here 0.008 for all, with steps of matrices that are as
        long as theirs where the matrix is square. Their momentum climbs to 0.97 and falls to 0.9; theirs is another
        network. Not run here beyond its first steps.
    """
    rate, theirs = 0.008, 0.02
    return Config(
        model=Model(
            preset="llama", width=768, mlp_width=2048, layers=12, heads=6, dtype="bfloat16"
        ),
        data=Data(tokenizer="bpe-32768", length=2048, batch_size=256),
        optimizer=Optimizer(
            Normuon(
                orthogonal=Orthogonal(
                    b1=0.8, eps=1e-10, newton="polar_express", iteration="bfloat16"
                ),
                shape_scale=LargerSide(factor=theirs / rate / math.sqrt(768)),
                output_memory=0.9,
            ),
            learning_rate=rate,
            clip=None,
            schedule=Trapezoid(2520, warmup_steps=40, fall=0.65, final=0.05),
        ),
        decay=L2(
            form="cautious",
            strength=Strength(0.28 * theirs / rate, mask=("hidden",), schedule=ToZero()),
        ),
        run=Run(
            "nanochat_d12",
            steps=2520,
            micro_batches=16,
            eval_every=250,
            save_every=250,
            log_every=10,
        ),
    )


NORM_RECIPES: tuple[Callable[[], Config], ...] = (
    small_muonh,
    hyperball_130m,
    muon_moonlight,
    nanochat_d12,
)
