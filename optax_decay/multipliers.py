"""Multipliers m of a decay: how strongly each matrix is decayed, as one dimensionless number per matrix.

Give one or several of them to the argument `multiplier` of any decay; their product is taken.
"""

from optax_decay.decays.adadecay import block_gradient_sigmoid as block_gradient_sigmoid
from optax_decay.decays.awd import gradient_to_weight as gradient_to_weight
from optax_decay.decays.corrected import learning_rate_ratio as learning_rate_ratio
from optax_decay.decays.stable import inverse_gradient_rms as inverse_gradient_rms
from optax_decay.decays.target_norm import norm_excess as norm_excess
from optax_decay.product.per_matrix import constant as constant
from optax_decay.spectral.alpha_decay import spectral_alpha as spectral_alpha
from optax_decay.width.scaled import width_power as width_power
