"""Updates of weights that are stored in 16 bits."""

from optax_decay.stepping.low_precision import apply_updates as apply_updates
from optax_decay.stepping.low_precision import kahan_apply_updates as kahan_apply_updates
from optax_decay.stepping.low_precision import kahan_init as kahan_init
from optax_decay.stepping.low_precision import round_stochastically as round_stochastically
