"""Every field of a config matters: changing it alone changes something that can be seen."""

import functools
import importlib.machinery
import json
import sys
import types

import jax
import numpy as np
import pytest

from models import vit
from tests.support import pictures, toy
from tests.support.runs import flags, losses, program, records, write_text
from tests.train.step.test_step import trajectory
from train import main
from train.cli import parse
from train.config.checks import check
from train.config.derived import FADING, derived
from train.config.fields import Config, Mesh, UserError, model_config
from train.config.tree import flatten, parts, replace
from train.data import images
from train.step import families, image_task, optimizer, replicas
from train.step import update as step
from train.step.optimizer import setting

# Another value, and what the base config needs for the field to be in use.
MODEL = {
    "model.preset": ("tiny", {}),
    "model.width": (36, {}),
    "model.mlp_width": (20, {}),
    "model.layers": (2, {}),
    "model.heads": (4, {"model.kv_heads": 2}),
    "model.kv_heads": (3, {}),
    "model.vocab_size": (300, {}),
    "model.tied": (True, {}),
    "model.rope_base": (500.0, {}),
    "model.positions": (40, {"model.preset": "gpt-toy", "data.length": 9}),
    "model.bias": (False, {"model.preset": "gpt-toy"}),
    "model.image_size": (8, {"model.preset": "vit-toy"}),
    "model.patch_size": (6, {"model.preset": "vit-toy"}),
    "model.drop_path": (0.3, {"model.preset": "vit-toy"}),
    "model.norm_eps": (1e-3, {}),
    "model.init_std": (0.1, {}),
    "width.base": (12, {"width.base": 13}),
    "width.base_head": (2, {"width.base": 12}),
    "model.dtype": ("bfloat16", {}),
    "model.attention": ("cudnn", {"model.dtype": "bfloat16"}),
    "model.remat": ("full", {}),
}
# Of whatever optimizer and decay is chosen.
SHARED = {
    "optimizer.learning_rate": (1e-3, {}),
    "optimizer.clip": (0.1, {"optimizer.eps": 1e-2}),
    "optimizer.schedule.name": ("linear", {}),
    "optimizer.schedule.steps": (20, {}),
    "optimizer.schedule.warmup_steps": (5, {}),
    "optimizer.schedule.final": (0.5, {}),
    "optimizer.spikes.sigma": (9.0, {"optimizer.spikes.sigma": 0.01, "optimizer.spikes.window": 4}),
    "optimizer.spikes.window": (64, {"optimizer.spikes.sigma": 0.01, "optimizer.spikes.window": 4}),
    "optimizer.name": ("lion", {}),
    "decay.name": ("l2", {}),
    "decay.spectrum.score": ("stable_rank", {"decay.spectrum.min_eigenvalues": 4}),
    "decay.spectrum.low": (0.1, {"decay.spectrum.min_eigenvalues": 4}),
    "decay.spectrum.high": (9.0, {"decay.spectrum.min_eigenvalues": 4}),
    "decay.spectrum.refresh_every": (2, {"decay.spectrum.min_eigenvalues": 4}),
    "decay.spectrum.min_eigenvalues": (4, {"decay.spectrum.score": "hill"}),
    "width.rule": ("constant", {"width.base": 2}),
}
# Of a choice alone: name of the choice, then field to value; a pair brings what the field needs.
SCHEDULES = {
    "cosine": {"steps": 20, "warmup_steps": 5, "final": 0.5},
    "linear": {"steps": 20, "warmup_steps": 5, "final": 0.5},
    "constant": {"warmup_steps": 5},
    "trapezoid": {
        "steps": (20, {"fall": 0.9, "warmup_steps": 1}),
        "warmup_steps": 3,
        "fall": (0.9, {"warmup_steps": 1}),
        "final": (0.5, {"fall": 0.9, "warmup_steps": 1}),
    },
}
MUON = {
    "momentum": 0.5,
    "momentum_form": "plain",
    "b1": 0.8,
    "b2": 0.9,
    "eps": 1e-2,
    "newton": "polar_express",
    "newton_steps": 3,
    "iteration": "bfloat16",
}
SHAPE_SCALE = {"shape_scale.name": "outputs_per_input"}
# A decay of hidden matrices would contradict the sphere.
SPHERE = {
    "sphere": (("hidden", "head"), {"decay.mask": ("embedding",)}),
    "per": "leaf",
    "radius": 0.3,
    "min_direction": 0.9,
    "angle": 2.0,
}
OPTIMIZERS = {
    "adam": {"b1": 0.8, "b2": 0.9, "eps": 1e-2},
    "nadam": {"b1": 0.8, "b2": 0.9, "eps": 1e-2},
    "lion": {"b1": 0.8, "b2": 0.9},
    "exadam": {"b1": 0.8, "b2": 0.9, "eps": 1e-2},
    "conda": {"b1": 0.8, "b2": 0.9, "eps": 1e-2, "refresh_every": 2, "scale": 1.0},
    "root": {"momentum": 0.5, "b1": 0.8, "b2": 0.9, "eps": 1e-2},
    "sophia": {
        "b1": 0.8,
        "b2": (0.9, {"refresh_every": 1}),
        "eps": (1.0, {"gamma": 5.0}),
        "refresh_every": 1,
        "gamma": (0.5, {"refresh_every": 1}),
    },
    "muon": MUON | SHAPE_SCALE,
    "normuon": {"output_memory": 0.5, **MUON, **SHAPE_SCALE},
    "adam_hyperball": {"b1": 0.8, "b2": 0.9, "eps": 1e-2, **SPHERE},
    "muon_hyperball": MUON | SPHERE,
    # Built where it can work, below.
    "one_bit_adam": {
        "b1": 0.8,
        "b2": 0.9,
        "eps": 1e-2,
        "freeze": "settled",
        "layout": "flat",
        "bias_correction": False,
        "largest_direction": 1e-3,
    },
}
STRENGTH = {
    "weight_decay": 0.5,
    "timescale": 1e4,  # or refused, by decays under which weights do not fade
    "coupling": "schedule",
    "mask": ("hidden",),
    "schedule.name": "to_zero",
}
THRESHOLD = {"threshold.name": "rms", "threshold.factor": 0.5}
DECAYS = {
    "huber": {"form": "proximal", **THRESHOLD, **STRENGTH},
    "pseudo_huber": {"form": "cautious", **THRESHOLD, **STRENGTH},
    "log_cosh": {"form": "cautious", **THRESHOLD, **STRENGTH},
    "fair": {"form": "proximal", **THRESHOLD, **STRENGTH},
    "l1": {"form": "proximal", **STRENGTH},
    "l2": {"form": "cautious", **STRENGTH},
    "lp": {"p": 1.2, "form": "cautious", **STRENGTH},
    "lp_proximal": {
        "p": 1.2,
        "linearize_at": ("new", {"weight_decay": 5.0}),
        **STRENGTH,
    },
    "elastic_net": {"l1_ratio": 0.1, "form": "proximal", **STRENGTH},
    "corrected": {
        "weight_decay": 0.5,
        "normalized": ("head",),
        "mask": ("hidden",),
        "form": "cautious",
    },
    "awd": {"memory": 0.9, "form": "cautious", **STRENGTH},
    "adadecay": {"sharpness": 1.0, "form": "cautious", **STRENGTH},
    "block_adadecay": {
        "refresh_every": (2, {"refresh_every": 1}),
        "sharpness": (1.0, {"refresh_every": 1}),
        "form": "cautious",
        **STRENGTH,
    },
    "stable": {"b2": 0.5, "form": "cautious", **STRENGTH},
    "target_norm": {"target": 0.5, "form": "cautious", **STRENGTH},
    "cpr": {
        "bound.name": ("uniform", {"bound.name": "dependent", "bound.factor": 0.5}),
        "measure": ("l1", {"bound.name": "uniform", "bound.size": 0.5}),
        "rate": (0.1, {"bound.name": "uniform", "bound.size": 0.5}),
        "scaled": (True, {"bound.name": "uniform", "bound.size": 0.5}),
        "mask": (("hidden",), {"bound.name": "uniform", "bound.size": 0.5}),
    },
    "hyperball": {"weight_decay": 0.5, "mask": ("head", "embedding"), **SPHERE},
    "radial_brake": {
        "outward": 0.1,
        "inward": 0.1,
        "rule": "first_order",
        "per": "leaf",
        "braked": (("hidden", "head"), {"weight_decay": 0.0}),
        "weight_decay": 0.5,
        "mask": ("hidden",),
    },
    "soda": {"start": 5.0, "mask": ("hidden",)},
    "toward_initial": {
        "weight_decay": 5.0,
        "coupling": "schedule",
        "form": ("cautious", {"weight_decay": 5.0}),
        "mask": ("hidden",),
    },
    "rotational": {
        "weight_decay": 0.5,
        "mask": ("head", "embedding"),
        "memory": 0.1,
        "zero_mean": False,
        "per_neuron": False,
    },
}
THRESHOLDS = {
    "mean": {"factor": 0.5},
    "rms": {"factor": 0.5},
    "running_mean": {"factor": 0.5, "memory": 0.5},
    "fixed": {"value": 0.1},
}
BOUNDS = {
    "inflection": {
        "after": (2, {"after": 1, "sample_every": 1}),
        "sample_every": (2, {"after": 1, "sample_every": 1}),
    },
    "warm_start": {"steps": (3, {"steps": 1})},
    "dependent": {"factor": 0.5},
    "uniform": {"size": 0.5},
}
SHAPE_SCALES = {"larger_side": {"factor": 0.1}, "outputs_per_input": {"at_least": 3.0}}
DECAY_SCHEDULES = {
    "constant": {},
    "to_zero": {"steps": 5, "shape": "linear"},
    "log_time": {"steps": 50},
    "hold_drop_ramp": {"steps": 5},
}
CHOICES = {
    "optimizer.schedule": SCHEDULES,
    "optimizer": {name: fields for name, fields in OPTIMIZERS.items() if name != "one_bit_adam"},
    "decay": DECAYS,
    "decay.threshold": THRESHOLDS,
    "decay.bound": BOUNDS,
    "decay.schedule": DECAY_SCHEDULES,
    "optimizer.shape_scale": SHAPE_SCALES,
}
# A choice that stands in parts of one kind: what makes the config hold such a part.
HOLDERS = {
    "decay.threshold": {"decay.name": "huber"},
    "decay.bound": {"decay.name": "cpr"},
    "decay.schedule": {"decay.name": "l2", "decay.coupling": "schedule"},
    "optimizer.shape_scale": {"optimizer.name": "muon"},
}
IMAGES = {
    "images.split": "train[:60%]",
    "images.workers": 2,  # changes no image
    "images.magnitude": 0.0,
    "images.erasing": 1.0,
    "images.mixup": 0.0,
    "images.cutmix": 0.0,
    # Seen elsewhere than in the first batch.
    "images.name": "imagenet2012",
    "images.folder": "absent",
    "images.held_out": "test[:5]",
    "images.smoothing": 0.0,
    "images.average": 0.9,
}
DATA = {
    "data.text": "other.txt",
    "data.tokenizer": "bpe-512",
    "data.length": 9,
    "data.documents": True,
    "data.batch_size": 6,
    "run.seed": 3,
}
MESH = {"mesh.replica": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
# Seen in what a run leaves behind, below.
RUN = {
    *("run.name", "run.folder", "run.steps", "run.micro_batches", "run.log_every"),
    *("run.eval_every", "run.eval_batches", "run.save_every", "run.keep", "run.tensorboard"),
    *("run.wandb", "run.keep_every", "run.migrate", "run.restart", "run.max_skipped", "data.cache"),
    "model.weights",  # tests/train/weights/test_hugging_face.py
    "run.deterministic",  # tests/train/test_determinism.py
}


def test_the_tables_hold_every_field():
    tables = [*MODEL, *SHARED, *DATA, *IMAGES, *MESH, *RUN]
    full = {"optimizer.spikes.sigma": 1.0, "decay.spectrum.low": 1.0, "width.base": 1}
    chosen = {
        f"{path}.{field}"
        for path, choices in CHOICES.items()
        for kind in choices.values()
        for field in kind
    }
    assert set(tables) | chosen >= set(flatten(replace(Config(), full)))
    assert len(set(tables)) == len(tables)


@pytest.mark.parametrize("path", CHOICES)
def test_the_tables_hold_every_field_of_every_choice(path):
    choices = CHOICES[path] | (
        {"one_bit_adam": OPTIMIZERS["one_bit_adam"]} if path == "optimizer" else {}
    )
    base = replace(Config(), HOLDERS.get(path, {}))
    (part,) = (p for p in parts(base) if p.path == path and p.slot.choice)
    assert sorted(choices) == sorted(part.slot.classes)
    for name, fields in choices.items():
        held = set(flatten(part.slot.classes[name]()))
        # Of parts inside, the tables above hold the fields.
        inner = ("threshold.", "bound.", "schedule.", "shape_scale.")
        held -= {field for field in held if field.startswith(inner)} | {"spectrum"}
        assert held <= set(fields), name
        names = {"threshold.name", "threshold.factor", "bound.name", "schedule.name"}
        assert set(fields) - held <= {*names, "shape_scale.name"}, name


def pair(name: str, value: object, needs: dict) -> tuple[Config, Config]:
    """Two valid configs that differ in one field."""
    base = derived(replace(Config(), {"model.preset": "toy", "run.steps": 10, **needs}))
    changed = derived(replace(base, {name: value}))
    check(base), check(changed)
    assert flatten(base)[name] != value
    return base, changed


@pytest.mark.parametrize("name", MODEL)
def test_fields_of_the_model(name):
    def seen(config: Config) -> tuple[str, ...]:
        model = model_config(config, 257)
        family = families.of(model)
        params = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
        if family is vit:
            task = image_task.Classifier(functools.partial(vit.forward, model), model.classes, 0.1)
            made = images.ImageBatches(
                "", [], [], ("", ""), 7, model.image_size, 4, 0, images.Recipe(), ""
            )
            batch = {
                name: jax.ShapeDtypeStruct(shape, np.uint32) for name, shape in made.shape.items()
            }
            return (
                str(
                    jax.make_jaxpr(
                        functools.partial(image_task.loss_and_gradient, task, micro_batches=1)
                    )(params, batch)
                ),
            )
        start = jax.make_jaxpr(functools.partial(family.init, model))(jax.random.key(0))
        loss = functools.partial(step.loss, functools.partial(family.forward, model))
        tokens = jax.ShapeDtypeStruct((2, 9), np.int32)
        return str(start), str(jax.make_jaxpr(jax.grad(loss))(params, tokens))

    base, changed = pair(name, *MODEL[name])
    before = seen(base)
    try:
        assert seen(changed) != before
    except RuntimeError as error:  # of the other kernel, where there is no GPU
        assert name == "model.attention" and "cudnn" in str(error).lower()


def differ(base: Config, changed: Config) -> None:
    """Asserts that some weight of the toy tree ends elsewhere."""
    # The first of the gradients that is larger than the four before it is the eighth.
    steps = 8 if base.optimizer.spikes or base.decay.name == "cpr" else 4
    before, after = (ends(config, steps) for config in (base, changed))
    assert any((before[path] != after[path]).any() for path in before)


@pytest.mark.parametrize("name", SHARED)
def test_fields_of_any_optimizer_and_decay(name):
    differ(*pair(name, *SHARED[name]))


@pytest.mark.parametrize(
    ("path", "choice"), [(path, choice) for path in CHOICES for choice in CHOICES[path]]
)
def test_fields_of_a_choice(path, choice):
    for field, value in CHOICES[path][choice].items():
        value, needs = (
            value if isinstance(value, tuple) and isinstance(value[-1], dict) else (value, {})
        )
        needs = {
            name if name.startswith("decay.") else f"{path}.{name}": other
            for name, other in needs.items()
        }
        chosen = HOLDERS.get(path, {}) | {f"{path}.name": choice}
        if f"{path}.{field}" == "decay.form":
            chosen |= {"decay.weight_decay": 3.0}
        if choice.endswith("_hyperball"):
            chosen |= {"decay.name": "l2", "decay.mask": ("embedding",)}
        if field == "timescale" and choice not in FADING:
            with pytest.raises(UserError, match=f"timescale = 10000 does not go with .*{choice}"):
                pair(f"{path}.{field}", value, chosen | needs)
            continue
        try:
            differ(*pair(f"{path}.{field}", value, chosen | needs))
        except AssertionError as error:
            raise AssertionError(f"--{path} {choice}: {field} = {value}") from error


@pytest.mark.parametrize("name", OPTIMIZERS["one_bit_adam"])
def test_fields_of_one_bit_adam(name):
    params = toy.nest(toy.flat_params())

    def seen(config: Config) -> str:
        mesh = main.sharding.make_mesh(Mesh(replica=2, data=1), 8)
        split = main.sharding.of_parameters(toy.AXES, params, mesh)
        tx = config.optimizer.direction.build(setting(config, toy.AXES, params=split))
        state = jax.eval_shape(tx.init, params)
        placed = replicas.place_errors(
            main.sharding.of_state(state, params, split, mesh), state, split
        )
        step = lambda state, g: tx.update(jax.tree.map(lambda x: x[0], g), state)
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
        return str(jax.make_jaxpr(replicas.on_each(step, placed, (None, placed)))(state, own))

    value = OPTIMIZERS["one_bit_adam"][name]
    base, changed = pair(f"optimizer.{name}", value, {"optimizer.name": "one_bit_adam"})
    assert seen(base) != seen(changed)


@functools.lru_cache
def ends(config: Config, steps: int) -> dict[str, np.ndarray]:
    return trajectory(optimizer.build(config, toy.AXES), steps)


def test_fields_of_the_data(tmp_path):
    text, other = write_text(tmp_path), tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    fixed = {"data.text": str(text), "data.tokenizer": "bytes", "data.length": 12}
    base = replace(Config(), {**fixed, "data.cache": str(tmp_path / "cache")})
    before = main.read_data(base)
    for name, value in DATA.items():
        value = str(other) if name == "data.text" else value
        after = main.read_data(replace(base, {name: value}))
        assert not np.array_equal(after.batch(0), before.batch(0)), name
    assert any((tmp_path / "cache").iterdir())


def test_fields_of_the_images(tmp_path):
    base = parse(pictures.flags(tmp_path))
    before, shapes = (main.read_data(base), [])
    for name, value in IMAGES.items():
        changed = replace(base, {name: value})
        if name in ("images.name", "images.folder"):
            with pytest.raises(UserError, match=f"(?s){value}.*--images.folder"):
                main.read_data(changed)
        elif name == "images.held_out":
            assert len(main.read_data(changed).held) == 5 != len(before.held)
        elif name == "images.workers":
            made = main.read_data(changed)
            assert len(made._make.__self__.pids) == 2
            assert (made.batch(0)["image"] == before.batch(0)["image"]).all()
        elif name in ("images.smoothing", "images.average"):
            shapes.append(main.assemble(changed, before))
        else:
            pairs = [
                [made.batch(i) for i in range(4)] for made in (before, main.read_data(changed))
            ]
            assert any((a[k] != b[k]).any() for a, b in zip(*pairs) for k in a), name
    smooth, average = shapes
    assert "average" in average.program.shapes and "average" not in smooth.program.shapes
    whole = main.assemble(base, before)
    traced = [
        str(jax.make_jaxpr(r.program.update)(r.program.shapes, r.batch(0))) for r in (whole, smooth)
    ]
    assert traced[0] != traced[1]


@pytest.mark.parametrize("name", MESH)
def test_fields_of_the_mesh(name):
    base = Config().mesh
    shapes = [
        dict(main.sharding.make_mesh(mesh, 8).shape)
        for mesh in (base, replace(Config(), {name: MESH[name]}).mesh)
    ]
    axis = name.split(".")[1]
    assert shapes[1][axis] == MESH[name] != shapes[0][axis]


def test_fields_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged = fake_wandb(monkeypatch)
    changed = (
        "--run.name other --run.folder None --run.steps 5 --run.micro_batches 2 --run.log_every 2"
        " --run.eval_every 3 --run.eval_batches 1 --run.save_every 1 --run.keep 2 --run.keep_every 2"
        " --run.tensorboard True --run.wandb project"
    )
    assert main.main(flags(tmp_path, *changed.split())) == 0
    run = tmp_path / "runs/other-001"
    assert list(losses(run)) == [2, 4, 5]  # log_every, and always the last
    held_out = [r for r in records(run) if r["kind"] == "held_out"]
    assert [r["step"] for r in held_out] == [0, 3, 5]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert list((run / "tensorboard").iterdir())
    assert any((tmp_path / "cache").iterdir())  # data.cache
    # eval_batches: other text gives another loss, by the same weights.
    plain = flags(tmp_path, "--run.steps", "1")
    assert main.main(plain) == 0
    assert (tmp_path / "run").is_dir()  # folder
    first = next(r for r in records(tmp_path / "run") if r["kind"] == "held_out")
    assert first["step"] == held_out[0]["step"] == 0
    assert first["loss"] != held_out[0]["loss"]
    assert not (tmp_path / "run/tensorboard").exists()
    # wandb gets what metrics.jsonl has.
    by_step = {r["step"]: r["loss"] for r in held_out}
    assert {s: v["held_out/loss"] for s, v in logged if "held_out/loss" in v} == by_step
    assert json.loads((run / "config.json").read_text())["run"]["wandb"] == "project"
    assert (run / "wandb_id").read_text() == "id-1\n"


def fake_wandb(monkeypatch) -> list[tuple[int, dict]]:
    logged: list[tuple[int, dict]] = []
    run = types.SimpleNamespace(
        id="id-1", log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **options: run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return logged


def test_micro_batches_change_the_program(tmp_path):
    one, two = (program(tmp_path, "--run.micro_batches", n) for n in ("1", "2"))
    texts = [
        str(r.program.update.lower(r.program.placed_shapes(), r.batch(0)).as_text())
        for r in (one, two)
    ]
    assert texts[0] != texts[1]
