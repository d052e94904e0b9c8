"""Gates of cautious decay: where a decay may act, given the direction of the step."""

from optax_decay.product.gates import Gate as Gate
from optax_decay.product.gates import agreement as agreement
from optax_decay.product.gates import on_stepped_weight as on_stepped_weight
from optax_decay.product.gates import same_sign_bits as same_sign_bits
from optax_decay.product.gates import strict_agreement as strict_agreement
