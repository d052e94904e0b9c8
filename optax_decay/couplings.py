"""Couplings of a decay: what its coefficient is multiplied with per step."""

from optax_decay.product.couplings import NAMES as NAMES
from optax_decay.product.couplings import Coupling as Coupling
from optax_decay.product.couplings import convert_weight_decay as convert_weight_decay
from optax_decay.product.couplings import corrected as corrected
from optax_decay.product.couplings import independent as independent
from optax_decay.product.couplings import learning_rate as learning_rate
from optax_decay.product.couplings import schedule as schedule
