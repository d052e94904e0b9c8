"""Weight decay for JAX: composable, sharded, observable optax gradient transformations.

The names below stand under headings. What is only needed to configure them lives in namespaces:

* `pulls`, `thresholds`, `multipliers`, `couplings`: the parts of a decay.
* `gates`: where a cautious decay may act. `bounds`: where the bound of `cpr_decay` comes from.
* `spectra`: scores, maps, refreshing and selection of AlphaDecay, and the spectra of a model's matrices.
* `width`: laws, multipliers and reports of decay and learning rate that follow the width.
* `axes`: what the axes of a parameter mean. `curvature`: estimates for Sophia. `one_bit`: the workers of 1-bit Adam.
* `newton`: how ROOT clips a matrix, and the coefficients of its iteration.
* `schedules`: λ over the run, and the dial between λ and the tokens that a weight remembers.
* `shape_scales`: by how much Muon multiplies an orthogonal factor, given its shape.
* `low_precision`: rounding of updates. `states`: the states of the transformations.
"""

import importlib.metadata as _metadata

# The product that every decay is.
from optax_decay.product.couplings import Coupling as Coupling
from optax_decay.product.decay import DecayOptions as DecayOptions
from optax_decay.product.decay import LowPrecisionDecayWarning as LowPrecisionDecayWarning
from optax_decay.product.decay import decay as decay
from optax_decay.product.decay import proximal_decay as proximal_decay
from optax_decay.product.masks import GuessedRolesWarning as GuessedRolesWarning
from optax_decay.product.per_matrix import PerMatrix as PerMatrix
from optax_decay.product.product import NothingDecaysWarning as NothingDecaysWarning
from optax_decay.product.pulls import Pull as Pull

# Decays, which stand before the learning rate.
from optax_decay.decays.adadecay import adadecay as adadecay
from optax_decay.decays.adadecay import block_adadecay as block_adadecay
from optax_decay.decays.awd import awd_decay as awd_decay
from optax_decay.decays.cautious import cautious_decay as cautious_decay
from optax_decay.decays.corrected import corrected_decay as corrected_decay
from optax_decay.decays.elastic_net import elastic_net_decay as elastic_net_decay
from optax_decay.decays.huber import huber_decay as huber_decay
from optax_decay.decays.lp import lp_decay as lp_decay
from optax_decay.decays.stable import stable_decay as stable_decay
from optax_decay.decays.target_norm import target_norm_decay as target_norm_decay
from optax_decay.decays.toward_initial import toward_initial_decay as toward_initial_decay
from optax_decay.spectral.alpha_decay import spectral_alpha_decay as spectral_alpha_decay
from optax_decay.width.scaled import width_scaled_decay as width_scaled_decay
from optax_decay.width.scaled import width_scaled_learning_rate as width_scaled_learning_rate
from optax_decay.width.scaled import width_scaling as width_scaling

# Links that stand last, on the finished step.
from optax_decay.decays.cpr import cpr_decay as cpr_decay
from optax_decay.decays.elastic_net import elastic_net_proximal_decay as elastic_net_proximal_decay
from optax_decay.decays.huber import huber_proximal_decay as huber_proximal_decay
from optax_decay.decays.lp import lp_proximal_decay as lp_proximal_decay
from optax_decay.decays.toward_initial import soda_decay as soda_decay
from optax_decay.norms.hyperball import hyperball as hyperball
from optax_decay.norms.radial_brake import radial_brake as radial_brake
from optax_decay.optimizers.rotational import center_rows as center_rows
from optax_decay.optimizers.rotational import rotational_update as rotational_update

# Links that scale the direction by norms, before any decay.
from optax_decay.norms.relative_update import relative_update as relative_update
from optax_decay.norms.relative_update import relative_update_floor as relative_update_floor

# Optimizers.
from optax_decay.decays.huber import adam_huber_decay as adam_huber_decay
from optax_decay.decays.stable import adam_stable_decay as adam_stable_decay
from optax_decay.one_bit.adam import one_bit_adam as one_bit_adam
from optax_decay.one_bit.adam import scale_by_one_bit_adam as scale_by_one_bit_adam
from optax_decay.optimizers.adam_hyperball import adam_hyperball as adam_hyperball
from optax_decay.optimizers.adam_hyperball import muon_hyperball as muon_hyperball
from optax_decay.optimizers.conda import conda as conda
from optax_decay.optimizers.conda import scale_by_conda as scale_by_conda
from optax_decay.optimizers.exadam import exadam as exadam
from optax_decay.optimizers.exadam import scale_by_exadam as scale_by_exadam
from optax_decay.optimizers.muon import muon as muon
from optax_decay.optimizers.muon import normuon as normuon
from optax_decay.optimizers.muon import scale_by_muon as scale_by_muon
from optax_decay.optimizers.muon import scale_by_normuon as scale_by_normuon
from optax_decay.optimizers.root import root as root
from optax_decay.optimizers.root import scale_by_root as scale_by_root
from optax_decay.optimizers.rotational import rotational_adamw as rotational_adamw
from optax_decay.optimizers.sophia import scale_by_sophia as scale_by_sophia
from optax_decay.optimizers.sophia import sophia_g as sophia_g
from optax_decay.optimizers.sophia import sophia_h as sophia_h
from optax_decay.width.scaled import mup_adamw as mup_adamw

# One optimizer per role.
from optax_decay.optimizers.by_role import by_role as by_role
from optax_decay.optimizers.role_table import RoleTable as RoleTable
from optax_decay.optimizers.role_table import role_table as role_table

# Low precision.
from optax_decay.stepping.low_precision import apply_updates as apply_updates
from optax_decay.stepping.low_precision import kahan_apply_updates as kahan_apply_updates
from optax_decay.stepping.low_precision import kahan_init as kahan_init

# Looking at a run, and keeping it whole.
from optax_decay.product.couplings import convert_weight_decay as convert_weight_decay
from optax_decay.product.diagnostics import DecayTable as DecayTable
from optax_decay.product.diagnostics import decay_table as decay_table
from optax_decay.product.diagnostics import metrics as metrics
from optax_decay.product.probe import ProbeError as ProbeError
from optax_decay.product.probe import ProbeTable as ProbeTable
from optax_decay.product.probe import probe as probe
from optax_decay.spectral.host_refresh import spectral_refresh as spectral_refresh
from optax_decay.stepping.skip_on_spike import skip_on_spike as skip_on_spike

# Namespaces.
from optax_decay import axes as axes
from optax_decay import bounds as bounds
from optax_decay import couplings as couplings
from optax_decay import curvature as curvature
from optax_decay import low_precision as low_precision
from optax_decay import gates as gates
from optax_decay import masks as masks
from optax_decay import multipliers as multipliers
from optax_decay import newton as newton
from optax_decay import one_bit as one_bit
from optax_decay import pulls as pulls
from optax_decay import schedules as schedules
from optax_decay import shape_scales as shape_scales
from optax_decay import spectra as spectra
from optax_decay import states as states
from optax_decay import thresholds as thresholds
from optax_decay import width as width

try:
    __version__ = _metadata.version("optax_decay")
except _metadata.PackageNotFoundError:  # imported from a clone that is not installed
    __version__ = "0.1.0"

# For `help` and ``from optax_decay import *``: all of the above, without the shelves that hold it.
_SHELVES = {
    "decays",
    "matrices",
    "norms",
    "optimizers",
    "parameters",
    "product",
    "spectral",
    "stepping",
}
__all__ = sorted(name for name in globals() if not name.startswith("_") and name not in _SHELVES)  # pyrefly: ignore
