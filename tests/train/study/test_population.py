"""A population is its members alone, whatever the arm; its conditions stay conditions; its devices exchange nothing."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from models import embedding, layers, loss, products
from tests.cases import CASES
from tests.support import toy
from tests.support.runs import write_text
from train.data import batches
from train.study import population as engine
from train.study import results
from train.study.compare.arms import ARMS, after_adam, directed
from train.study.compare.runs import program
from train.study.population import Member, member_axes, population, recorded, side_by_side
from train.study.small_runs import SmallProgram, SmallTask, numbers

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=4
)
STEPS = 10
NAMED = ("adamw", "awd", "conda", "sophia")
MEMBERS = [Member(eta, lam, seed) for seed in (3, 8) for eta, lam in ((0.004, 0.0), (0.03, 2.0))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text"))
    return batches.load_text(str(text), "bytes", length=12, batch_size=4, seed=0)


def trained(small, data, members=MEMBERS, **options):
    return list(population(small, members, data, STEPS, **options))


@pytest.mark.parametrize("arm", NAMED)
def test_members_side_by_side_are_members_alone(data, arm):
    """On eight devices, five members: three places repeat the last one."""
    small = program(TINY, arm, data.vocab_size)
    members = [*MEMBERS, Member(0.03, 2.0, 5)]
    found = trained(small, data, members, together=True)
    alone = trained(small, data, members)  # CPUs train one after the other
    assert not engine.side_by_side_here()
    for one, other in zip(found, alone, strict=True):
        assert one.member == other.member
        # The same float32 arithmetic up to fusion and batching; ten steps amplify roundings little.
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert len({one.loss for one in found}) == 5 and found[0].losses.shape == (STEPS,)


OTHERS = [name for name, row in ARMS.items() if row.workers == 1 and name not in NAMED]


@pytest.mark.parametrize("arm", OTHERS)
def test_every_arm_is_itself_in_a_population(data, arm):
    """In fewer steps, since every arm is two programs to compile."""
    small, members = program(TINY, arm, data.vocab_size), MEMBERS[1:3]
    together = population(small, members, data, 4, together=True, devices=jax.devices()[:1])
    for one, other in zip(together, population(small, members, data, 4), strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)


def test_a_seed_decides_weights_and_text_and_all_arms_share_it(data):
    """The first loss depends on nothing else: not on the point, not on the optimizer."""
    first = {
        arm: [out.losses[0] for out in trained(program(TINY, arm, data.vocab_size), data)]
        for arm in ("adamw", "conda")
    }
    same_seed, other_seed = first["adamw"][:2], first["adamw"][2:]
    assert same_seed[0] == same_seed[1] != other_seed[0]
    np.testing.assert_allclose(first["conda"], first["adamw"], rtol=1e-6)


def test_a_member_that_diverges_harms_no_other(data):
    small = program(TINY, "adamw", data.vocab_size)
    wild = [MEMBERS[0], Member(1e30, 1e30, 1), *MEMBERS[2:]]
    sane = [MEMBERS[0], Member(0.01, 0.1, 1), *MEMBERS[2:]]
    one = jax.devices()[:1]
    found, usual = (trained(small, data, m, together=True, devices=one) for m in (wild, sane))
    assert found[1].loss == math.inf and math.isfinite(usual[1].loss)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(found[i].losses, usual[i].losses)
        assert found[i].loss == usual[i].loss


def wide_enough(data, build):
    """Matrices with so many eigenvalues that AlphaDecay measures them."""
    task = dataclasses.replace(TINY, width=64, mlp_width=72, heads=4)
    return SmallProgram(task, task.model(data.vocab_size), build)


SPECTRAL = {
    "alphadecay": after_adam(
        lambda s: optax_decay.spectral_alpha_decay(
            s.weight_decay,
            refresh=optax_decay.spectra.all_at_once(5),
            mask=("hidden", "head"),
            axes=s.axes,
        )
    ),
    "conda": directed(lambda s: optax_decay.scale_by_conda(refresh_every=5, axes=s.axes)),
}


def computations(text):
    """Lines of every computation of a compiled program, by name."""
    found, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def below(names, inside):
    """Names of computations, and of all that they call."""
    done, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in done:
            done.add(name)
            waiting += [
                c for line in inside[name] for c in re.findall(r"%([\w.\-]+)", line) if c in inside
            ]
    return done


def decompositions(small, data):
    """Computations of a compiled population that hold a decomposition, and those that run under a condition."""
    one = tuple(jax.devices()[:1])
    text = engine.advance_program(small, 2, data.shape, STEPS, one).compile().as_text()
    inside = computations(text)
    branches = {
        name
        for lines in inside.values()
        for line in lines
        if " conditional(" in line
        for name in re.findall(r"%([\w.\-]+)", line.split("computation", 1)[1])
        if name in inside
    }
    hard = re.compile(r'custom_call_target="[^"]*(syevd|sytrd|gesdd|gesvd|geqrf|potrf)')
    where = {name for name, lines in inside.items() for line in lines if hard.search(line)}
    return where, below(branches, inside)


@pytest.mark.parametrize("arm", SPECTRAL)
def test_spectra_and_bases_are_computed_when_due_and_not_in_every_step(data, arm):
    """Decompositions of the compiled program all stand in branches of conditionals."""
    where, conditional = decompositions(wide_enough(data, SPECTRAL[arm]), data)
    assert where and where <= conditional


def test_counters_with_an_axis_of_members_would_lose_the_condition(data, monkeypatch):
    """The check above finds it, and the losses would be the same."""
    small = wide_enough(data, directed(lambda s: optax_decay.scale_by_conda(axes=s.axes)))
    one = {"together": True, "devices": jax.devices()[:1]}
    shared = trained(small, data, MEMBERS[:2], **one)
    monkeypatch.setattr(engine, "COUNTERS", frozenset())
    side_by_side.cache_clear()
    where, conditional = decompositions(small, data)
    assert where and not where <= conditional
    mapped = trained(small, data, MEMBERS[:2], **one)
    side_by_side.cache_clear()
    for a, b in zip(shared, mapped, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)


def test_devices_exchange_nothing(data):
    small = program(TINY, "adamw", data.vocab_size)
    lowered = engine.advance_program(small, 8, data.shape, STEPS, tuple(jax.devices()))
    text = lowered.compile().as_text()
    assert "num_partitions=8" in text
    exchanges = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(exchanges, text)


def test_as_many_members_at_once_as_memory_allows(data, monkeypatch):
    """Planned from the figure of the compiled program, and the losses stay those of one group."""
    small, one = program(TINY, "adamw", data.vocab_size), tuple(jax.devices()[:1])
    three, four = (engine.bytes_needed(small, n, data, STEPS, one) for n in (3, 4))
    assert three < four
    assert engine.planned(small, 4, data, STEPS, one, four) == 4
    assert engine.planned(small, 4, data, STEPS, one, four - 1) == 2  # two rounds, not 3 and 1
    assert engine.planned(small, 5, data, STEPS, one, three) == 3
    assert engine.planned(small, 4, data, STEPS, one, 1) == 1
    groups, plain = [], engine._group
    monkeypatch.setattr(engine, "_group", lambda *a: groups.append(len(a[1])) or plain(*a))
    found = trained(small, data, together=True, devices=one, memory=four - 1)
    whole = trained(small, data, together=True, devices=one)
    assert groups == [2, 2, 4]
    for a, b in zip(found, whole, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert engine.free_memory(one[0]) > 2**20


def test_planning_compiles_two_programs_and_training_takes_the_second(data):
    """On a GPU, compiling a population takes as long as training it for hundreds of steps."""
    small, one = program(TINY, "adamw", data.vocab_size), tuple(jax.devices()[:1])
    limit = engine.bytes_needed(small, 4, data, STEPS, one) - 1
    side_by_side.cache_clear()
    compiled = []

    def note(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        found = trained(small, data, together=True, devices=one, memory=limit)
        assert (
            len(found) == 4 and compiled.count("jit(advance)") == 3
        )  # and that of the last, shorter chunk
        trained(small, data, together=True, devices=one, memory=limit)
        assert compiled.count("jit(advance)") == 3
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_members_train_where_they_are_told_to(data):
    """Also on one device that is not the usual one."""
    device = jax.devices()[3]
    runs = side_by_side(program(TINY, "adamw", data.vocab_size), (device,))
    state = runs.init(numbers([0.01] * 2, [0.1] * 2, STEPS, [0, 1]))
    assert all(x.devices() == {device} for x in jax.tree.leaves(state))
    held_out = jnp.asarray(np.stack(data.held_out(1)))
    assert runs.held_out_loss(state, held_out).devices() == {device}


def test_on_a_gpu_no_gradient_is_scattered_and_maps_are_joined(data, monkeypatch):
    """Traced for a GPU, the program of a population adds to no row twice and has one product for each input.

    Products forward: query with key and value, attention's two, out, gate with up, down, head. Backward: two for each
    of them, and one for the embedding.
    """

    def products_and_scatters():
        small = program(TINY, "adamw", data.vocab_size)
        side_by_side.cache_clear()
        lowered = engine.advance_program(small, 3, data.shape, 4, tuple(jax.devices()[:1]))
        text = lowered.as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.scatter")

    here = products_and_scatters()
    for module in (products, layers, loss, embedding):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    jax.clear_caches()
    there = products_and_scatters()
    assert there == (3 * 7 + 1, 0)
    assert here[0] > there[0] and here[1] > 0
    side_by_side.cache_clear()
    jax.clear_caches()


def test_results_are_lines_and_only_what_is_missing_is_trained(tmp_path):
    path, asked = tmp_path / "results.jsonl", []

    def run(members):
        asked.append(list(members))
        for member in members:
            yield engine.Outcome(member, 2.5 + member.seed, np.zeros(3), None, 0.1)

    kept = recorded(path, [], MEMBERS, run)
    assert next(kept)["loss"] == 5.5
    assert len(results.read(path)) == 1  # it is written before the next member is trained
    kept.close()
    with path.open("a") as file:
        file.write('{"learning_rate": 0.0')  # killed while it wrote a line
    assert not list(recorded(path, [], MEMBERS, lambda members: iter(())))
    again = list(recorded(path, results.read(path), MEMBERS, run))
    assert [Member(r["learning_rate"], r["weight_decay"], r["seed"]) for r in again] == MEMBERS
    assert asked[1] == MEMBERS[1:] and results.read(path) == again


def test_members_that_ended_together_are_all_written_before_it_stops(data, tmp_path):
    small, one = program(TINY, "adamw", data.vocab_size), jax.devices()[:1]

    def run(members):
        return population(
            small, members, data, 4, together=True, devices=one, places=2, memory=1 << 40
        )

    def pairs(members):
        for i in range(0, len(members), 2):
            yield from run(members[i : i + 2])

    path = tmp_path / "results.jsonl"
    found = list(recorded(path, [], MEMBERS, pairs, lambda: True))
    assert len(found) == 2 and results.read(path) == found


def test_calls_share_a_program_of_so_many_places(data, monkeypatch):
    sizes, plain = [], engine._group
    monkeypatch.setattr(engine, "_group", lambda *a: sizes.append(a[2]) or plain(*a))
    small, options = program(TINY, "adamw", data.vocab_size), {"together": True, "places": 3}
    one = jax.devices()[:1]
    (alone,) = trained(small, data, MEMBERS[:1], devices=one, **options)
    three = trained(small, data, MEMBERS[:3], devices=one, **options)
    assert sizes == [3, 3] and alone.loss == three[0].loss


def test_what_is_seen_of_the_weights_is_each_members_own(data):
    small = program(TINY, "adamw", data.vocab_size)

    def look(state):
        return optax.tree.norm(state["params"])

    together, alone = (
        [out.seen for out in trained(small, data, together=t, look=look)] for t in (True, None)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert len(np.unique(np.round(alone, 4))) == 4


def test_simulated_workers_run_one_at_a_time(data):
    small = program(TINY, "one_bit_adam", data.vocab_size)
    with pytest.raises(ValueError, match="one at a time"):
        side_by_side(small, tuple(jax.devices()))
    assert len(trained(small, data, MEMBERS[:1], together=True)) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_row_of_the_contract_is_itself_in_a_population(case):
    """Learning rates and decays are mapped, counters are shared: two members agree with each of them alone."""
    tuned = [n for n in ("learning_rate", "weight_decay") if n in case.numbers]
    settings = [
        {n: jnp.float32(x * case.numbers[n]) for n in tuned} | {"seed": seed}
        for x, seed in ((1.0, 0), (0.7, 3))
    ]

    def step(numbers, weights, state, gradient):
        tx = case.build(**{n: numbers[n] for n in tuned})
        extra = case.extra(weights, gradient) if case.extra else {}
        updates, state = tx.update(gradient, state, weights, **extra)
        return optax.apply_updates(weights, updates), state

    def first(numbers, weights):
        return case.build(**{n: numbers[n] for n in tuned}).init(weights)

    weights = [toy.params(seed=own.pop("seed")) for own in settings]
    both = lambda a, b: jax.tree.map(lambda *x: jnp.stack(x), a, b)
    numbers, members = both(*settings), both(*weights)
    axes = member_axes(jax.eval_shape(first, settings[0], weights[0]))
    states = jax.vmap(first, out_axes=axes)(numbers, members)
    side = jax.jit(jax.vmap(step, (0, 0, axes, None), (0, axes)))
    alone = jax.jit(step)
    each = [(w, first(own, w)) for own, w in zip(settings, weights)]
    for gradient in toy.gradients(case.steps):
        members, states = side(numbers, members, states, gradient)
        each = [alone(own, *one, gradient) for own, one in zip(settings, each)]
    for i, (w, _) in enumerate(each):
        for x, y in zip(jax.tree.leaves(members), jax.tree.leaves(w), strict=True):
            # As in the contract's own check of mapped numbers.
            assert float(jnp.abs(x[i] - y).max()) <= 5e-5
