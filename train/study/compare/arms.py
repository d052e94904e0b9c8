"""The arms of a comparison: every decay and every optimizer as one row of a table.

An arm is a chain that is built from numbers which may be traced: its learning rate and its decay coefficient are
tuned, everything else is as published or as in the row of AdamW. Before every chain stands the same clipping of the
gradient, behind it nothing. λ has AdamW's coupling throughout (the shrink per step is ηλ), but for the p-norm, whose
published step is proximal. Decays act on hidden matrices and the head; where a rule sets the norms of hidden matrices
or pulls them without a coefficient, λ is the decay of the head alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_decay
from train.study.small_runs import WORKER, Optimizer, Setting

MASK = ("hidden", "head")
WORKERS = 4  # of 1-bit Adam; a batch is split over them
B1, B2 = 0.9, 0.95
# Where searches begin. A run of T steps shrinks a weight that gets no gradient by exp(-ηλT/2): 0.8 and 3.2 in the
# exponent at η = 0.008, T = 400. No decay at all is in every grid: it is the only end that λ has.
DECAYS = (0.0, 0.5, 2.0)
RATES = (0.004, 0.008, 0.016)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        title: for tables and pictures.
        build: the chain behind the clipping.
        kind: of the paper's proposal, or of its use here: "decay", "optimizer", "baseline" or "control".
        learning_rates, weight_decays: the grid at the start of tuning: geometric series, that of λ with 0 before
            it; a single decay is not tuned.
        workers: simulated workers with gradients of their own, on a mapped axis called `WORKER`.
        curvature: whether the optimizer needs a sampled-label gradient now and then.
    """

    title: str
    build: Optimizer
    kind: str = "decay"
    learning_rates: tuple[float, ...] = RATES
    weight_decays: tuple[float, ...] = DECAYS
    workers: int = 1
    curvature: bool = False


def uniform(s: Setting) -> optax.GradientTransformation:
    return optax_decay.decay(s.weight_decay, mask=MASK, axes=s.axes)


def after_adam(link: Optimizer) -> Optimizer:
    """A decay between Adam and the learning rate."""
    return directed(lambda s: optax.scale_by_adam(B1, B2), link)


def directed(direction: Optimizer, link: Optimizer = uniform) -> Optimizer:
    """A direction, a decay and the learning rate."""
    return lambda s: optax.chain(direction(s), link(s), optax.scale_by_learning_rate(s.rate))


def muon(s: Setting) -> optax.GradientTransformation:
    """Muon on hidden matrices, Adam elsewhere; its steps have Adam's typical RMS of 0.2."""
    return optax_decay.scale_by_muon(b1=B1, b2=B2, axes=s.axes)


def normuon(s: Setting) -> optax.GradientTransformation:
    return optax_decay.scale_by_normuon(b1=B1, b2=B2, axes=s.axes)


def on_sphere(optimizer: Callable[..., Any]) -> Optimizer:
    """An optimizer of the library that keeps the norms of hidden matrices; λ is that of the head."""
    return lambda s: optimizer(
        s.rate, b1=B1, b2=B2, weight_decay=s.weight_decay, mask="head", axes=s.axes
    )


def radial_brake(s: Setting) -> optax.GradientTransformation:
    return optax.chain(ADAMW(s), optax_decay.radial_brake(axes=s.axes))


def soda(s: Setting) -> optax.GradientTransformation:
    """Hidden matrices are pulled towards their initial values, as strongly as SODA says; λ is that of the head."""
    return optax.chain(
        optax.scale_by_adam(B1, B2),
        optax_decay.decay(s.weight_decay, mask="head", axes=s.axes),
        optax.scale_by_learning_rate(s.rate),
        optax_decay.soda_decay(mask="hidden", axes=s.axes),
    )


def alpha(preserve_mean: bool) -> Any:
    return after_adam(
        lambda s: optax_decay.spectral_alpha_decay(
            s.weight_decay,
            # a twentieth of 400 steps, as in the authors' runs
            refresh=optax_decay.spectra.every(20),
            assignment=optax_decay.spectra.linear(preserve_mean=preserve_mean),
            mask=MASK,
            axes=s.axes,
        )
    )


def quasi_hyperbolic(s: Setting) -> optax.GradientTransformation:
    """Half of Adam's momentum and half of its gradient, over the same denominator: QHAdam with ν₁ = ½, ν₂ = 1.

    EXAdam comes down to it once its debiasing terms have faded.
    """
    adam = optax.scale_by_adam(B1, B2)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        found: tuple[Any, Any] = adam.update(updates, state, params)
        averaged, after = found
        squares = optax.tree.bias_correction(after.nu, B2, after.count)
        mean = jax.tree.map(
            lambda a, g, v: (a + g / (jnp.sqrt(v) + 1e-8)) / 2, averaged, updates, squares
        )
        return mean, after

    return optax.GradientTransformation(adam.init, update)


def p_norm(s: Setting) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(B1, B2),
        optax.scale_by_learning_rate(s.rate),
        optax_decay.lp_proximal_decay(
            s.weight_decay,
            p=0.8,
            learning_rate=s.rate,
            linearize_at="new",
            mask=MASK,
            axes=s.axes,
        ),
    )


def conda(s: Setting) -> optax.GradientTransformation:
    every = jnp.maximum(1, s.steps // 5)  # as 2000 of 10,000 steps in the authors' runs
    return optax_decay.scale_by_conda(B1, 0.99, refresh_every=every, axes=s.axes)


def one_bit_adam(s: Setting) -> optax.GradientTransformation:
    warmup: Any = jnp.maximum(1, s.steps // 5)  # the advice is 15 to 25 % of all steps
    return optax_decay.one_bit_adam(
        s.rate,
        WORKER,
        warmup,
        b1=B1,
        b2=0.999,
        weight_decay=s.weight_decay,
        axes=s.axes,
        bias_correction=True,
    )


def exadam(log_growth: bool) -> Any:
    return directed(lambda s: optax_decay.scale_by_exadam(B1, B2, log_growth=log_growth))


def shorter(b1: float) -> Any:
    """AdamW whose momentum forgets sooner."""
    return directed(lambda s: optax.scale_by_adam(b1, B2))


def given(link: Callable[..., Any], **options: Any) -> Any:
    """A decay of the library with nothing but its coefficient tuned."""
    return after_adam(lambda s: link(s.weight_decay, mask=MASK, axes=s.axes, **options))


ADAMW = after_adam(uniform)
ARMS = {
    "adamw": Arm("AdamW", ADAMW, "control"),
    "again": Arm("AdamW again (A/A)", ADAMW, "control"),  # at the point of "adamw"
    "muon": Arm("Muon", directed(muon), "control"),
    "none": Arm("no decay", ADAMW, weight_decays=(0.0,)),
    "huber": Arm("Huber (AdamHD)", given(optax_decay.huber_decay)),
    "alphadecay_matched": Arm("AlphaDecay, same mean", alpha(True)),
    "alphadecay": Arm("AlphaDecay", alpha(False)),
    "awd": Arm("AWD", given(optax_decay.awd_decay), weight_decays=(0.0, 8.0, 32.0)),
    "adadecay": Arm("AdaDecay", given(optax_decay.adadecay)),
    "p_norm": Arm("p-norm, p = 0.8", p_norm, weight_decays=(0.0, 0.004, 0.016)),
    "cautious": Arm("cautious", given(optax_decay.cautious_decay)),
    "width_scaled": Arm(
        "width-scaled",
        after_adam(
            lambda s: optax_decay.width_scaling(
                s.weight_decay, s.width // 2, mask=MASK, axes=s.axes
            )
        ),
    ),
    # Published learning rates are ten times AdamW's, and a quarter of that is the step.
    "conda": Arm("Conda", directed(conda), "optimizer", learning_rates=(0.008, 0.016, 0.032)),
    "root": Arm("ROOT", directed(lambda s: optax_decay.scale_by_root(axes=s.axes)), "optimizer"),
    # Most coordinates move by η itself, where Adam's RMS is about 0.2.
    "sophia": Arm(
        "Sophia-G",
        directed(lambda s: optax_decay.scale_by_sophia(0.965, 0.99)),
        "optimizer",
        learning_rates=(0.001, 0.002, 0.004),
        curvature=True,
    ),
    # Steps are 2 to 5 times Adam's, and in the first version another 2.6 times at step 100.
    "exadam": Arm("EXAdam v2", exadam(False), "optimizer", learning_rates=(0.002, 0.004, 0.008)),
    "exadam_v1": Arm("EXAdam v1", exadam(True), "optimizer", learning_rates=(0.001, 0.002, 0.004)),
    "one_bit_adam": Arm("1-bit Adam", one_bit_adam, "optimizer", workers=WORKERS),
    # Adam's own ways of weighing the latest gradient more, which EXAdam has to be distinguished from.
    "adamw_b1_08": Arm("AdamW, β₁ = 0.8", shorter(0.8), "baseline"),
    "adamw_b1_05": Arm("AdamW, β₁ = 0.5", shorter(0.5), "baseline"),
    "nadamw": Arm(
        "NAdamW", directed(lambda s: optax.scale_by_adam(B1, B2, nesterov=True)), "baseline"
    ),
    "qhadamw": Arm("QHAdamW, ν₁ = ½", directed(quasi_hyperbolic), "baseline"),
    "normuon": Arm("NorMuon", directed(normuon), "optimizer"),
    # The learning rate is the angle per step: published ones of spheres are 0.0025 to 0.02.
    "adam_hyperball": Arm("AdamH", on_sphere(optax_decay.adam_hyperball), "optimizer"),
    "muon_hyperball": Arm("MuonH", on_sphere(optax_decay.muon_hyperball), "optimizer"),
    "radial_brake": Arm("radial brake", radial_brake),
    "toward_initial": Arm("towards the initial weights", given(optax_decay.toward_initial_decay)),
    "soda": Arm("SODA", soda),
}
CONTROLS = ("adamw", "again", "muon")
