"""How learning rate and decay change with width: the laws, as numbers.

With d the width of a model, d₀ that of its proxy, m = d/d₀ per matrix (fan-in over the proxy's fan-in), η the learning
rate and λ the decay coefficient of the proxy, a law is two exponents, r and s, for matrices that grow on both sides::

    η_i = η · m^-r        λ_i = λ · m^s        shrink per step = η_i λ_i = η λ · m^(s-r)

Vector-like parameters (embeddings, norms, biases and, by default, the output head) keep η; their λ is 0, except under
the rule ``mup_package``, which leaves it alone.

*The general law.* Let the largest singular value of a matrix settle at ``sqrt(η/λ) · d^a``. It is the same at every
width when η/λ ∝ d^(-2a), that is s = 2a - r. With Adam and r = 1: independent noise has a = ½, so constant λ; a = ¾ is
the square-root rule; low-rank, coherent updates have a = 1, so λ ∝ d. `decay_exponent` is this law.

========= ======== ============== ===========================================================================
optimizer r        a              why
========= ======== ============== ===========================================================================
adam      1        ¾              entries of size one: a coherent update has spectral norm d. a between ½
                                  (noise) and 1 (coherent), measured by Fan et al.
lion      1        ¾              entries ±1, as adam
conda     ½        ½              a coherent gradient of rank one gives one row of size-one entries in the
                                  rotated frame, noise gives entries of size one: spectral norm sqrt(d) in both
root      ½        ½              orthogonal factor times 0.2·sqrt(max(rows, cols)): spectral norm sqrt(d)
muon      0        0              orthogonal factor: spectral norm one, from noise as from signal
========= ======== ============== ===========================================================================

The row of adam is μP's r with the a of arXiv 2510.15262; the other rows are derived here from the spectral norm of one
update and of a sum of independent updates, and are not from a paper. Sophia, EXAdam and 1-bit Adam take steps with
entries of size one: use ``adam``.

=========== ========= =======================================================================================
rule        s         reference
=========== ========= =======================================================================================
fan2025     2a - r    Fan et al., arXiv 2510.15262: √m for adam; σ_max is the same at every width
mup_package r         microsoft/mup `MuAdamW`: λ·m beside η/m, so ηλ is constant; also "independent decay
                      unchanged", Kosson et al., arXiv 2510.19093
constant    0         hand-written μP, or the package's ``decoupled_wd=True``
qiu2025     r - 1     Qiu et al., arXiv 2512.05620: independent decay ∝ 1/width (their tokens grow with size)
timescale   r         ηλ from a number of steps: `timescale_weight_decay`; arXiv 2405.13698, 2505.13738
=========== ========= =======================================================================================
"""

import difflib
from typing import Any, NamedTuple

from optax_decay.parameters.arguments import check


class Growth(NamedTuple):
    """How an optimizer's steps, and the weights that they build, grow with the width d.

    Attributes:
        rate: r, so that η ∝ d^-r keeps the effect of a step; the exponent of the spectral norm of one update.
        spectral: a, with the largest singular value ∝ sqrt(η/λ) · d^a at the steady state.
    """

    rate: float
    spectral: float


OPTIMIZERS: dict[str, Growth] = {
    "adam": Growth(1.0, 0.75),
    "lion": Growth(1.0, 0.75),
    "conda": Growth(0.5, 0.5),
    "root": Growth(0.5, 0.5),
    "muon": Growth(0.0, 0.0),
}

RULES = ("fan2025", "mup_package", "constant", "qiu2025", "timescale")


class WidthLaw(NamedTuple):
    """Exponents of the width factor m.

    Attributes:
        rate: r, learning rate ∝ m^-r.
        decay: s, decay coefficient ∝ m^s.
        vectors: multiplier of λ for vector-like parameters.
        spectral: a, the largest singular value ∝ sqrt(η/λ) · m^a; only predictions use it.
    """

    rate: float
    decay: float
    vectors: float
    spectral: float


def unknown(name: str, value: Any, allowed: Any) -> ValueError:
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.0)[0]
    return ValueError(
        f"{name}={value!r} is not known; allowed: {', '.join(allowed)} (did you mean {near!r}?)."
    )


def decay_exponent(spectral_exponent: float, rate_exponent: float = 1.0) -> float:
    """s = 2a - r: with λ ∝ m^s the largest singular values stay the same at every width.

    Args:
        spectral_exponent: a, with σ_max ∝ sqrt(η/λ) · d^a at a fixed η and λ.
        rate_exponent: r, with η ∝ m^-r.

    >>> decay_exponent(0.5), decay_exponent(0.75), decay_exponent(1.0)
    (0.0, 0.5, 1.0)
    """
    return 2 * spectral_exponent - rate_exponent


def width_law(
    rule: str | WidthLaw = "fan2025",
    *,
    exponent: float | None = None,
    optimizer: str | Growth = "adam",
) -> WidthLaw:
    """The exponents of a rule for an optimizer.

    Args:
        rule: one of `RULES`, or a law, which is returned with only its `exponent` changed.
        exponent: s, in place of the rule's.
        optimizer: one of `OPTIMIZERS`, or a `Growth`.

    Raises:
        ValueError: an unknown name, or an exponent that is not finite.

    >>> width_law("fan2025").decay, width_law("qiu2025", optimizer="muon").decay
    (0.5, -1.0)
    """
    if exponent is not None:
        check("exponent", exponent, open_low=True, open_high=True)
    if isinstance(rule, WidthLaw):
        return rule if exponent is None else rule._replace(decay=exponent)
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    growth = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    r, a = growth
    s = {
        "fan2025": decay_exponent(a, r),
        "mup_package": r,
        "constant": 0.0,
        "qiu2025": r - 1,
        "timescale": r,
    }[rule]
    return WidthLaw(r, s if exponent is None else exponent, float(rule == "mup_package"), a)


def timescale_weight_decay(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
) -> float:
    """λ such that a weight forgets over a number of steps: 1/(ηλ) = steps. For the rule ``timescale``.

    Args:
        learning_rate: η, the peak, of the proxy (the rule keeps ηλ at other widths).
        steps: the time scale; or `epochs` with `steps_per_epoch`.

    Raises:
        ValueError: none or both of the two ways, or a number that is not positive.

    >>> timescale_weight_decay(3e-3, steps=10_000 / 3)
    0.1
    """
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"give steps={steps!r} or epochs={epochs!r} with steps_per_epoch, not both."
        )
    if steps is None:
        if steps_per_epoch is None:
            raise ValueError(f"epochs={epochs!r} needs steps_per_epoch=... as well.")
        steps = epochs * steps_per_epoch  # pyrefly: ignore
    check("learning_rate", learning_rate, 0.0, open_low=True)
    check("steps", steps, 0.0, open_low=True)
    return 1 / (learning_rate * steps)
