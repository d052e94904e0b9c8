r"""AlphaDecay: matrices whose spectrum has a light tail decay more.

With W a hidden matrix, λ_1 <= ... <= λ_N the eigenvalues of the Gram matrix of its smaller side (units weight²), and
k = N - int(N/2) of them in the tail::

    alpha(W) = 1 + k / Σ_{j > N-k} ln(λ_j / λ_{N-k+1})          the Hill exponent, dimensionless
    m(W) = lo + (hi - lo) (alpha(W) - min alpha) / (max alpha - min alpha)
    u ← u + λ(t) m(W) W                                         λ(t): the rate, dimensionless

min and max run over all measured matrices of the network. alpha and m are renewed every 500 steps (or another number)
from the weights before the step, and held in between. `score` replaces alpha, `assignment` the linear map, `refresh`
the interval, and `select` the set of matrices; each is a value that carries its own numbers.

Reference: AlphaDecay (arXiv 2506.14562) and the program of its authors.

**Coupled or decoupled.** After ``scale_by_adam`` the decay is decoupled, as in AdamW. Before it, the pull goes through
the moments, as in torch's ``Adam(weight_decay=...)``, with which most figures of the paper were made; rates are then
10⁴ times smaller (1e-5 instead of 0.1). Scores of gradients need raw gradients: place the link before Adam, or pass
``gradients=grads`` to ``update``.

**Differs from the paper and the program.** Of the paper, only the abstract and the figures could be read; the program
could be read in full.

* *Which matrices are measured* (D1). Here: all of role hidden with at least 50 eigenvalues, never the embedding or the
  head. The program also leaves out the first linear map, which in a LLaMA is the query projection of block 0; in the
  figure of the paper that matrix is scheduled like its peers. ``select=spectra.reference_matrices()`` does as the
  program does.
* *Aspect ratio* (D2). alpha of a random matrix depends on its shape alone: 2.12 for a square, 2.99 for 3:8, 3.45 for
  1:4. Untrained MLP matrices therefore decay four times as much as attention. This is kept as it is;
  ``spectra.hill(aspect_correction=True)`` divides by the exponent of a random matrix of that shape, which changes the
  order of the modules.
* *Outliers* (D3). A single matrix sets an end of the linear map. ``spectra.linear(quantile_clip=q)`` bounds its effect;
  off by default.
* *Total decay* (D4). The linear map raises the mean decay over all weights by a factor of 1.8 to 3.5, so a comparison
  with uniform decay confounds where weights decay with how much they decay. ``preserve_mean=True`` rescales the mean
  to 1. The state always holds it (`SpectralAlphaState.mean_ratio`).
* *Random weights* (D5). The first multipliers come from the initial weights, as in the program; ``start_step`` of a
  refresh delays them.
* *Scores of gradients* (D6). The program has no gradients when it is constructed, and its integer scores then give a
  decay of exactly 0 for the first interval. Here multipliers are 1 until the first refresh.
* *Everything else* (D7). The program decays norms, biases and embeddings at λ as well, and so does ``mask=None`` here.
  A mask leaves them out.
* *Low precision* (D8). λ m W is computed in float32 and added to the update before one cast. In bfloat16 weights most
  of it would be lost: `decay` warns.
* *Fits by the Kolmogorov-Smirnov distance* (D9) are offered (`spectra.goodness_of_fit`), but single draws of a random
  matrix give 8.9 ± 2.1. `spectra.fix_finger` (D10) uses the window that was meant, [0.95 p, 1.5 p]; the program
  compares a logarithm with an eigenvalue.
* *Degenerate spectra* (D11). Matrices that are zero, flat or not finite, and those whose null space reaches the tail,
  crash the program or give noise. Here they keep the multiplier 1, take no part in min and max, and are counted. Equal
  scores give the decay λ, not λ hi.
* *Resuming* (D12). Everything is in the state.
* *Derivatives* of a run with respect to its learning rate or λ take the multipliers for constants.
* *Cost* (D13). Only measured matrices are decomposed, each once, shared over devices, and none for the gradient norm.
  The program decomposes the head on every rank and discards the result.
* *Phase* (D15). Updates with (count + 1) % interval == 0, as in the program, without its extra step after the end of
  training. *Units* (D16): always steps. (D14 concerns the evaluation in the program.)
* *Staggered refresh.* By default every matrix has its own step within the interval, so that no step takes much longer
  than the others. ``refresh=spectra.all_at_once(500)`` renews all matrices in the same step, as the program does.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.matrices.whole import inside_shard_map, known_mesh, split_axes
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import passes_options_to
from optax_decay.product.decay import DecayOptions, decay, times
from optax_decay.product.masks import warn_of_guesses
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.spectral.assignment import Assignment, check_assignment, linear
from optax_decay.spectral.measure import Measurement, measure
from optax_decay.spectral.refresh import Refresh, check_refresh, every
from optax_decay.spectral.scores import Score, check_score, hill
from optax_decay.spectral.selection import (
    MeasuredParameter,
    Selection,
    check_selection,
    choose,
    hidden_matrices,
    specs_by_path,
)
from optax_decay.spectral.state import (
    SpectralAlphaState,
    gather,
    initial_state,
    make_score_map,
    renew,
)
from optax_decay.spectral.sweep import Measurements, Sweep, find_placement, plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which matrices are scored, by what, and what follows from it: all that training step and host must agree on.

    Attributes: as the arguments of `spectral_alpha`. Their defaults are written here and nowhere else.
    """

    score: Score = hill()
    assignment: Assignment = linear()
    select: Selection = hidden_matrices()

    def __post_init__(self) -> None:
        check_score(self.score)
        check_assignment(self.assignment)
        check_selection(self.select)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralSettings(Scoring):
    """The arguments of `spectral_alpha` as one checked value: `Scoring`, and when and where matrices are measured."""

    refresh: Refresh = every(500)
    param_specs: Any = None
    mesh: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_refresh(self.refresh, self.score.needs_gradients)
        specs_by_path(self.param_specs)


class ScoringOptions(TypedDict, total=False):
    """Keyword arguments of `spectral_refresh`, which `spectral_alpha` describes."""

    score: Score
    assignment: Assignment
    select: Selection


class SpectralOptions(ScoringOptions, total=False):
    """Keyword arguments of `spectral_alpha`, which describes them."""

    refresh: Refresh
    param_specs: Any
    mesh: Any


class SpectralDecayOptions(SpectralOptions, DecayOptions, total=False):
    """Keyword arguments of `spectral_alpha_decay`: those of `spectral_alpha` and of `decay`."""


@passes_options_to(SpectralSettings)
def spectral_alpha(**options: Unpack[SpectralOptions]) -> PerMatrix:
    """The multiplier m of AlphaDecay: one number per measured matrix, and 1 for everything else.

    Args:
        score: the score of a matrix. Default: `hill`, the tail exponent of its spectrum.
        assignment: how scores become multipliers. Default: `linear` from 2/3 to 3.
        refresh: when matrices are measured anew. Default: ``every(500)``, staggered over the interval.
        select: which matrices are measured. Default: `hidden_matrices`, those of role hidden.
        param_specs: a tree of ``jax.P`` (or ``jax.NamedSharding``) like the parameters, which says how they are split.
            Needed inside ``shard_map``, and under Auto axes for sharing the work over devices.
        mesh: the mesh, where ``jax.set_mesh`` is not used.

    All four values come from `optax_decay.spectra`. The numbers of an assignment and a refresh may be traced (except
    ``at_once``); everything else is static.

    ``update`` uses two extra arguments. ``gradients`` holds the raw gradients, for scores of gradients in a link that
    stands after Adam. ``refresh`` lets the training step decide: True measures all matrices now, False none, and None
    (or no such argument) leaves it to `refresh`. Under ``optax.MultiSteps`` pass True only where the accumulated step
    is taken; otherwise every micro step measures and discards the result. With Python's True and False two programs
    are compiled, and the one for False holds no trace of the measurement.

    Returns:
        A `PerMatrix` with a `SpectralAlphaState`. The first measurement happens in the first update, from the initial
        weights.

    Raises:
        ValueError: something that is not a value of the kind that an argument needs, an ``at_once`` beside a score of
            gradients, or `param_specs` that hold something else than partitions; at ``init``, an ``exclude`` that
            matches nothing; inside ``shard_map``, shards without `param_specs`.

    >>> import optax_decay
    >>> from optax_decay import multipliers, spectra
    >>> m = multipliers.spectral_alpha(score=spectra.hill(), assignment=spectra.linear(2 / 3, 5.0))
    >>> tx = optax_decay.huber_decay(0.1, multiplier=m)
    """
    return _per_matrix(SpectralSettings(**options))


@passes_options_to(decay)
@passes_options_to(spectral_alpha)
def spectral_alpha_decay(
    weight_decay: optax.ScalarOrSchedule = 0.1, **options: Unpack[SpectralDecayOptions]
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ(t) m(W) W`` to the update, with m from the spectrum of each hidden matrix.

    Stands after ``scale_by_adam`` (decoupled decay) or before it (coupled decay).

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or an optax schedule.
        options: score, assignment, refresh, select, param_specs, mesh, as in `spectral_alpha`; and pull, multiplier
            (further factors), cautious, mask, axes, coupling, metrics, as in `decay`. Only parameters that decay are
            measured.

    Returns:
        A transformation whose state is a `DecayState` with a `SpectralAlphaState` as its first multiplier.

    Raises:
        ValueError: as in `spectral_alpha` and `decay`.

    >>> import optax, optax_decay
    >>> from optax_decay import spectra
    >>> tx = optax.chain(
    ...     optax.scale_by_adam(b1=0.9, b2=0.95),
    ...     optax_decay.spectral_alpha_decay(0.1, assignment=spectra.linear(2 / 3, 5.0)),
    ...     optax.scale_by_learning_rate(1e-3),
    ... )
    """
    own, others = _own_and_others(options)
    return decay(weight_decay, **times(spectral_alpha(**own), others))


def _own_and_others(options: SpectralDecayOptions) -> tuple[SpectralOptions, DecayOptions]:
    """The options of `spectral_alpha`, and those of `decay`, which raises for names that neither knows."""
    names = SpectralOptions.__annotations__
    own: Any = {name: value for name, value in options.items() if name in names}
    others: Any = {name: value for name, value in options.items() if name not in names}
    return own, others


def _without_derivatives(context: Context) -> Context:
    """The same values as constants: multipliers are measured, and derivatives of a run leave them out."""
    extra = dict(context.extra)
    if extra.get("gradients") is not None:
        extra["gradients"] = jax.lax.stop_gradient(extra["gradients"])
    constant = jax.lax.stop_gradient((dict(context.updates), dict(context.params)))
    return context._replace(updates=constant[0], params=constant[1], extra=extra)


def _per_matrix(settings: SpectralSettings) -> PerMatrix:
    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        parameters = measured_parameters(settings, settings.param_specs, params, signatures)
        warn_of_guesses("AlphaDecay's choice of matrices", signatures)
        _warn_if_none(settings, parameters, signatures)
        return initial_state(parameters, {p.path: params[p.path].dtype for p in parameters})

    def update(context: Context, state: SpectralAlphaState) -> tuple[dict[str, Value], Any]:
        parameters = measured_parameters(
            settings, settings.param_specs, context.params, context.signatures
        )
        values: dict[str, Value] = dict.fromkeys(context.params, 1.0)
        if not parameters:
            return values, state
        context = _without_derivatives(context)
        used = {p.path: context.params[p.path] for p in parameters}
        placement = find_placement(used, parameters, settings.mesh)
        sweep = plan(parameters, {path: x.dtype for path, x in used.items()}, placement)
        requested = context.extra.get("refresh")
        low, high = settings.refresh.due(
            sweep.count, context.count, requested, settings.score.needs_gradients
        )
        wide = state.mean_ratio.dtype

        def measured(state: SpectralAlphaState) -> SpectralAlphaState:
            centres = gather(sweep.parameters, state.centre, wide)
            found = _measure_range(settings.score, sweep, context, centres, low, high)
            score_map = make_score_map(settings.score, settings.assignment, sweep.parameters)
            return renew(state, found, score_map)

        if isinstance(requested, bool):
            state = measured(state) if requested else state
        else:
            state = jax.lax.cond(high > low, measured, lambda state: state, state)
        return {**values, **state.multiplier}, state

    return PerMatrix(init, update)


def measured_parameters(
    scoring: Scoring,
    param_specs: Any,
    params: Mapping[str, Any],
    signatures: Mapping[str, axes_lib.Signature],
) -> list[MeasuredParameter]:
    """The parameters with measured matrices (`selection.choose`), with what is known of how they are split.

    Args:
        scoring: which matrices are measured.
        param_specs: how parameters are split, as in `spectral_alpha`.
        params: the parameters that decay, by path; arrays or ``jax.ShapeDtypeStruct``.
        signatures: of the same parameters.
    """
    specs = specs_by_path(param_specs)
    shapes = {path: tuple(x.shape) for path, x in params.items()}
    for path, x in params.items():
        spec = specs.get(path, ())
        if isinstance(x, jax.ShapeDtypeStruct):
            continue
        if inside_shard_map():
            sizes = [1] * len(x.shape)
            for name, dimension in split_axes(spec):
                sizes[dimension] *= jax.lax.axis_size(name)
            shapes[path] = tuple(n * k for n, k in zip(x.shape, sizes))
        elif (mesh := known_mesh(x, None)) is not None and (
            jax.sharding.AxisType.Explicit in mesh.axis_types
        ):
            specs[path] = tuple(jax.typeof(x).sharding.spec)
    return choose(signatures, shapes, specs, scoring.select, scoring.score.min_eigenvalues)


def _measure_range(
    score: Score,
    sweep: Sweep,
    context: Context,
    centres: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> Measurements:
    """Measures the matrices [low, high) of a sweep, or, for scores of gradients, all of them."""

    def one(w: jax.Array, centre: jax.Array) -> Measurement:
        assert score.of_weights is not None
        return measure(w, score.of_weights, centre=centre)

    if not score.needs_gradients:
        return sweep.run(context.params, centres, low, high, one)
    norms = _gradient_norms(sweep.parameters, context.gradients(), centres.dtype)
    if score.of_weights is not None:
        found = sweep.run(context.params, centres, low, high, one)
        norms = norms / (found.value + 1e-8)
    finite = jnp.isfinite(norms)
    yes = jnp.ones_like(finite)
    norms = jnp.where(finite, norms, 0)
    return Measurements(yes, norms, finite, centres, jnp.zeros_like(norms), yes)


def _gradient_norms(
    parameters: Sequence[MeasuredParameter],
    gradients: Mapping[str, Any],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """``[T]``: the Frobenius norm of the gradient of every chosen matrix; NaN where a gradient is missing."""
    norms = []
    for parameter in parameters:
        g = gradients.get(parameter.path)
        if g is None:
            norms.append(jnp.full(len(parameter.chosen), jnp.nan, dtype))
            continue
        axes = tuple(i for i in range(g.ndim) if i not in parameter.slice_axes)
        squares = jnp.sum(jnp.square(g.astype(dtype)), axis=axes)
        if inside_shard_map() and (names := tuple(n for n, _ in split_axes(parameter.spec))):
            squares = jax.lax.psum(squares, names)
        norms.append(jnp.sqrt(squares).reshape(-1)[jnp.asarray(parameter.chosen)])
    return jnp.concatenate(norms)


def _warn_if_none(
    settings: SpectralSettings,
    parameters: Sequence[MeasuredParameter],
    signatures: Mapping[str, axes_lib.Signature],
) -> None:
    select = settings.select
    if parameters or select.wanted is not None:
        return
    least = select.min_eigenvalues or settings.score.min_eigenvalues
    sizes = [min(s.fan_in, s.fan_out) for s in signatures.values() if s.role == "hidden"]
    if sizes:
        warnings.warn(
            f"no hidden matrix has min_eigenvalues={least} (the largest has {max(sizes)}), so every multiplier stays "
            "1. Lower the limit with select=spectra.hidden_matrices(min_eigenvalues=...).",
            stacklevel=4,
        )
