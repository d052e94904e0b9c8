"""The spectra of weight matrices: what AlphaDecay is configured with, and the largest singular values of a model."""

from optax_decay.matrices.top_singular_values import sublayer_gains as sublayer_gains
from optax_decay.matrices.top_singular_values import top_singular_values as top_singular_values
from optax_decay.matrices.top_singular_values import top_singular_vectors as top_singular_vectors
from optax_decay.optimizers.newton_fit import fit_coefficients as fit_coefficients
from optax_decay.optimizers.root import momentum_spectra as momentum_spectra
