"""The spectra of weight matrices: values that configure AlphaDecay, and functions that measure matrices.

`spectral_alpha_decay`, `spectral_alpha` and `spectral_refresh` take a score, an assignment, a refresh and a selection::

    spectral_alpha_decay(
        0.1,
        score=spectra.hill(),
        assignment=spectra.linear(2 / 3, 3.0),
        refresh=spectra.every(500),
        select=spectra.hidden_matrices(min_eigenvalues=50),
    )
"""

# Scores: one number per matrix.
from optax_decay.spectral.scores import Score as Score
from optax_decay.spectral.scores import alphahat as alphahat
from optax_decay.spectral.scores import entropy as entropy
from optax_decay.spectral.scores import frobenius_norm as frobenius_norm
from optax_decay.spectral.scores import gradient_norm as gradient_norm
from optax_decay.spectral.scores import gradient_over_weight_norm as gradient_over_weight_norm
from optax_decay.spectral.scores import hill as hill
from optax_decay.spectral.scores import spectral_norm as spectral_norm
from optax_decay.spectral.scores import stable_rank as stable_rank

# How the exponent of a tail is fitted, and how it is computed without eigenvalues.
from optax_decay.spectral.scores import matrix_products as matrix_products
from optax_decay.spectral.tails import fix_finger as fix_finger
from optax_decay.spectral.tails import goodness_of_fit as goodness_of_fit
from optax_decay.spectral.tails import median as median

# Assignments: from scores to multipliers of the decay.
from optax_decay.spectral.assignment import Assignment as Assignment
from optax_decay.spectral.assignment import linear as linear
from optax_decay.spectral.assignment import log2 as log2
from optax_decay.spectral.assignment import sigmoid as sigmoid
from optax_decay.spectral.assignment import sqrt as sqrt

# Refreshes: when matrices are measured.
from optax_decay.spectral.refresh import Refresh as Refresh
from optax_decay.spectral.refresh import all_at_once as all_at_once
from optax_decay.spectral.refresh import every as every
from optax_decay.spectral.refresh import once as once

# Selections: which matrices are measured.
from optax_decay.spectral.selection import Selection as Selection
from optax_decay.spectral.selection import hidden_matrices as hidden_matrices
from optax_decay.spectral.selection import matrices as matrices
from optax_decay.spectral.selection import reference_matrices as reference_matrices

# Measuring matrices by hand.
from optax_decay.spectral.chebyshev import tail_exponent as tail_exponent
from optax_decay.spectral.measure import Measurement as Measurement
from optax_decay.spectral.measure import measure as measure
from optax_decay.spectral.spectra import eigenvalues as eigenvalues
from optax_decay.spectral.spectra import gram as gram
from optax_decay.spectral.tails import random_matrix_alpha as random_matrix_alpha

# The largest singular values of a model.
from optax_decay.matrices.top_singular_values import sublayer_gains as sublayer_gains
from optax_decay.matrices.top_singular_values import top_singular_values as top_singular_values
from optax_decay.matrices.top_singular_values import top_singular_vectors as top_singular_vectors

# The spectra of momenta, to which the coefficients of ROOT are fitted.
from optax_decay.optimizers.newton_fit import fit_coefficients as fit_coefficients
from optax_decay.optimizers.root import momentum_spectra as momentum_spectra
