"""Scales by which Muon's step follows the shape of a matrix."""

from optax_decay.optimizers.shape_scales import ShapeScale as ShapeScale
from optax_decay.optimizers.shape_scales import one as one
from optax_decay.optimizers.shape_scales import sqrt_larger_side as sqrt_larger_side
from optax_decay.optimizers.shape_scales import sqrt_outputs_per_input as sqrt_outputs_per_input
