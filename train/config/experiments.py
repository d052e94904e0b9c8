"""Named experiments: each states only what differs from the defaults of `config.Config`.

The docstring of each says what it is for, its command, hardware, tokens, time and result. The
recipes of the papers are in recipes.py and norm_recipes.py.
"""

from collections.abc import Callable

from train.config import norm_recipes, recipes
from train.config.decays.l2 import L2
from train.config.fields import Config, Data, Model, Optimizer, Run
from train.config.parts.spectrum import Spectrum
from train.config.parts.strength import Strength


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
    return Config(decay=L2(), run=Run(name="small_adamw"))


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
        decay=L2(strength=Strength(spectrum=Spectrum(refresh_every=50))),
        run=Run(name="small_alphadecay"),
    )


EXPERIMENTS: dict[str, Callable[[], Config]] = {
    make.__name__: make
    for make in (
        small,
        small_adamw,
        small_alphadecay,
        toy,
        llama_60m,
        *recipes.RECIPES,
        *norm_recipes.NORM_RECIPES,
    )
}
