"""Named experiments: each states only what differs from the defaults of `config.Config`.

The docstring of each says what it is for, its command, hardware, tokens, time and result.
"""

from collections.abc import Callable

from train.config import Config, Data, Decay, Model, Optimizer, Run


def small() -> Config:
    """AdamHD on the standard library: the first run.

    Command: python -m train small (or no name at all)
    Hardware: 2 CPU cores. Tokens: 1.4M, of a text of 3.0M. Time: about three minutes.
    Result: held-out loss 3.49 nats per token, 1.49 bits per byte (Python 3.11.7, one seed); token
    frequencies alone give 6.47 nats.
    """
    return Config()


def small_adamw() -> Config:
    """AdamW, everything else as in small.

    Command: python -m train small_adamw
    Hardware: 2 CPU cores. Tokens: 1.4M, of a text of 3.0M. Time: about three minutes.
    Result: for a comparison with small over several seeds; one run of each tells nothing.
    """
    return Config(decay=Decay(pull="l2"), run=Run(name="small_adamw"))


def toy() -> Config:
    """A model too small to be of use, to see all parts of the program work.

    Command: python -m train toy
    Hardware: 2 CPU cores. Tokens: 0.2M bytes. Time: half a minute.
    Result: held-out loss 2.52 nats per byte, where byte frequencies alone give 3.33.
    """
    return Config(
        model=Model(preset="toy"),
        data=Data(tokenizer="bytes", length=64, batch_size=16),
        optimizer=Optimizer(learning_rate=1e-2),
        run=Run(name="toy", steps=200, eval_every=20, save_every=50),
    )


def llama_60m() -> Config:
    """AdamHD on a LLaMA of 60M weights, the smallest of the papers, on text of your own.

    Command: python -m train llama_60m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 16 GB or more. Tokens: 1.3G (20 per weight). Time: not measured.
    Result: not measured; of this experiment only the first steps have been run, on a CPU.
    """
    return Config(
        model=Model(preset="60M", dtype="bfloat16"),
        data=Data(tokenizer="bpe-32000", length=512, batch_size=256),
        optimizer=Optimizer(learning_rate=3e-3),
        run=Run(name="llama_60m", steps=10_000, eval_every=500, save_every=500, log_every=10),
    )


def small_alphadecay() -> Config:
    """AlphaDecay, everything else as in small_adamw: the decay of a matrix follows the tail of its spectrum.

    Command: python -m train small_alphadecay
    Hardware: 2 CPU cores. Tokens: 1.4M, of a text of 3.0M. Time: about three minutes.
    Result: for a comparison over several seeds, and for spectrum.png.
    """
    return Config(
        decay=Decay(pull="l2", spectral="alpha", spectral_every=50),
        run=Run(name="small_alphadecay"),
    )


def alphadecay_60m() -> Config:
    """AlphaDecay's AdamW recipe for LLaMA-60M, on text of your own in place of C4.

    Command: python -m train alphadecay_60m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 16 GB or more. Tokens: 1.3G. Time: not measured.
    Result: the authors report a validation perplexity of 31.20 against 31.95 for uniform decay 0.1. Theirs:
        bfloat16 weights
    and moments, documents padded to 256 tokens, an evaluation that divides by one batch too many, a first update at
    rate 0. Ours: float32 weights, packed text. Not run here beyond its first steps.
    """
    return Config(
        model=Model(preset="60M", dtype="bfloat16"),
        data=Data(tokenizer="bpe-32000", length=256, batch_size=512),
        optimizer=Optimizer(learning_rate=1e-3, b2=0.999, clip=None),
        decay=Decay(
            pull="l2",
            spectral="alpha",
            spectral_high=5.0,
            mask=("hidden", "head", "embedding", "vector"),
        ),
        run=Run(name="alphadecay_60m", steps=10_000, eval_every=500, save_every=500, log_every=10),
    )


def conda_60m() -> Config:
    """Conda's recipe for LLaMA-60M, on text of your own in place of C4.

    Command: python -m train conda_60m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 16 GB or more. Tokens: 1.3G. Time: not measured.
    Result: the authors report 2 to 2.5 times the speed of AdamW, whose second moment their bfloat16 state cannot
        decay at
    b2 = 0.999. Ours: float32 state. Not run here beyond its first steps.
    """
    return Config(
        model=Model(preset="60M", dtype="bfloat16"),
        data=Data(tokenizer="bpe-32000", length=256, batch_size=512),
        optimizer=Optimizer(name="conda", learning_rate=1e-2, b2=0.99, clip=None),
        decay=Decay(pull="l2", weight_decay=0.0),
        run=Run(name="conda_60m", steps=10_000, eval_every=500, save_every=500, log_every=10),
    )


def root_1b() -> Config:
    """ROOT with the settings of its authors' demonstration: width 2048, 16 layers, tied head.

    Command: python -m train root_1b --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 8192 per step. Time: not measured.
    Result: the authors report losses below Muon's. Theirs: 128,256 tokens of vocabulary, 32 query and 8 key heads,
        one fused
    projection, 100 steps of warm-up; ours has separate projections and 1000. Not run here beyond its first steps.
    """
    return Config(
        model=Model(
            preset="1B",
            layers=16,
            mlp_width=8192,
            kv_heads=8,
            tied=True,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(tokenizer="bpe-32000", length=512, batch_size=16),
        optimizer=Optimizer(name="root", learning_rate=1e-3, clip=None, final=0.0),
        decay=Decay(pull="l2", mask=("hidden", "head", "embedding", "vector")),
        run=Run(name="root_1b", steps=10_000, eval_every=500, save_every=500, log_every=10),
    )


def sophia_130m() -> Config:
    """Sophia-G with its authors' settings for GPT-2 125M, on a LLaMA of about that size.

    Command: python -m train sophia_130m --data.text 'corpus/**/*.txt'
    Hardware: one GPU or TPU of 80 GB. Tokens: 491,520 per step, 49G. Time: not measured.
    Result: the authors report half of AdamW's steps; others find it at or behind AdamW (see optax_decay/sophia.py).
        Theirs
    decays linear weights only, not the tied head. Not run here beyond its first steps.
    """
    return Config(
        model=Model(preset="130M", dtype="bfloat16"),
        data=Data(tokenizer="bpe-32000", length=1024, batch_size=480),
        optimizer=Optimizer(name="sophia", learning_rate=6e-4, b1=0.965, b2=0.99, final=0.05),
        decay=Decay(pull="l2", weight_decay=0.2, mask=("hidden",)),
        run=Run(
            name="sophia_130m",
            steps=100_000,
            micro_batches=8,
            eval_every=1000,
            save_every=1000,
            log_every=10,
        ),
    )


def exadam_characters() -> Config:
    """EXAdam with its author's settings for a character-level GPT of 14M weights, on a LLaMA of that shape.

    Command: python -m train exadam_characters
    Hardware: one GPU. Tokens: 16,384 bytes per step, 131M. Time: not measured.
    Result: the author reports a best validation loss of 1.492 against 1.494 for AdamW at the same learning rate, at
        which
    EXAdam's steps are 2 to 5 times longer. Theirs: dropout 0.2. Not run here beyond its first steps.
    """
    return Config(
        model=Model(preset="20M", width=384, mlp_width=1024, layers=8, heads=6),
        data=Data(tokenizer="bytes", length=256, batch_size=64),
        optimizer=Optimizer(
            name="exadam", learning_rate=1e-4, b2=0.999, clip=None, schedule="constant"
        ),
        decay=Decay(pull="l2", weight_decay=0.0),
        run=Run(name="exadam_characters", steps=8000, eval_every=500, save_every=500, log_every=10),
    )


EXPERIMENTS: dict[str, Callable[[], Config]] = {
    make.__name__: make
    for make in (
        small,
        small_adamw,
        small_alphadecay,
        toy,
        llama_60m,
        alphadecay_60m,
        conda_60m,
        root_1b,
        sophia_130m,
        exadam_characters,
    )
}
