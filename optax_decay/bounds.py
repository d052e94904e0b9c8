"""Bounds of constrained parameter regularization, for `cpr_decay`."""

from optax_decay.decays.bounds import Bound as Bound
from optax_decay.decays.bounds import dependent as dependent
from optax_decay.decays.bounds import inflection as inflection
from optax_decay.decays.bounds import uniform as uniform
from optax_decay.decays.bounds import warm_start as warm_start
