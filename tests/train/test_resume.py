"""Every optimizer of the program: stopped, restored by a new program, and continued is never having stopped."""

import jax
import numpy as np
import optax
import pytest

from optax_decay.axes import leaf_paths
from tests.support.runs import program
from train.cli import parse
from train.config.fields import Config
from train.run.checkpoints import Checkpoints, describe
from train.step import optimizer

BETAS = ("--optimizer.b1", "0.9", "--optimizer.b2", "0.999")

# The stop lies between two refreshes of whatever an optimizer renews now and then, and further ones follow.
STOP, STEPS = 3, 6
OPTIMIZERS = {
    "adam": [],
    "adam, threshold in the state": ["--decay.threshold", "running_mean"],
    "AlphaDecay": [
        *("--decay.spectrum.score", "hill", "--decay.spectrum.refresh_every", "2"),
        *("--decay.spectrum.min_eigenvalues", "2"),
    ],
    "nadam": ["--optimizer.name", "nadam"],
    "lion": ["--optimizer.name", "lion"],
    "exadam": ["--optimizer.name", "exadam"],
    "conda": ["--optimizer.name", "conda", "--optimizer.refresh_every", "2"],
    "root": ["--optimizer.name", "root"],
    "sophia": ["--optimizer.name", "sophia", "--optimizer.refresh_every", "2"],
    "muon": ["--optimizer.name", "muon", "--decay.schedule", "to_zero"],
    "normuon": ["--optimizer.name", "normuon"],
    "adam_hyperball": ["--optimizer.name", "adam_hyperball", "--decay.mask", "head"],
    "muon_hyperball": ["--optimizer.name", "muon_hyperball", "--decay.mask", "head"],
    "hyperball": ["--optimizer.name", "lion", "--decay.name", "hyperball"],
    "radial brake": ["--decay.name", "radial_brake"],
    "SODA": ["--decay.name", "soda"],
    "L2-SP": ["--decay.name", "toward_initial"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bitwise(name, tmp_path):
    flags = ["--run.steps", str(STEPS), "--model.layers", "1", *OPTIMIZERS[name]]

    def steps(ready, state, start, stop):
        for index in range(start, stop):
            state, _ = ready.program.update(state, ready.batch(index))
        return state

    ready = program(tmp_path, *flags)
    key = jax.random.key(0)
    whole = jax.device_get(steps(ready, ready.program.init(key), 0, STEPS))
    half = steps(ready, ready.program.init(key), 0, STOP)
    meta = describe(Config(), "text", ready.program.shapes)
    before = jax.device_get(half)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(half, meta, STOP)
        checkpoints.wait()

    other = program(tmp_path, *flags)
    assert other is not ready
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        found, at = checkpoints.restore(other.program.placed_shapes(), meta, print) or (None, 0)
    assert at == STOP
    continued = jax.device_get(steps(other, found, STOP, STEPS))

    jax.tree.map(np.testing.assert_array_equal, continued, whole)
    # The steps after the stop did something to the weights and to the optimizer's own arrays.
    for part in ("params", "optimizer"):
        moved = [
            np.any(np.asarray(a) != np.asarray(b))
            for a, b in zip(jax.tree.leaves(before[part]), jax.tree.leaves(continued[part]))
        ]
        assert np.mean(moved) > 0.5


def test_nadam_is_adam_with_nesterovs_momentum():
    w = {"w": np.array([0.3, -2.0, 1e-3], np.float32)}
    found = {}
    for name, reference in (("nadam", optax.nadam(-1.0)), ("adam", optax.adam(-1.0))):
        config = parse(["--optimizer.name", name, *BETAS])
        ours = config.optimizer.direction.build(optimizer.setting(config, None))
        state, right = ours.init(w), reference.init(w)
        for scale in (1.0, -3.0, 0.5):
            gradient = {"w": scale * w["w"]}
            found[name], state = ours.update(gradient, state, w)
            expected, right = reference.update(gradient, right, w)
            np.testing.assert_array_equal(found[name]["w"], expected["w"])
    assert np.abs(found["adam"]["w"] - found["nadam"]["w"]).min() > 0.1


@pytest.mark.parametrize("mode", ["auto", "one device"])
def test_radii_survive_another_mesh(mode, tmp_path):
    """Saved on one device (or on eight), continued on eight (or on one): to the last bit, and still on the sphere."""
    flags = [
        "--run.steps",
        str(STEPS),
        "--optimizer.name",
        "muon_hyperball",
        "--decay.mask",
        "head",
    ]
    split = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    first, second = ([], split) if mode == "auto" else (split, [])
    ready = program(tmp_path, *flags, *first)
    state = ready.program.init(jax.random.key(0))
    start = norms_of(state)
    for index in range(STOP):
        state, _ = ready.program.update(state, ready.batch(index))
    radii = jax.device_get(state["optimizer"].inner_state["sphere"].radius)
    meta = describe(Config(), "text", ready.program.shapes)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(state, meta, STOP)
        checkpoints.wait()

    other = program(tmp_path, *flags, *second)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        found, _ = checkpoints.restore(other.program.placed_shapes(), meta, print) or (None, 0)
    assert found is not None
    for index in range(STOP, STEPS):
        found, _ = other.program.update(found, other.batch(index))
    after = jax.device_get(found["optimizer"].inner_state["sphere"].radius)
    assert len(after) == 7
    for path, radius in after.items():
        assert radius.shape == (2,)  # one sphere per layer and matrix
        np.testing.assert_array_equal(radius, radii[path])
        np.testing.assert_allclose(norms_of(found)[path], radius, rtol=2e-6)
        np.testing.assert_allclose(start[path], radius, rtol=1e-6)


def norms_of(state):
    """Norms of the matrices of every layer, in float64."""
    found = {}
    for path, w in zip(leaf_paths(state["params"]), jax.tree.leaves(state["params"])):
        if path.startswith("blocks/") and w.ndim > 2:
            x = np.asarray(jax.device_get(w), np.float64)
            found[path] = np.sqrt(np.sum(x * x, axis=tuple(range(1, x.ndim))))
    return found
