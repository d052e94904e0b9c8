"""Weight decay for JAX: composable, sharded, observable optax gradient transformations."""

from optax_decay.axes import Signature as Signature
from optax_decay.axes import partition_specs as partition_specs
from optax_decay.axes import signatures as signatures
from optax_decay.couplings import convert_weight_decay as convert_weight_decay
from optax_decay.decay import LowPrecisionDecayWarning as LowPrecisionDecayWarning
from optax_decay.decay import decay as decay
from optax_decay.decay import proximal_decay as proximal_decay
from optax_decay.diagnostics import DecayTable as DecayTable
from optax_decay.diagnostics import decay_table as decay_table
from optax_decay.huber_decay import adam_huber_decay as adam_huber_decay
from optax_decay.huber_decay import huber_decay as huber_decay
from optax_decay.huber_decay import huber_proximal_decay as huber_proximal_decay
from optax_decay.metrics import Metrics as Metrics
from optax_decay.product import DecayState as DecayState
from optax_decay.pulls import Pull as Pull
from optax_decay.pulls import fair as fair
from optax_decay.pulls import huber as huber
from optax_decay.pulls import l1 as l1
from optax_decay.pulls import l2 as l2
from optax_decay.pulls import log_cosh as log_cosh
from optax_decay.pulls import pseudo_huber as pseudo_huber
from optax_decay.quantity import Quantity as Quantity
from optax_decay.quantity import constant as constant
