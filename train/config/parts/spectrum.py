"""A decay that differs from matrix to matrix, by their spectra (AlphaDecay)."""

import dataclasses
from typing import Any, Literal

import optax_decay
from train.config.ranges import Count, NotNegative

Score = Literal["alpha", "alphahat", "stable_rank", "entropy", "fnorm", "gradnorm"]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Multiplies the decay of each hidden matrix by a map of one number, its score (AlphaDecay)."""

    score: Score = "alpha"
    """alpha and alphahat: exponent of the spectrum's tail; stable_rank, entropy, fnorm: of its singular values;
    gradnorm: norm of the gradient."""
    low: NotNegative = 2 / 3
    """Multiplier of the matrix with the smallest score."""
    high: NotNegative = 3.0
    """Multiplier of the matrix with the largest score."""
    refresh_every: Count = 500
    """Between two measurements of one matrix [steps]."""
    min_eigenvalues: Count = 50
    """Matrices with fewer eigenvalues are not measured; their multiplier is 1."""

    @property
    def gradients(self) -> bool:
        """Whether it needs the mean gradient of all replicas."""
        return self.score == "gradnorm"

    def build(self, partition: Any) -> Any:
        return optax_decay.spectral_alpha(
            metric=self.score,
            min_ratio=self.low,
            max_ratio=self.high,
            refresh_every=self.refresh_every,
            min_eigenvalues=self.min_eigenvalues,
            partition=partition,
        )
