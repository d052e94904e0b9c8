"""Schedules of a decay coefficient, and the timescale by which it is read in tokens."""

from optax_decay.product.schedules import Timescale as Timescale
from optax_decay.product.schedules import hold_drop_ramp as hold_drop_ramp
from optax_decay.product.schedules import log_time as log_time
from optax_decay.product.schedules import palm as palm
from optax_decay.product.schedules import soda as soda
from optax_decay.product.schedules import timescale as timescale
from optax_decay.product.schedules import to_zero as to_zero
from optax_decay.product.schedules import transferred as transferred
from optax_decay.product.schedules import weight_decay_of as weight_decay_of
