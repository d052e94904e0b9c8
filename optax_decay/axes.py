"""What the axes of parameters mean: signatures, their rules, and what follows from them; `infer` finds them."""

from optax_decay.parameters.axes import ROLES as ROLES
from optax_decay.parameters.axes import Axes as Axes
from optax_decay.parameters.axes import InferredAxes as InferredAxes
from optax_decay.parameters.axes import Signature as Signature
from optax_decay.parameters.axes import as_matrix as as_matrix
from optax_decay.parameters.axes import from_matrix as from_matrix
from optax_decay.parameters.axes import infer as infer
from optax_decay.parameters.axes import inferred as inferred
from optax_decay.parameters.axes import parse as parse
from optax_decay.parameters.axes import resolve as resolve
from optax_decay.parameters.axes import signatures as signatures
from optax_decay.parameters.paths import leaf_paths as leaf_paths
from optax_decay.parameters.paths import path_string as path_string
from optax_decay.parameters.shardings import partition_specs as partition_specs
