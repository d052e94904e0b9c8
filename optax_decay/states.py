"""The states of the transformations, for those who read or migrate optimizer states."""

from optax_decay.decays.cpr import CprState as CprState
from optax_decay.one_bit.adam import OneBitAdamState as OneBitAdamState
from optax_decay.optimizers.conda import ScaleByCondaState as ScaleByCondaState
from optax_decay.optimizers.exadam import ScaleByExadamState as ScaleByExadamState
from optax_decay.optimizers.root import ScaleByRootState as ScaleByRootState
from optax_decay.optimizers.rotational import RotationalState as RotationalState
from optax_decay.optimizers.sophia import ScaleBySophiaState as ScaleBySophiaState
from optax_decay.product.metrics import Metrics as Metrics
from optax_decay.product.product import DecayState as DecayState
from optax_decay.spectral.state import SpectralAlphaState as SpectralAlphaState
from optax_decay.stepping.skip_on_spike import SkipOnSpikeState as SkipOnSpikeState
