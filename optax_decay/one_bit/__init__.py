"""1-bit Adam: workers that exchange the signs of their momenta, and the state they need for it."""

from optax_decay.one_bit.compression import decode as decode
from optax_decay.one_bit.compression import decode_sum as decode_sum
from optax_decay.one_bit.compression import encode as encode
from optax_decay.one_bit.compression import local_params as local_params
from optax_decay.one_bit.compression import padded_size as padded_size
from optax_decay.one_bit.compression import sign_compressed_means as sign_compressed_means
from optax_decay.one_bit.state import change_workers as change_workers
from optax_decay.one_bit.state import one_bit_phase as one_bit_phase
from optax_decay.one_bit.state import state_partition_specs as state_partition_specs
from optax_decay.one_bit.warmup import VarianceCriterion as VarianceCriterion
