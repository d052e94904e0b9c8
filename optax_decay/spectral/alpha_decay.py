r"""AlphaDecay: matrices whose spectrum has a light tail decay more.

With W a hidden matrix, λ_1 <= ... <= λ_N the eigenvalues of the Gram matrix of its smaller side (units weight²), and
k = N - int(N/2) of them in the tail::

    alpha(W) = 1 + k / Σ_{j > N-k} ln(λ_j / λ_{N-k+1})          the Hill exponent, dimensionless
    m(W) = lo + (hi - lo) (alpha(W) - min alpha) / (max alpha - min alpha)
    u ← u + λ(t) m(W) W                                         λ(t): the rate, dimensionless

min and max run over all measured matrices of the network; alpha and m are renewed every `refresh_every` steps from
the weights before the step, and held in between. Other metrics and maps: `spectra.measure`, `metric_assignment`;
additionally ``gradnorm``, the Frobenius norm of the gradient, and ``gradnorm_d_weightnorm``, the same divided by
λ_N + 1e-8.

Reference: AlphaDecay (arXiv 2506.14562) and the program of its authors.

**Coupled or decoupled.** After ``scale_by_adam`` this is the decoupled form (AdamW). Before it, the pull goes through
the moments: torch's ``Adam(weight_decay=...)``, with which most of the paper's figures were made, at rates 10⁴ times
smaller (1e-5 against 0.1). Gradient metrics need raw gradients: stand before Adam, or pass ``gradients=grads`` to
``update``.

**Differs from the paper and the program.** The paper's text could not be read beyond its abstract and figures; the
program was.

* *Which matrices* (D1). All of role hidden with at least 50 eigenvalues; embedding and head never. The program also
  leaves out the first linear map, which in a LLaMA is the query projection of block 0, scheduled like its peers in
  the paper's figure. ``select="reference"`` does as the program does.
* *Aspect ratio* (D2). alpha of a random matrix depends on its shape alone: 2.12 square, 2.99 for 3:8, 3.45 for 1:4, so
  that untrained MLP matrices decay four times as much as attention. Kept as it is; ``aspect_correction=True``
  divides by the exponent of a random matrix of that shape, which changes the order of the modules.
* *Outliers* (D3). One matrix sets the ends of the linear map; ``quantile_clip`` bounds that. Off.
* *Total decay* (D4). The linear map raises the mean decay over all weights 1.8- to 3.5-fold, so a comparison with
  uniform decay confounds where with how much. ``preserve_mean=True`` rescales it to 1; the state always tells it.
* *Random weights* (D5). The first map is made from the initial weights, as in the program; ``start_step`` delays it.
* *Gradient metrics* (D6). Without gradients at construction, the program's integer scores give a decay of exactly 0
  for the first interval; here 1 until the first refresh, D13: and no decomposition for ``gradnorm``.
* *Everything else* (D7). The program decays norms, biases and embeddings at λ as well. So does ``mask=None`` here; a
  mask leaves them out.
* *Low precision* (D8). λ m W is computed in float32 and added to the update before one cast. In bfloat16 weights most
  of it would be lost: `decay` warns.
* *KS fits* (D9) are offered, but single draws of a random matrix give 8.9 ± 2.1. *fix-finger* (D10) uses the window
  that was meant, [0.95 p, 1.5 p]; the program compares a logarithm with an eigenvalue.
* *Degenerate spectra* (D11). Zero, flat, non-finite matrices and those whose null space reaches the tail crash the
  program or give noise; here they keep λ, take no part in min and max, and are counted. Equal scores give λ, not hi λ.
* *Resume* (D12). Everything is in the state. *Cost* (D13): only measured matrices are decomposed, each once, shared
  over devices; the program decomposes the head and throws the result away, on every rank.
* *Phase* (D15): updates with (count + 1) % refresh_every == 0, as in the program, without its extra step after the
  end. *Units* (D16): steps always. (D14 is about its evaluation.)
* *Staggered.* By default every matrix has its own step within the interval, so that no step takes much longer than
  the others. ``schedule="all"`` renews all at once, as the program does.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.product import masks
from optax_decay.product.decay import as_multipliers, decay
from optax_decay.product.per_matrix import PerMatrix
from optax_decay.spectral.multiplier import spectral_quantity
from optax_decay.spectral.options import Options, check_options
from optax_decay.spectral.selection import Select


def spectral_alpha(
    *,
    metric: str = "alpha",
    assignment: str = "linear",
    min_ratio: float = 2 / 3,
    max_ratio: float = 3.0,
    refresh_every: int | None = 500,
    schedule: str = "staggered",
    at_once: int = 1,
    select: Select = "hidden",
    exclude: Sequence[str] = (),
    min_eigenvalues: int = 50,
    method: str = "auto",
    fit: str = "median",
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
    sharpness: float = 4.0,
    aspect_correction: bool = False,
    preserve_mean: bool = False,
    quantile_clip: float = 0.0,
    start_step: int = 0,
    partition: Any = None,
    mesh: Any = None,
    product_dtype: Any = jnp.bfloat16,
) -> PerMatrix:
    """The multiplier m of the module's docstring: one per hidden matrix, 1 for everything else.

    Numbers may be traced except where the description says static.

    Args:
        metric: static; one of ``alpha``, ``alphahat``, ``stable_rank``, ``entropy``, ``spectral_norm``, ``fnorm``
            (`spectra.measure`), ``gradnorm``, ``gradnorm_d_weightnorm``.
        assignment: static; ``linear``, ``sqrt``, ``log2`` or ``sigmoid`` (per block), see `metric_assignment`.
        min_ratio, max_ratio: lo and hi of ``linear``, dimensionless, >= 0. The program's scripts use 2/3 with 3 or 5,
            tuned per run.
        refresh_every: steps between two measurements of a matrix, >= 1; None: only the first one, for use with
            ``refresh`` or `spectral_refresh`.
        schedule: static; ``"staggered"``: matrix j of T at updates with (count + 1) % every == floor(j every / T);
            ``"all"``: all of them when that remainder is 0, as the program does. Gradient metrics are always ``all``.
        at_once: static; matrices that are due together when staggered. Set it to the number of devices that share
            them: a round costs the same time as one matrix.
        select: static; ``"hidden"``, ``"reference"`` or a function ``(name, signature) -> bool``
            (`matrix_selection.choose`). Without `axes`, every 2-d array counts as hidden.
        exclude: static; names or path patterns, such as ``"blocks/attention/query/kernel[0]"``.
        min_eigenvalues: static; matrices with fewer keep λ.
        method: static; how spectra are computed, `spectra.METHODS`.
        fit, xmin_pos, filter_zeros: static; the tail's fit, `tail_exponents.fit`.
        sharpness: of ``sigmoid``, > 0.
        aspect_correction: static; divide alpha by that of a random matrix of the same shape.
        preserve_mean: static; rescale so that the mean of m over the weights of measured matrices is 1.
        quantile_clip: q in [0, 0.5); ``linear`` first moves scores into their quantiles [q, 1-q].
        start_step: completed updates before which m is 1 and nothing is measured.
        partition: a tree of ``jax.P`` (or shardings) like the parameters: how they are split, needed inside
            ``shard_map``, and under Auto axes for sharing matrices over devices (`whole_matrices`).
        mesh: the mesh, where ``jax.set_mesh`` is not used.
        product_dtype: static; of the products of ``method="matmul"``.

    Extra arguments of ``update``: ``gradients``, the raw gradients, for gradient metrics after Adam; ``refresh``, by
    which the training step owns the phase: True measures everything now, False nothing, and None (or absent) leaves it
    to `refresh_every`. Under ``optax.MultiSteps`` pass True only where the accumulated step is taken, otherwise every
    micro step would measure and throw away. With Python's True and False two programs are compiled, and the
    plain one holds no trace of the measurement.

    Returns:
        PerMatrix with a `SpectralAlphaState`. The first measurement happens in the first update, from the initial
        weights.

    Raises:
        ValueError: an unknown name, a number out of its range, a method that cannot give the metric; at ``init``, an
            `exclude` that matches nothing; inside ``shard_map``, shards without a `partition`.
    """
    return spectral_quantity(check_options(Options(**locals())))


def spectral_alpha_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    *,
    metric: str = "alpha",
    assignment: str = "linear",
    min_ratio: float = 2 / 3,
    max_ratio: float = 3.0,
    refresh_every: int | None = 500,
    multiplier: PerMatrix | Sequence[PerMatrix] | None = None,
    mask: masks.Mask = None,
    axes: axes_lib.Axes = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ(t) m(W) W`` to the update, with m from the spectrum of each hidden matrix.

    Stands after ``scale_by_adam`` (decoupled) or before it (coupled), see the module's docstring.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or an optax schedule.
        metric, assignment, min_ratio, max_ratio, refresh_every: as in `spectral_alpha`.
        multiplier: further factors, as in `decay`.
        mask, axes: as in `decay`. Only parameters that decay are measured.
        options: every other argument of `spectral_alpha`, and pull, cautious, coupling, learning_rate,
            peak_learning_rate, metrics, as in `decay`.

    Raises:
        ValueError: as in `spectral_alpha` and `decay`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(b1=0.9, b2=0.95),
    ...     optax_decay.spectral_alpha_decay(0.1, max_ratio=5.0),
    ...     optax.scale_by_learning_rate(1e-3),
    ... )
    """
    of_decay = {name: value for name, value in options.items() if name not in Options._fields}
    alpha = spectral_alpha(
        metric=metric,
        assignment=assignment,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        refresh_every=refresh_every,
        **{name: value for name, value in options.items() if name in Options._fields},
    )
    return decay(
        weight_decay,
        multiplier=(alpha, *as_multipliers(multiplier)),
        mask=mask,
        axes=axes,
        **of_decay,
    )
