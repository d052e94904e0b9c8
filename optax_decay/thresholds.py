"""Thresholds δ of the bounded pulls that follow the weights of each matrix."""

from optax_decay.product.thresholds import Threshold as Threshold
from optax_decay.product.thresholds import mean_size as mean_size
from optax_decay.product.thresholds import rms_size as rms_size
from optax_decay.product.thresholds import running_mean_size as running_mean_size
