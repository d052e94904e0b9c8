"""How learning rate and decay change with width: the laws, as values that carry their numbers.

With d the width of a model, d₀ that of its proxy, m = d/d₀ per matrix (fan-in over the proxy's fan-in), η the learning
rate and λ the decay coefficient of the proxy, a law has two exponents, r and s, for matrices that grow on both sides::

    η_i = η · m^-r        λ_i = λ · m^s        shrink per step = η_i λ_i = η λ · m^(s-r)

Embeddings, norms, biases and, by default, the output head are *vector-like*: they keep η, and their λ is 0, except
under the rule ``mup_package``, which keeps their λ too.

*The general law.* Let the largest singular value of a matrix settle at ``sqrt(η/λ) · d^a``. It is the same at every
width when η/λ ∝ d^(-2a), that is when s = 2a - r. With Adam and r = 1, independent noise has a = ½, so λ is constant;
a = ¾ is the square-root rule; low-rank, coherent updates have a = 1, so λ ∝ d. `decay_exponent` computes s.

========= ======== ============== ===========================================================================
optimizer r        a              reason
========= ======== ============== ===========================================================================
adam      1        ¾              entries of size one: a coherent update has spectral norm d. a lies between ½
                                  (noise) and 1 (coherent); Fan et al. measured ¾
lion      1        ¾              entries ±1, as adam
conda     ½        ½              a coherent gradient of rank one gives one row of size-one entries in the
                                  rotated frame, noise gives entries of size one: spectral norm sqrt(d) in both
root      ½        ½              orthogonal factor times 0.2·sqrt(max(rows, cols)): spectral norm sqrt(d)
muon      0        0              orthogonal factor: spectral norm one, from noise as from signal
========= ======== ============== ===========================================================================

The row of adam combines μP's r with the a of arXiv 2510.15262. The other rows are derived here from the spectral norm
of one update and of a sum of independent updates; they are not from a paper. Sophia, EXAdam and 1-bit Adam take steps
with entries of size one: use ``adam`` for them.

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

from typing import Any, NamedTuple

from optax_decay.parameters.arguments import check, one_of


class Growth(NamedTuple):
    """How the steps of an optimizer, and the weights that they build, grow with the width d.

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


HEADS = ("vector", "matrix")


class Exponents(NamedTuple):
    """The exponents of the width factor m for one kind of matrix; dimensionless.

    Attributes:
        rate: r, learning rate ∝ m^-r.
        decay: s, decay coefficient ∝ m^s.
        spectral: a, the largest singular value ∝ sqrt(η/λ) · m^a; only predictions use it.
    """

    rate: Any
    decay: Any
    spectral: Any


class WidthLaw(NamedTuple):
    """How learning rate and decay of every parameter follow the width. Build one with `law`.

    Attributes:
        hidden: the exponents of hidden matrices.
        head: the exponents of the output head; None where the head is vector-like.
        vectors: multiplier of λ for vector-like parameters, >= 0.
    """

    hidden: Exponents
    head: Exponents | None = None
    vectors: Any = 0.0


def decay_exponent(spectral_exponent: float, rate_exponent: float = 1.0) -> float:
    """The decay exponent s = 2a - r. With λ ∝ m^s the largest singular values are the same at every width.

    Args:
        spectral_exponent: a, with σ_max ∝ sqrt(η/λ) · d^a at a fixed η and λ.
        rate_exponent: r, with η ∝ m^-r.

    >>> decay_exponent(0.5), decay_exponent(0.75), decay_exponent(1.0)
    (0.0, 0.5, 1.0)
    """
    return 2 * spectral_exponent - rate_exponent


def law(
    rule: str = "fan2025",
    *,
    optimizer: str | Growth = "adam",
    head: str = "vector",
    exponent: float | None = None,
) -> WidthLaw:
    """The law that a rule gives for an optimizer. Every function about width takes this value.

    Args:
        rule: one of `RULES`.
        optimizer: the optimizer whose updates are scaled, one of `OPTIMIZERS` or a `Growth`.
        head: ``"vector"``: the output head is vector-like, and the model multiplies its output by 1/m; ``"matrix"``:
            the head follows the law of ``"adam"``, because matrix optimizers leave it to Adam.
        exponent: s, in place of the exponent of the rule; may be traced.

    Raises:
        ValueError: an unknown name, or an exponent that is not finite.

    >>> law("fan2025").hidden.decay, law("qiu2025", optimizer="muon").hidden.decay
    (0.5, -1.0)
    """
    one_of("rule", rule, RULES)
    one_of("head", head, HEADS)
    if exponent is not None:
        check("exponent", exponent, open_low=True, open_high=True)
    if not isinstance(optimizer, Growth):
        one_of("optimizer", optimizer, OPTIMIZERS)
        optimizer = OPTIMIZERS[optimizer]
    return WidthLaw(
        hidden=_exponents(rule, optimizer, exponent),
        head=_exponents(rule, OPTIMIZERS["adam"], exponent) if head == "matrix" else None,
        vectors=float(rule == "mup_package"),
    )


def _exponents(rule: str, growth: Growth, exponent: float | None) -> Exponents:
    r, a = growth
    s = {
        "fan2025": decay_exponent(a, r),
        "mup_package": r,
        "constant": 0.0,
        "qiu2025": r - 1,
        "timescale": r,
    }[rule]
    return Exponents(r, s if exponent is None else exponent, a)


def check_law(law: object) -> None:
    """Raises ValueError unless `law` is a `WidthLaw`; says how to build one."""
    if isinstance(law, WidthLaw):
        return
    if isinstance(law, str):
        one_of("law", law, RULES)
        raise ValueError(f"law={law!r} is the name of a rule; pass optax_decay.width.law({law!r}).")
    raise ValueError(f"law={law!r} is not a WidthLaw; pass optax_decay.width.law(rule, ...).")


def timescale_weight_decay(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
) -> float:
    """The decay coefficient λ with which decay has a given time scale, 1/(ηλ) = steps. For the rule ``timescale``.

    Args:
        learning_rate: η, the peak learning rate of the proxy. The rule keeps ηλ at other widths.
        steps: the time scale in steps; or give it as `epochs` with `steps_per_epoch`.

    Returns:
        λ, dimensionless.

    Raises:
        ValueError: neither or both of `steps` and `epochs`, or a number that is not positive.

    >>> timescale_weight_decay(3e-3, steps=10_000 / 3)
    0.1
    """
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"steps={steps!r} and epochs={epochs!r}: give exactly one of them, epochs together with steps_per_epoch."
        )
    if epochs is not None:
        if steps_per_epoch is None:
            raise ValueError(f"epochs={epochs!r} needs steps_per_epoch=... as well.")
        steps = epochs * steps_per_epoch
    elif steps_per_epoch is not None:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch!r} would be ignored beside steps={steps!r}; the nearest valid choice is "
            "to leave it out."
        )
    assert steps is not None
    check("learning_rate", learning_rate, 0.0, open_low=True)
    check("steps", steps, 0.0, open_low=True)
    return 1 / (learning_rate * steps)
