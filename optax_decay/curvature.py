"""Estimates of the diagonal of a Hessian, for Sophia."""

from optax_decay.optimizers.curvature import gnb_from_gradients as gnb_from_gradients
from optax_decay.optimizers.curvature import gnb_hessian as gnb_hessian
from optax_decay.optimizers.curvature import hutchinson as hutchinson
from optax_decay.optimizers.curvature import refresh_is_due as refresh_is_due
