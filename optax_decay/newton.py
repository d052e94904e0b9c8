"""The Newton iteration of Muon and ROOT: its coefficients, and how ROOT clips a matrix before it."""

from optax_decay.matrices.quantile import exact_quantile as exact_quantile
from optax_decay.optimizers.newton_coefficients import Coefficients as Coefficients
from optax_decay.optimizers.newton_coefficients import by_shape as by_shape
from optax_decay.optimizers.newton_coefficients import dion as dion
from optax_decay.optimizers.newton_coefficients import fitted as fitted
from optax_decay.optimizers.newton_coefficients import guarded as guarded
from optax_decay.optimizers.newton_coefficients import muon as muon
from optax_decay.optimizers.newton_coefficients import per_step as per_step
from optax_decay.optimizers.newton_coefficients import polar_express as polar_express
from optax_decay.optimizers.newton_coefficients import published as published
from optax_decay.optimizers.newton_coefficients import released as released
from optax_decay.optimizers.newton_coefficients import triple as triple
from optax_decay.optimizers.root import Quantile as Quantile
from optax_decay.optimizers.root import quantile as quantile
