"""A decay that differs from matrix to matrix, by their spectra (AlphaDecay)."""

import dataclasses
from typing import Any, Literal

import optax_decay
from train.config.ranges import Count, NotNegative

Score = Literal["hill", "alphahat", "stable_rank", "entropy", "frobenius_norm", "gradient_norm"]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Multiplies the decay of each hidden matrix by a map of one number, its score (AlphaDecay)."""

    score: Score = "hill"
    """hill and alphahat: exponent of the spectrum's tail; stable_rank, entropy, frobenius_norm: of the singular
    values; gradient_norm: of the gradient."""
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
        return self.score == "gradient_norm"

    def build(self, partition: Any) -> Any:
        spectra = optax_decay.spectra
        select = spectra.hidden_matrices(min_eigenvalues=self.min_eigenvalues)
        return optax_decay.multipliers.spectral_alpha(
            score=getattr(spectra, self.score)(),
            assignment=spectra.linear(self.low, self.high),
            refresh=spectra.every(self.refresh_every),
            select=select,
            param_specs=partition,
        )
