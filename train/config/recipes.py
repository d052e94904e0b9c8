"""The papers' recipes as experiments: what their authors set, with what cannot be had here said in each.

Common to all LLaMAs (AlphaDecay, arXiv 2506.14562; Conda, arXiv 2509.24218): C4, every document cut or
filled to 256 tokens, 512 of them a step, a tenth of the steps to warm up, cosine to a tenth. Theirs:
bfloat16 weights and moments, with b2 = 0.999 a second moment that cannot decay (their AdamW baselines),
a first update at rate 0, AlphaDecay's evaluation divided by one batch too many. Ours: float32 weights and
moments, bfloat16 activations, 2000 steps of warm-up at most, the plain mean.

Common to all GPT-2s (nanoGPT's settings): OpenWebText, 480 sequences of 1024 tokens a step, 100,000 steps,
warm-up 2000, cosine, gradients clipped to norm 1. Ours: a vocabulary of GPT-2's size learned from the
text, unless --data.tokenizer names the folder with GPT-2's own.

`--data.text` names the text, which no experiment can bring along: files, or store:FOLDER as
`python -m train tokenise` makes it. C4's recipes need T5's tokenizer for the papers' perplexities:
--data.tokenizer FOLDER. None of these has been run here beyond its first steps, at toy width.
"""

from collections.abc import Callable

from train.config.decays.huber import Huber
from train.config.decays.l2 import L2
from train.config.fields import Config, Data, Images, Model, Optimizer, Run
from train.config.optimizers.adam import Adam
from train.config.optimizers.conda import Conda
from train.config.optimizers.exadam import Exadam
from train.config.optimizers.root import Root
from train.config.optimizers.sophia import Sophia
from train.config.parts.schedules import Constant, Cosine
from train.config.parts.spectrum import Spectrum
from train.config.parts.strength import Role, Strength

ALL: tuple[Role, ...] = ("hidden", "head", "embedding", "vector")


def _run(name: str, steps: int, micro_batches: int = 1) -> Run:
    every = 500 if steps < 50_000 else 1000
    return Run(
        name=name,
        steps=steps,
        micro_batches=micro_batches,
        eval_every=every,
        save_every=every,
        log_every=10,
    )


def _c4(name: str, preset: str, steps: int, micro_batches: int = 1, **rest) -> Config:
    """LLaMA on documents of 256 tokens."""
    return Config(
        model=Model(preset=preset, dtype="bfloat16"),
        data=Data(tokenizer="bpe-32000", length=256, batch_size=512, documents=True),
        run=_run(name, steps, micro_batches),
        **rest,
    )


def _openwebtext(name: str, preset: str, micro_batches: int, bias: bool = True, **rest) -> Config:
    """GPT-2 on sequences of 1024 tokens."""
    return Config(
        model=Model(preset=preset, dtype="bfloat16", bias=bias),
        data=Data(tokenizer="bpe-50257", length=1024, batch_size=480),
        run=_run(name, 100_000, micro_batches),
        **rest,
    )


def _alphadecay(name: str, preset: str, steps: int, micro_batches: int, high: float) -> Config:
    return _c4(
        name,
        preset,
        steps,
        micro_batches,
        optimizer=Optimizer(Adam(b2=0.999), learning_rate=1e-3, clip=None),
        decay=L2(strength=Strength(mask=ALL, spectrum=Spectrum(high=high))),
    )


def _conda(name: str, preset: str, steps: int, micro_batches: int) -> Config:
    return _c4(
        name,
        preset,
        steps,
        micro_batches,
        optimizer=Optimizer(Conda(b2=0.99), learning_rate=1e-2, clip=None),
        decay=L2(strength=Strength(weight_decay=0.0)),
    )


def _sophia(name: str, preset: str, micro_batches: int, rate: float, gamma: float) -> Config:
    return _openwebtext(
        name,
        preset,
        micro_batches,
        optimizer=Optimizer(
            Sophia(b1=0.965, b2=0.99, gamma=gamma), learning_rate=rate, schedule=Cosine(final=0.05)
        ),
        decay=L2(strength=Strength(weight_decay=0.2, mask=("hidden",))),
    )


def alphadecay_60m() -> Config:
    """AlphaDecay on LLaMA-60M with AdamW.

    Command: python -m train alphadecay_60m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 16 GB or more. Tokens: 1.3G. Time: not measured.
    Result: the authors report a validation perplexity of 31.20 against 31.95 for a uniform decay of 0.1.
        Not run here beyond its first steps.
    """
    return _alphadecay("alphadecay_60m", "60M", 10_000, 1, 5.0)


def alphadecay_130m() -> Config:
    """AlphaDecay on LLaMA-130M with AdamW.

    Command: python -m train alphadecay_130m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 40 GB. Tokens: 2.6G. Time: not measured.
    Result: the authors report a validation perplexity of 22.66 against 23.32 for a uniform decay of 0.1.
        Not run here beyond its first steps.
    """
    return _alphadecay("alphadecay_130m", "130M", 20_000, 2, 5.0)


def alphadecay_350m() -> Config:
    """AlphaDecay on LLaMA-350M.

    Command: python -m train alphadecay_350m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 7.9G. Time: not measured.
    Result: the authors report a validation perplexity of 16.66 against 16.74 for uniform decay, both
        with Adam and a coupled decay of 5e-6, and no settings beyond that. Ours: AdamW as at 130M with
        the smaller of their two ranges of multipliers, and Conda's number of steps. Not run here beyond
        its first steps.
    """
    return _alphadecay("alphadecay_350m", "350M", 60_000, 4, 3.0)


def alphadecay_1b() -> Config:
    """AlphaDecay on LLaMA-1B.

    Command: python -m train alphadecay_1b --data.text 'corpus/**/*.txt'
    Hardware: eight GPUs or TPUs of 80 GB. Tokens: 13G. Time: not measured.
    Result: the authors report a validation perplexity of 14.55 against 14.66 for uniform decay, both
        with Adam and a coupled decay of 5e-6, and no settings beyond that. Ours: AdamW as at 130M with
        the smaller of their two ranges of multipliers, and Conda's number of steps. Not run here beyond
        its first steps.
    """
    return _alphadecay("alphadecay_1b", "1B", 100_000, 8, 3.0)


def conda_60m() -> Config:
    """Conda on LLaMA-60M.

    Command: python -m train conda_60m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 16 GB or more. Tokens: 1.3G. Time: not measured.
    Result: the authors report 2 to 2.5 times the speed of AdamW, in steps and in time, over sizes from
        60M to 1B; their AdamW has b2 = 0.999 in bfloat16, no decay and no clipping. Not run here beyond
        its first steps.
    """
    return _conda("conda_60m", "60M", 10_000, 1)


def conda_130m() -> Config:
    """Conda on LLaMA-130M.

    Command: python -m train conda_130m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 40 GB. Tokens: 2.6G. Time: not measured.
    Result: the authors report 2 to 2.5 times the speed of AdamW, in steps and in time, over sizes from
        60M to 1B; their AdamW has b2 = 0.999 in bfloat16, no decay and no clipping. Not run here beyond
        its first steps.
    """
    return _conda("conda_130m", "130M", 20_000, 2)


def conda_350m() -> Config:
    """Conda on LLaMA-350M.

    Command: python -m train conda_350m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 7.9G. Time: not measured.
    Result: the authors report 2 to 2.5 times the speed of AdamW, in steps and in time, over sizes from
        60M to 1B; their AdamW has b2 = 0.999 in bfloat16, no decay and no clipping. Not run here beyond
        its first steps.
    """
    return _conda("conda_350m", "350M", 60_000, 4)


def conda_1b() -> Config:
    """Conda on LLaMA-1B.

    Command: python -m train conda_1b --data.text 'corpus/**/*.txt'
    Hardware: eight GPUs or TPUs of 80 GB. Tokens: 13G. Time: not measured.
    Result: the authors report 2 to 2.5 times the speed of AdamW, in steps and in time, over sizes from
        60M to 1B; their AdamW has a decay of 0.1 and clipping at 1, which Conda has not. Not run here
        beyond its first steps.
    """
    return _conda("conda_1b", "1B", 100_000, 8)


def conda_gpt2_124m() -> Config:
    """Conda on GPT-2 124M without biases.

    Command: python -m train conda_gpt2_124m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: no figure of the authors' is at hand; their AdamW has rate 6e-4, b2 = 0.95 and a decay of
        0.1. Theirs: queries, keys and values are one matrix with one basis; ours are three. Not run here
        beyond its first steps.
    """
    return _openwebtext(
        "conda_gpt2_124m",
        "gpt2-124M",
        8,
        bias=False,
        optimizer=Optimizer(Conda(b2=0.99), learning_rate=6e-3, schedule=Cosine(final=0.005)),
        decay=L2(strength=Strength(weight_decay=0.01)),
    )


def conda_gpt2_355m() -> Config:
    """Conda on GPT-2 355M without biases.

    Command: python -m train conda_gpt2_355m --data.text 'corpus/**/*.txt'
    Hardware: four GPUs or TPUs of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: as conda_gpt2_124m; their AdamW has rate 3e-4 and eps 1e-6. The settings they published name
        an optimizer that their trainer does not have. Not run here beyond its first steps.
    """
    return _openwebtext(
        "conda_gpt2_355m",
        "gpt2-355M",
        16,
        bias=False,
        optimizer=Optimizer(Conda(b2=0.99), learning_rate=3e-3, schedule=Cosine(final=0.02)),
        decay=L2(strength=Strength(weight_decay=0.01)),
    )


def adamhd_gpt2_124m() -> Config:
    """AdamHD (arXiv 2511.14721) on GPT-2 124M.

    Command: python -m train adamhd_gpt2_124m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: the authors report 10 to 15 % less time than AdamW and up to 4 points of perplexity. Their
        sizes, thresholds and text are not published; ours: nanoGPT's settings for AdamW with the decay
        alone replaced, threshold 1.5 times a matrix's mean. Not run here beyond its first steps.
    """
    return _openwebtext(
        "adamhd_gpt2_124m", "gpt2-124M", 8, optimizer=Optimizer(learning_rate=6e-4), decay=Huber()
    )


def sophia_gpt2_124m() -> Config:
    """Sophia-G (arXiv 2305.14342) on GPT-2 124M.

    Command: python -m train sophia_gpt2_124m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: the authors report half of AdamW's steps; others find it at or behind AdamW (see
        optax_decay/optimizers/sophia.py). Not run here beyond its first steps.
    """
    return _sophia("sophia_gpt2_124m", "gpt2-124M", 8, 6e-4, 0.05)


def sophia_gpt2_355m() -> Config:
    """Sophia-G (arXiv 2305.14342) on GPT-2 355M.

    Command: python -m train sophia_gpt2_355m --data.text 'corpus/**/*.txt'
    Hardware: four GPUs or TPUs of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: the authors report half of AdamW's steps; others find it at or behind AdamW (see
        optax_decay/optimizers/sophia.py). Not run here beyond its first steps.
    """
    return _sophia("sophia_gpt2_355m", "gpt2-355M", 16, 7e-4, 0.08)


def sophia_gpt2_774m() -> Config:
    """Sophia-G (arXiv 2305.14342) on GPT-2 774M.

    Command: python -m train sophia_gpt2_774m --data.text 'corpus/**/*.txt'
    Hardware: eight GPUs or TPUs of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: the authors report half of AdamW's steps; others find it at or behind AdamW (see
        optax_decay/optimizers/sophia.py). Not run here beyond its first steps.
    """
    return _sophia("sophia_gpt2_774m", "gpt2-774M", 32, 3e-4, 0.05)


def root_1b() -> Config:
    """ROOT with the settings of its authors' demonstration: width 2048, 16 layers, tied head.

    Command: python -m train root_1b --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 8192 per step. Time: not measured.
    Result: the authors report losses below Muon's. Theirs: 128,256 tokens of vocabulary, one fused
        projection, 100 steps of warm-up, one pass through openwebtext-100k; ours has separate
        projections and 1000. Not run here beyond its first steps.
    """
    return Config(
        model=Model(preset="root-1B", dtype="bfloat16", remat="dots"),
        data=Data(tokenizer="bpe-32000", length=512, batch_size=16),
        optimizer=Optimizer(Root(), learning_rate=1e-3, clip=None, schedule=Cosine(final=0.0)),
        decay=L2(strength=Strength(mask=ALL)),
        run=_run("root_1b", 10_000),
    )


def exadam_characters() -> Config:
    """EXAdam with its author's settings for a character-level GPT of 14M weights, on the standard library.

    Command: python -m train exadam_characters
    Hardware: one GPU. Tokens: 16,384 bytes per step, 131M. Time: not measured.
    Result: the author reports a best validation loss of 1.492 against 1.494 for AdamW at the same learning rate,
        at which EXAdam's steps are 2 to 5 times longer. Theirs: dropout 0.2, characters of another text. Not run
        here beyond its first steps.
    """
    return Config(
        model=Model(preset="gpt", width=384, mlp_width=1536, layers=8, heads=6, positions=256),
        data=Data(tokenizer="bytes", length=256, batch_size=64),
        optimizer=Optimizer(Exadam(b2=0.999), learning_rate=1e-4, clip=None, schedule=Constant()),
        decay=L2(strength=Strength(weight_decay=0.0)),
        run=_run("exadam_characters", 8000),
    )


def vit_tiny() -> Config:
    """AlphaDecay's recipe for a DeiT-tiny on ImageNet-1K: Adam, DeiT's augmentations, the mean of the weights.

    Command: python -m train vit_tiny --images.folder FOLDER
    where FOLDER holds imagenet2012 as tfds prepares it, in array_record; without it, the program says how to make it.
    Hardware: one or two GPUs (the authors: two, 192 images each). Tokens: none; 154M images of 224 x 224 pixels, 120
    epochs. Time: not measured.
    Result: the authors report a top-1 of 67.40 % against 66.97 % for uniform decay 5e-6, and 67.73 % against 66.41 %
        for 1e-6.
    Theirs: the decay is added to the gradient; here 0.05 stands behind Adam instead, as in the middle one of their
    AdamW recipes for LLaMA. Queries, keys and values are one matrix of theirs, measured as one; its spectra are all
    measured in the first step of an epoch, here one matrix after the other. Views and erased rectangles differ in
    detail (train/data/augment.py). Not run here beyond its first steps, and those at toy width.
    """
    epoch = 3336  # steps
    return Config(
        model=Model(preset="deit-tiny"),
        data=Data(batch_size=384),
        images=Images(average=0.9999),
        optimizer=Optimizer(
            Adam(b2=0.999),
            learning_rate=4e-3,
            clip=None,
            schedule=Cosine(steps=120 * epoch, warmup_steps=20 * epoch, final=1e-6),
        ),
        decay=L2(strength=Strength(0.05, mask=ALL, spectrum=Spectrum(refresh_every=epoch))),
        run=Run(
            name="vit_tiny",
            steps=120 * epoch,
            eval_every=epoch,
            eval_batches=131,
            save_every=epoch,
            log_every=10,
        ),
    )


RECIPES: tuple[Callable[[], Config], ...] = (
    alphadecay_60m,
    alphadecay_130m,
    alphadecay_350m,
    alphadecay_1b,
    conda_60m,
    conda_130m,
    conda_350m,
    conda_1b,
    conda_gpt2_124m,
    conda_gpt2_355m,
    adamhd_gpt2_124m,
    sophia_gpt2_124m,
    sophia_gpt2_355m,
    sophia_gpt2_774m,
    root_1b,
    exadam_characters,
    vit_tiny,
)
