"""1-bit Adam: workers that exchange the signs of their momenta, and the state they need for it."""

from optax_decay.one_bit.compression import local_params as local_params
from optax_decay.one_bit.compression import sign_compressed_means as sign_compressed_means
from optax_decay.one_bit.state import change_workers as change_workers
from optax_decay.one_bit.state import one_bit_phase as one_bit_phase
from optax_decay.one_bit.state import state_partition_specs as state_partition_specs
from optax_decay.one_bit.warmup import VarianceCriterion as VarianceCriterion
