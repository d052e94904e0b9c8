"""How learning rate and decay follow the width of a model: laws, multipliers, tables and reports."""

from optax_decay.width.factors import decay_multipliers as decay_multipliers
from optax_decay.width.factors import learning_rate_multipliers as learning_rate_multipliers
from optax_decay.width.laws import OPTIMIZERS as OPTIMIZERS
from optax_decay.width.laws import RULES as RULES
from optax_decay.width.laws import Exponents as Exponents
from optax_decay.width.laws import Growth as Growth
from optax_decay.width.laws import WidthLaw as WidthLaw
from optax_decay.width.laws import decay_exponent as decay_exponent
from optax_decay.width.laws import law as law
from optax_decay.width.laws import timescale_weight_decay as timescale_weight_decay
from optax_decay.width.report import GainReport as GainReport
from optax_decay.width.report import spectral_gain_report as spectral_gain_report
from optax_decay.width.table import WidthTable as WidthTable
from optax_decay.width.table import width_table as width_table
