"""Masks: which parameters decay, and how strongly."""

from optax_decay.product.masks import MATRICES as MATRICES
from optax_decay.product.masks import Mask as Mask
from optax_decay.product.masks import strengths as strengths
from optax_decay.product.torch_groups import TorchGroups as TorchGroups
from optax_decay.product.torch_groups import from_torch_groups as from_torch_groups
