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
from tests.train.step.test_step import chain, trajectory
from train import main
from train.cli import check, parse
from train.config.fields import Config, Mesh, UserError, flatten, model_config, replace, resolved
from train.data import images
from train.step import families, image_task, replicas
from train.step import update as step
from train.step.optimizer import one_bit

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
    "model.base_width": (12, {}),
    "model.base_head_width": (2, {"model.base_width": 12}),
    "model.dtype": ("bfloat16", {}),
    "model.attention": ("cudnn", {"model.dtype": "bfloat16"}),
    "model.remat": ("full", {}),
}
CHAIN = {
    "optimizer.name": ("lion", {}),
    "optimizer.learning_rate": (1e-3, {}),
    "optimizer.schedule": ("linear", {}),
    "optimizer.schedule_steps": (20, {}),
    "optimizer.warmup_steps": (5, {}),
    "optimizer.final": (0.5, {}),
    "optimizer.b1": (0.8, {}),
    "optimizer.b2": (0.9, {}),
    "optimizer.eps": (1e-2, {}),
    "optimizer.momentum": (0.5, {"optimizer.name": "root"}),
    "optimizer.refresh_every": (2, {"optimizer.name": "conda"}),
    "optimizer.scale": (1.0, {"optimizer.name": "conda"}),
    "optimizer.gamma": (0.5, {"optimizer.name": "sophia", "optimizer.refresh_every": 1}),
    "optimizer.clip": (0.1, {"optimizer.eps": 1e-2}),
    "optimizer.spike_sigma": (9.0, {"optimizer.spike_sigma": 0.01, "optimizer.spike_window": 4}),
    "optimizer.spike_window": (64, {"optimizer.spike_sigma": 0.01, "optimizer.spike_window": 4}),
    "decay.weight_decay": (0.5, {}),
    "decay.pull": ("l2", {}),
    "decay.threshold": (0.05, {}),
    "decay.factor": (1.0, {}),
    "decay.memory": (0.5, {"decay.threshold": "ema"}),
    "decay.cautious": (True, {}),
    "decay.proximal": (True, {}),
    "decay.coupling": ("schedule", {}),
    "decay.mask": (("hidden",), {}),
    "decay.spectral": ("stable_rank", {"decay.spectral": "alpha", "decay.spectral_size": 4}),
    "decay.spectral_low": (0.1, {"decay.spectral": "alpha", "decay.spectral_size": 4}),
    "decay.spectral_high": (9.0, {"decay.spectral": "alpha", "decay.spectral_size": 4}),
    "decay.spectral_every": (2, {"decay.spectral": "alpha", "decay.spectral_size": 4}),
    "decay.spectral_size": (4, {"decay.spectral": "alpha"}),
    "decay.width_rule": ("constant", {"model.base_width": 2}),
}
IMAGES = {
    "images.split": "train[:60%]",
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
ONE_BIT = {
    "optimizer.freeze": ("settled", {"optimizer.name": "one_bit_adam"}),
    "optimizer.layout": ("flat", {"optimizer.name": "one_bit_adam"}),
    "optimizer.bias_correction": (False, {"optimizer.name": "one_bit_adam"}),
    "optimizer.largest_direction": (1e-3, {"optimizer.name": "one_bit_adam"}),
}
MESH = {"mesh.replica": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
# Seen in what a run leaves behind, below.
RUN = {
    *("run.name", "run.folder", "run.steps", "run.micro_batches", "run.log_every"),
    *("run.eval_every", "run.eval_batches", "run.save_every", "run.keep", "run.tensorboard"),
    *("run.wandb", "run.keep_every", "run.migrate", "run.max_skipped", "data.cache"),
    "model.weights",  # tests/train/weights/test_hugging_face.py
}


def test_the_tables_hold_every_field():
    tables = [*MODEL, *CHAIN, *ONE_BIT, *DATA, *IMAGES, *MESH, *RUN]
    assert sorted(tables) == sorted(flatten(Config()))


def pair(name: str, value: object, needs: dict) -> tuple[Config, Config]:
    """Two valid configs that differ in one field."""
    base = replace(Config(), {"model.preset": "toy", "run.steps": 10, **needs})
    changed = replace(base, {name: value})
    check(base), check(changed)
    assert flatten(resolved(base))[name] != value
    return resolved(base), resolved(changed)


@pytest.mark.parametrize("name", MODEL)
def test_fields_of_the_model(name):
    def seen(config: Config) -> tuple[str, ...]:
        model = model_config(config, 257)
        family = families.of(model)
        params = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
        if family is vit:
            task = image_task.Task(functools.partial(vit.forward, model), model.classes, 0.1)
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


@pytest.mark.parametrize("name", CHAIN)
def test_fields_of_the_optimizer_and_the_decay(name):
    base, changed = pair(name, *CHAIN[name])
    # The first of the gradients that is larger than the four before it is the eighth.
    steps = 8 if base.optimizer.spike_sigma else 4
    before, after = (trajectory(built(config), steps) for config in (base, changed))
    assert any((before[path] != after[path]).any() for path in before)


@pytest.mark.parametrize("name", ONE_BIT)
def test_fields_of_one_bit_adam(name):
    params = toy.nest(toy.flat_params())

    def seen(config: Config) -> str:
        mesh = main.sharding.make_mesh(Mesh(replica=2, data=1), 8)
        split = main.sharding.of_parameters(toy.AXES, params, mesh)
        tx = one_bit(config.optimizer, toy.AXES, split)
        state = jax.eval_shape(tx.init, params)
        placed = replicas.place_errors(
            main.sharding.of_state(state, params, split, mesh), state, split
        )
        step = lambda state, g: tx.update(jax.tree.map(lambda x: x[0], g), state)
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
        return str(jax.make_jaxpr(replicas.on_each(step, placed, (None, placed)))(state, own))

    base, changed = pair(name, *ONE_BIT[name])
    assert seen(base) != seen(changed)


def built(config: Config):
    return chain(**{k.replace(".", "__"): v for k, v in flatten(config).items()})


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
    before, shapes = (main.read_data(resolved(base)), [])
    for name, value in IMAGES.items():
        changed = resolved(replace(base, {name: value}))
        if name in ("images.name", "images.folder"):
            with pytest.raises(UserError, match=f"(?s){value}.*--images.folder"):
                main.read_data(changed)
        elif name == "images.held_out":
            assert len(main.read_data(changed).held) == 5 != len(before.held)
        elif name in ("images.smoothing", "images.average"):
            shapes.append(main.assemble(changed, before))
        else:
            pairs = [
                [made.batch(i) for i in range(4)] for made in (before, main.read_data(changed))
            ]
            assert any((a[k] != b[k]).any() for a, b in zip(*pairs) for k in a), name
    smooth, average = shapes
    assert "average" in average.shapes and "average" not in smooth.shapes
    whole = main.assemble(resolved(base), before)
    traced = [str(jax.make_jaxpr(p.update)(p.shapes, p.batch(0))) for p in (whole, smooth)]
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
    assert records(tmp_path / "run")[0]["step"] == held_out[0]["step"] == 0
    assert records(tmp_path / "run")[0]["loss"] != held_out[0]["loss"]
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
    texts = [str(p.update.lower(p.placed_shapes(), p.batch(0)).as_text()) for p in (one, two)]
    assert texts[0] != texts[1]
