"""Pulls ψ of a decay: what a single weight feels."""

from optax_decay.product.pulls import NAMES as NAMES
from optax_decay.product.pulls import Pull as Pull
from optax_decay.product.pulls import elastic_net as elastic_net
from optax_decay.product.pulls import fair as fair
from optax_decay.product.pulls import huber as huber
from optax_decay.product.pulls import l1 as l1
from optax_decay.product.pulls import l2 as l2
from optax_decay.product.pulls import log_cosh as log_cosh
from optax_decay.product.pulls import lp as lp
from optax_decay.product.pulls import padam as padam
from optax_decay.product.pulls import pseudo_huber as pseudo_huber
