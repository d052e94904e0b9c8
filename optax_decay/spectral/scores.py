"""The score of a matrix, as a value: one number from its spectrum or its gradient that decides how strongly it decays.

With λ_1 <= ... <= λ_N the eigenvalues of the Gram matrix of the smaller side of W, in units of weight²:

========================== ================================================================= =================
score                      definition                                                        name of the program
========================== ================================================================= =================
hill                       exponent of the tail, `tails`; dimensionless                      alpha
alphahat                   softplus(exponent · log10 λ_N)                                    alphahat
stable_rank                Σ λ / λ_N                                                         stable_rank
entropy                    -Σ q ln q / ln(r + c), q_j = λ_j/Σλ + c, r = #{sqrt λ > c},       entropy
                           c = 6e-5
spectral_norm              λ_N, the square of the matrix 2-norm                              spectral_norm
frobenius_norm             Σ λ, the square of the Frobenius norm                             fnorm
gradient_norm              Frobenius norm of the gradient                                    gradnorm
gradient_over_weight_norm  Frobenius norm of the gradient / (λ_N + 1e-8)                     gradnorm_d_weightnorm
========================== ================================================================= =================

Each function below returns a `Score` with only the settings that this score uses. The program is that of AlphaDecay's
authors (arXiv 2506.14562).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import nearest, one_of
from optax_decay.spectral.tails import Fit, check_fit, median

NAMES = (
    "hill",
    "alphahat",
    "stable_rank",
    "entropy",
    "spectral_norm",
    "frobenius_norm",
    "gradient_norm",
    "gradient_over_weight_norm",
)
# The names of the released program that differ, for the hint in an error.
NAMES_OF_PROGRAM = {
    "alpha": "hill",
    "fnorm": "frobenius_norm",
    "gradnorm": "gradient_norm",
    "gradnorm_d_weightnorm": "gradient_over_weight_norm",
}
METHODS = ("auto", "exact", "eigh", "svd")
# The released program leaves matrices with fewer eigenvalues alone.
MIN_EIGENVALUES = 50

Factorisation = Literal["auto", "exact", "eigh", "svd"]


class MatrixProducts(NamedTuple):
    """A method without eigenvalues, for `hill` only. Build one with `matrix_products`.

    Attributes:
        dtype: of the factors of the products.
        everywhere: use it on every platform and for every size.
    """

    dtype: jax.typing.DTypeLike
    everywhere: bool


def matrix_products(
    dtype: jax.typing.DTypeLike = jnp.bfloat16, *, everywhere: bool = True
) -> MatrixProducts:
    """Computes the Hill exponent from matrix products (`chebyshev`), which accelerators do at full speed.

    Args:
        dtype: of the factors of the products, ``bfloat16`` or ``float32``. Rounding to bfloat16 changes the exponent
            by less than 0.002.
        everywhere: use products for every matrix on every platform. False: only for matrices of more than 256 rows on
            accelerators, and ``"exact"`` elsewhere; with bfloat16 this is what ``method="auto"`` does.

    Raises:
        ValueError: a dtype that does not hold real floating-point numbers.
    """
    kind = jnp.dtype(dtype)
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(
            f"dtype={kind.name} does not hold real numbers; the nearest valid choices are bfloat16 and float32."
        )
    return MatrixProducts(kind, everywhere)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of a matrix and how it is computed. Build one with the functions of this module.

    Scores are hashable and compare by value, so that compiled functions can take them as static arguments.

    Attributes:
        name: one of `NAMES`.
        fit: how the tail of the spectrum is fitted; None for scores without an exponent.
        filter_zeros: leave eigenvalues <= 1e-5 out of the fit, unless that leaves none.
        aspect_correction: divide the exponent by that of a random matrix of the same shape.
        method: how the spectrum is computed (`measure`).
    """

    name: str
    fit: Fit | None = None
    filter_zeros: bool = False
    aspect_correction: bool = False
    method: Factorisation | MatrixProducts = "auto"

    @property
    def needs_gradients(self) -> bool:
        """Whether the score is taken from gradients, which only the training step has."""
        return self.name in ("gradient_norm", "gradient_over_weight_norm")

    @property
    def of_weights(self) -> "Score | None":
        """The score that has to be measured on the weights; None where gradients are enough."""
        if self.name == "gradient_norm":
            return None
        return spectral_norm(self.method) if self.needs_gradients else self  # type: ignore[arg-type]

    @property
    def min_eigenvalues(self) -> int:
        """The number of eigenvalues that a matrix needs by default: 50, and 1 where no spectrum is computed."""
        return 1 if self.of_weights is None else MIN_EIGENVALUES

    @property
    def takes_upper_tail(self) -> bool:
        """Whether the exponent depends on a fixed number of the largest eigenvalues only."""
        return self.fit is not None and self.fit.name == "median" and not self.filter_zeros


def _check_method(method: Any, products: bool = False) -> None:
    if products and isinstance(method, MatrixProducts):
        return
    if isinstance(method, MatrixProducts):
        raise ValueError(
            "matrix_products() computes only the score hill() with fit=median() and without filter_zeros; the nearest "
            "valid choice is method='exact'."
        )
    one_of("method", method, METHODS)


def hill(
    fit: Fit = median(),
    *,
    filter_zeros: bool = False,
    aspect_correction: bool = False,
    method: Factorisation | MatrixProducts = "auto",
) -> Score:
    """The exponent of the tail of the spectrum, AlphaDecay's score. Small exponents mean heavy tails.

    Args:
        fit: `median`, `goodness_of_fit` or `fix_finger`.
        filter_zeros: leave eigenvalues <= 1e-5 out, unless that leaves none.
        aspect_correction: divide by the exponent of a random matrix of the same shape, which depends on the aspect
            ratio alone (`random_matrix_alpha`).
        method: ``"auto"``, ``"exact"``, ``"eigh"``, ``"svd"`` or `matrix_products`; `measure` describes them.

    Raises:
        ValueError: something that is not a fit, an unknown method, or `matrix_products` beside another fit than
            `median` or with `filter_zeros`.
    """
    check_fit(fit)
    _check_method(method, fit.name == "median" and not filter_zeros)
    return Score("hill", fit, filter_zeros, aspect_correction, method)


def alphahat(
    fit: Fit = median(), *, filter_zeros: bool = False, method: Factorisation = "auto"
) -> Score:
    """The exponent times log10 of the largest eigenvalue, made positive by a softplus. Arguments as in `hill`."""
    check_fit(fit)
    _check_method(method)
    return Score("alphahat", fit, filter_zeros, method=method)


def stable_rank(method: Factorisation = "auto") -> Score:
    """The sum of all eigenvalues over the largest; dimensionless. `method` as in `hill`."""
    _check_method(method)
    return Score("stable_rank", method=method)


def entropy(method: Factorisation = "auto") -> Score:
    """The entropy of the eigenvalues over that of a flat spectrum of the same rank. `method` as in `hill`."""
    _check_method(method)
    return Score("entropy", method=method)


def spectral_norm(method: Factorisation = "auto") -> Score:
    """The largest eigenvalue, the square of the largest singular value. `method` as in `hill`."""
    _check_method(method)
    return Score("spectral_norm", method=method)


def frobenius_norm() -> Score:
    """The sum of squares of all entries; needs no spectrum."""
    return Score("frobenius_norm")


def gradient_norm() -> Score:
    """The Frobenius norm of the gradient, in units of the gradient; needs no spectrum."""
    return Score("gradient_norm")


def gradient_over_weight_norm(method: Factorisation = "auto") -> Score:
    """The Frobenius norm of the gradient over the largest eigenvalue of the weights. `method` as in `hill`."""
    _check_method(method)
    return Score("gradient_over_weight_norm", method=method)


def check_score(score: object) -> None:
    """Raises ValueError unless `score` is a `Score`; names the nearest one."""
    if not isinstance(score, Score):
        name = getattr(score, "__name__", str(score))
        name = NAMES_OF_PROGRAM.get(name, name)
        raise ValueError(
            f"score={score!r} is not a Score; allowed: {', '.join(f'spectra.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.spectra.{nearest(name, NAMES)}()?)."
        )
