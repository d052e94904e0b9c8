"""The one description of a run: the same on any mesh, with axes parsed once, and no optimizer known by name."""

import dataclasses
import pathlib
import re

import jax
import optax
import pytest

import optax_decay
from optax_decay.parameters import axes
from tests.support.runs import flags, program
from train.cli import parse
from train.config.fields import UserError
from train.step import program as description
from train.step import replicas, sharding, tasks, update

STEP = pathlib.Path(update.__file__).parent
SOPHIA = ("--optimizer.name", "sophia")
WORKERS = ("--optimizer.name", "one_bit_adam", "--optimizer.clip", "None", "--mesh.replica", "2")


def test_axes_are_parsed_once_per_parameter(tmp_path, monkeypatch):
    parsed, plain = [], axes.parse

    def parse_and_count(text, path, *rest, **more):
        parsed.append(path)
        return plain(text, path, *rest, **more)

    monkeypatch.setattr(axes, "parse", parse_and_count)
    run = program(
        tmp_path, "--decay.spectrum.score", "hill", "--decay.spectrum.min_eigenvalues", "2"
    )
    paths = [s.path for s in jax.tree.leaves(run.program.axes)]
    assert sorted(parsed) == sorted(paths) and len(paths) == 12
    # Nor does what comes afterwards parse any: the step, what is observed, the state.
    batch = run.batch(0)
    run.program.update.trace(run.program.placed_shapes(), batch)
    state = run.program.init(jax.random.key(0))
    assert run.program.observed(state, batch)
    assert len(parsed) == len(paths)


def test_a_mesh_without_devices_gives_the_same_description(tmp_path):
    asked = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    real = program(tmp_path, *asked).program
    config = tasks.complete(parse(flags(tmp_path, *asked)), 257)
    mesh = sharding.abstract_mesh(config.mesh, description.sequences(config), 8)
    planned = description.describe(config, mesh)
    assert isinstance(planned.mesh, jax.sharding.AbstractMesh) and planned.config == real.config
    assert planned.shapes == real.shapes and planned.axes == real.axes
    specs = [jax.tree.map(lambda s: s.spec, p.shardings) for p in (planned, real)]
    assert specs[0] == specs[1]
    assert "fsdp" in str(specs[0])


def test_a_batch_is_described_as_it_is_made(tmp_path):
    run = program(tmp_path)
    made, shape = run.batch(0), run.program.placed_batch()
    assert (made.shape, made.dtype, made.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_a_config_is_completed_with_what_the_data_knows(tmp_path):
    config = parse(flags(tmp_path))
    assert config.model.vocab_size is None
    assert tasks.complete(config, 257).model.vocab_size == 257
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    assert tasks.complete(wider, 257).model.vocab_size == 300
    with pytest.raises(UserError, match="smaller than the tokenizer's 301 tokens; nearest: 301"):
        tasks.complete(wider, 301)


@pytest.mark.parametrize(
    ("more", "curvature", "workers"), [((), 0, False), (SOPHIA, 1, False), (WORKERS, 0, True)]
)
def test_an_optimizer_gets_what_it_declares(tmp_path, monkeypatch, more, curvature, workers):
    built, plain = [], optax_decay.curvature.gnb_hessian

    def counted(*arguments, **options):
        built.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(optax_decay.curvature, "gnb_hessian", counted)
    run = program(tmp_path, *more)
    described = run.program
    assert description.needs_curvature(described.config) == bool(curvature)
    assert replicas.used(described.config) == workers
    text = str(described.update.trace(described.placed_shapes(), run.batch(0)).jaxpr)
    assert len(built) == curvature
    assert ("shard_map" in text) == workers


def test_a_curvature_that_is_not_declared_is_missed():
    params = {"w": jax.numpy.ones((2, 3))}
    tx = optax.with_extra_args_support(optax_decay.scale_by_sophia())
    state = update.first_state(params, tx)
    with pytest.raises(ValueError, match="needs curvature"):
        update.advance(tx, lambda step: 0.1, state, jax.numpy.float32(1.0), params)


def test_the_step_knows_no_optimizer_by_name():
    for path in STEP.glob("*.py"):
        if path.name == "optimizer.py":
            continue
        lines = [
            line for line in path.read_text().splitlines() if re.search("(?i)one_?bit|sophia", line)
        ]
        # The library's tools for states with workers are a namespace of that name.
        named = [line for line in lines if not line.startswith("from optax_decay.one_bit import ")]
        assert not named, path.name
