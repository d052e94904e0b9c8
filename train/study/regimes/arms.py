"""The arms of the regimes: every decay of the library on Adam, some of them on Muon, and optimizers with L2 decay.

An arm is a chain built from numbers that may be traced, as in train/study/compare/arms.py. Learning rate and decay
coefficient λ are tuned; everything else is as published, or as in the row of AdamW. Decays act on hidden matrices and
the head. Searches begin at the grid of an arm: its λ are larger where the pull is smaller.

The column λ holds another number for four arms: ω of `log_time`; for CPR, the initial size R of a matrix over its
bound κ; for hyperball and SODA, the λ of the head, since hidden matrices have a fixed norm or pull.
"""

import dataclasses
from typing import Any

import optax

import optax_decay
from train.study.compare import arms as one_pass
from train.study.compare.arms import B1, B2, MASK, Arm, directed, muon
from train.study.small_runs import Optimizer, Setting

STEP = 10**0.5  # between two decays of a grid
RATES = (0.004, 0.008, 0.016)
LARGER = (0.008, 0.016, 0.032)  # of Muon, and of rules that set the length of a step
LATE = 20  # spectra of AlphaDecay are measured so many times in a run


def decays(middle: float) -> tuple[float, ...]:
    """Three coefficients of a grid."""
    return tuple(float(f"{x:.3g}") for x in (middle / STEP, middle, middle * STEP))


def link(make: Any, **options: Any) -> Optimizer:
    """A decay of the library, with nothing but its coefficient tuned."""
    return lambda s: make(s.weight_decay, mask=MASK, axes=s.axes, **options)


def scheduled(schedule: Any) -> Optimizer:
    """L2 decay whose coefficient is a schedule made from λ and the steps of the run."""
    return lambda s: optax_decay.decay(schedule(s.weight_decay, s.steps), mask=MASK, axes=s.axes)


def log_time(s: Setting) -> optax.GradientTransformation:
    return optax_decay.decay(
        optax_decay.schedules.log_time(s.steps, s.weight_decay),
        coupling=optax_decay.couplings.schedule(s.peak),
        mask=MASK,
        axes=s.axes,
    )


def alpha(preserve_mean: bool) -> Optimizer:
    return lambda s: optax_decay.spectral_alpha_decay(
        s.weight_decay,
        refresh=optax_decay.spectra.every(max(1, s.steps // LATE)),
        assignment=optax_decay.spectra.linear(preserve_mean=preserve_mean),
        # The default leaves out matrices with fewer than 50 eigenvalues, which here are all.
        select=optax_decay.spectra.hidden_matrices(min_eigenvalues=16),
        mask=MASK,
        axes=s.axes,
    )


def corrected(s: Setting) -> optax.GradientTransformation:
    return optax_decay.corrected_decay(
        s.weight_decay,
        learning_rate=s.rate,
        peak_learning_rate=s.peak,
        mask=MASK,
        axes=s.axes,
    )


def width_scaled(s: Setting) -> optax.GradientTransformation:
    return optax_decay.width_scaling(s.weight_decay, s.width // 2, mask=MASK, axes=s.axes)


def last(direction: Optimizer, make: Any) -> Optimizer:
    """A direction, the learning rate, and a link on the finished step."""
    return lambda s: optax.chain(direction(s), optax.scale_by_learning_rate(s.rate), make(s))


def proximal(make: Any, **options: Any) -> Any:
    return lambda s: make(s.weight_decay, learning_rate=s.rate, mask=MASK, axes=s.axes, **options)


def cpr(s: Setting) -> optax.GradientTransformation:
    bound = optax_decay.bounds.dependent(1 / s.weight_decay)
    return optax_decay.cpr_decay(bound, learning_rate=s.rate, mask=MASK, axes=s.axes)


def braked(direction: Optimizer) -> Optimizer:
    """L2 decay, and half of every growth of the norm of a hidden matrix."""
    return lambda s: optax.chain(directed(direction)(s), optax_decay.radial_brake(axes=s.axes))


def relative(direction: Optimizer) -> Optimizer:
    """L2 decay, and steps of hidden matrices as long as their weights times the learning rate."""
    return directed(lambda s: optax.chain(direction(s), optax_decay.relative_update(axes=s.axes)))


def adam(s: Setting) -> optax.GradientTransformation:
    return optax.scale_by_adam(B1, B2)


# Name: title, the link between the direction and the learning rate, and the middle λ of the first grid.
LINKS: dict[str, tuple[str, Optimizer, float]] = {
    "l2": ("L2", one_pass.uniform, 1.0),
    "huber": ("Huber, δ = 1.5 mean", link(optax_decay.huber_decay), 2.0),
    "huber_tight": (
        "Huber, δ = 0.5 mean",
        link(optax_decay.huber_decay, threshold=optax_decay.thresholds.mean_size(0.5)),
        5.0,
    ),
    "alphadecay_matched": ("AlphaDecay, same mean", alpha(True), 1.0),
    "alphadecay": ("AlphaDecay", alpha(False), 0.4),
    "awd": ("AWD", link(optax_decay.awd_decay), 15.0),
    "adadecay": ("AdaDecay", link(optax_decay.adadecay), 2.0),
    "elastic_net": (
        "elastic net, ρ = 0.05",
        link(optax_decay.elastic_net_decay, l1_ratio=0.05),
        0.7,
    ),
    "cautious": ("cautious", link(optax_decay.cautious_decay), 2.0),
    "corrected": ("corrected (AdamC)", corrected, 1.5),
    "target_norm": ("target norm (AdamWN)", link(optax_decay.target_norm_decay), 1.0),
    "stable": ("stable (AdamS)", link(optax_decay.stable_decay, b2=B2), 0.003),
    "toward_initial": ("towards the start (L2-SP)", link(optax_decay.toward_initial_decay), 1.0),
    "width_scaled": ("width-scaled", width_scaled, 1.0),
    "to_zero": ("λ to zero", scheduled(optax_decay.schedules.to_zero), 1.5),
    "log_time": ("λ as 1/time", log_time, 4.0),
    "hold_drop_ramp": (
        "λ held, dropped, raised",
        scheduled(optax_decay.schedules.hold_drop_ramp),
        2.0,
    ),
}
TUNINGS = 5  # searches for the point of L2 decay that a comparison may make at most


def tuned_again(arm: str, k: int) -> str:
    """Name of an arm whose point comes from its k-th search."""
    return arm if k == 1 else f"{arm}_tuned_{k}"


ON_MUON = (
    "l2",
    "huber",
    "huber_tight",
    "alphadecay_matched",
    "alphadecay",
    "awd",
    "adadecay",
    "elastic_net",
    "cautious",
    "corrected",
    "target_norm",
    "stable",
    "hold_drop_ramp",
)


def _on_adam() -> dict[str, Arm]:
    arms = {
        "none": Arm("no decay", directed(adam), weight_decays=(0.0,)),
        "again": Arm("L2 again (A/A)", directed(adam), "control", RATES, decays(1.0)),
    }
    for name, (title, make, middle) in LINKS.items():
        arms[name] = Arm(title, directed(adam, make), "decay", RATES, decays(middle))
    arms |= {
        "p_norm": Arm(
            "p-norm, p = 0.8",
            last(adam, proximal(optax_decay.lp_proximal_decay, p=0.8, linearize_at="new")),
            "decay",
            RATES,
            decays(0.01),
        ),
        "cpr": Arm("CPR", last(adam, cpr), "decay", RATES, decays(2.0)),
        "rotational": Arm(
            "rotational",
            lambda s: optax_decay.rotational_adamw(
                s.rate, B1, B2, weight_decay=s.weight_decay, axes=s.axes
            ),
            "decay",
            RATES,
            decays(1.0),
        ),
        "hyperball": Arm(
            "hyperball",
            lambda s: optax_decay.adam_hyperball(
                s.rate, B1, B2, weight_decay=s.weight_decay, axes=s.axes
            ),
            "decay",
            LARGER,
            decays(1.0),
        ),
        "soda": Arm("SODA", one_pass.soda, "decay", RATES, decays(1.0)),
        "radial_brake": Arm("L2 and radial brake", braked(adam), "decay", RATES, decays(0.7)),
        "relative_update": Arm(
            "L2 and relative update",
            relative(adam),
            "decay",
            LARGER,
            decays(1.0),
        ),
    }
    return arms


def _on_muon() -> dict[str, Arm]:
    arms = {"muon_none": Arm("Muon, no decay", directed(muon), "muon", LARGER, (0.0,))}
    for name in ON_MUON:
        title, make, middle = LINKS[name]
        build = directed(muon, make)
        arms[f"muon_{name}"] = Arm(f"Muon, {title}", build, "muon", LARGER, decays(middle))
    arms["muon_cpr"] = Arm("Muon, CPR", last(muon, cpr), "muon", LARGER, decays(2.0))
    arms["muon_radial_brake"] = Arm(
        "Muon, L2 and radial brake", braked(muon), "muon", LARGER, decays(0.7)
    )
    arms["muon_hyperball"] = Arm(
        "Muon, hyperball",
        lambda s: optax_decay.muon_hyperball(s.rate, weight_decay=s.weight_decay, axes=s.axes),
        "muon",
        LARGER,
        decays(1.0),
    )
    return arms


def _optimizers() -> dict[str, Arm]:
    build = directed(one_pass.normuon)
    arms = {"normuon": Arm("NorMuon, L2", build, "optimizer", LARGER, decays(1.0))}
    for name in ("nadamw", "conda", "root", "sophia", "exadam", "one_bit_adam"):
        row = one_pass.ARMS[name]
        # The same shrink ηλ per step as for AdamW.
        middle = 1.0 * RATES[1] / row.learning_rates[1]
        arms[name] = Arm(
            f"{row.title}, L2",
            row.build,
            "optimizer",
            row.learning_rates,
            decays(middle),
            row.workers,
            row.curvature,
        )
    return arms


def _tuned_again(arms: dict[str, Arm]) -> dict[str, Arm]:
    """L2 decay under the names of its further searches."""
    return {
        tuned_again(name, k): dataclasses.replace(
            arms[name], title=f"{arms[name].title}, tuned again ({k})", kind="control"
        )
        for name in ("l2", "muon_l2")
        for k in range(2, TUNINGS + 1)
    }


ARMS = _on_adam() | _on_muon() | _optimizers()
ARMS |= _tuned_again(ARMS)
DECAYS = tuple(name for name, arm in ARMS.items() if arm.kind == "decay")
