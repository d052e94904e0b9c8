"""Images: read from real tfds files, seen at random but repeatably, mixed as the equations say."""

import dataclasses
import functools
import io
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from models import vit
from tests.support import pictures, tfds_files
from tests.support.pictures import CLASSES, picture
from train.config.derived import derived
from train.config.fields import Config, Mesh
from train.config.tree import replace
from train.data import augment, datasets, images, views
from train.errors import UserError
from train.step import image_task, optimizer, replicas, sharding
from train.step.update import compiled

SIZE = 12
PLAIN = images.Recipe(magnitude=0, erasing=0, mixup=0, cutmix=0, smoothing=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    tfds_files.as_tfrecord(pictures.prepare(root / "array"), root / "tfrecord")
    text = {"text": tfds.features.Text()}
    other = tfds_files.make_builder("words", text, {"train": [{"text": "a"}]})
    tfds_files.prepare(root / "array", other, shards=1)
    return root


def load(prepared, recipe=images.Recipe(), **more):  # noqa: B008  (it is frozen)
    wanted = {"size": SIZE, "batch_size": 8, "seed": 3, "data_dir": str(prepared / "array")}
    return images.load_images("shapes", recipe=recipe, **(wanted | more))


def test_files_are_read_without_tensorflow(prepared):
    made = load(prepared, PLAIN)
    assert (made.classes, len(made.train), len(made.held)) == (CLASSES, 30, 11)
    assert made.name == "shapes/1.2.0" and made.summary()["steps_per_epoch"] == 30 / 8
    read = [made.maker.read(made.train, i) for i in range(30)]
    numbers = [int(np.asarray(image)[0, 0, 0]) // 3 for image, _ in read]
    assert sorted(numbers) == list(range(30))
    for number, (image, label) in zip(numbers, read):
        np.testing.assert_array_equal(np.asarray(image), picture(number))
        assert label == number % CLASSES
    assert "tensorflow" not in sys.modules


def test_an_epoch_sees_every_image_once_with_its_label(prepared):
    made = load(prepared, PLAIN)
    batches = [made.batch(step) for step in range(15)]
    assert batches[0]["image"].shape == (8, SIZE, SIZE, 3) and batches[0]["image"].dtype == np.uint8
    red = np.concatenate([b["image"][:, 0, 0, 0] for b in batches]) // 3
    label = np.concatenate([b["label"] for b in batches])
    np.testing.assert_array_equal(label, red % CLASSES)
    epochs = red.reshape(4, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batch(prepared, processes):
    whole, each = load(prepared), 8 // processes
    hosts = [load(prepared) for _ in range(processes)]
    for step in (5, 0, 1000):
        parts = [h.batch(step, slice(p * each, (p + 1) * each)) for p, h in enumerate(hosts)]
        for name, expected in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected)
    other = load(prepared, seed=4).batch(5)
    assert any(not np.array_equal(other[k], v) for k, v in whole.batch(5).items())


def test_evaluation_sees_the_middle_and_fills_up(prepared):
    made = load(prepared)
    batches = list(made.held_out(99))
    label = np.concatenate([b["label"] for b in batches])
    assert len(batches) == 2 and (label >= 0).sum() == 11 and (label[11:] == images.NO_LABEL).all()
    again = made.held_out(99)
    for a, b in zip(batches, again):
        np.testing.assert_array_equal(a["image"], b["image"])
    assert len(list(made.held_out(1))) == 1
    # A picture whose border is black: of the middle 7/8 nothing is.
    pixels = np.full((64, 80, 3), 255, np.uint8)
    pixels[:3] = pixels[-3:] = 0
    view = augment.evaluation_view(Image.fromarray(pixels), 16)
    assert view.shape == (16, 16, 3) and view.min() > 200


def test_mixing_is_the_equations(prepared):
    """Against the equations in float64; both kinds, and the label's share against the area."""
    made, seen = load(prepared), set()
    mixed = jax.jit(images.mixed, static_argnums=(1, 2))
    for step in range(12):
        batch = made.batch(step)
        top, bottom, left, right = batch["box"][0].tolist()
        x = (batch["image"] / 255.0 - images.MEAN) / images.DEVIATION
        share = float(batch["pixels"][0])
        expected = share * x + (1 - share) * x[::-1]
        expected[:, top:bottom, left:right] = x[::-1][:, top:bottom, left:right]
        kept = float(batch["labels"][0])
        y = np.eye(CLASSES)[batch["label"]] * 0.9 + 0.1 / CLASSES
        found, labels = mixed(batch, CLASSES, 0.1)
        # float32: values below 3, a handful of roundings.
        np.testing.assert_allclose(found, expected, atol=3e-6)
        np.testing.assert_allclose(labels, kept * y + (1 - kept) * y[::-1], atol=1e-6)
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
        if share == 1:
            area = (bottom - top) * (right - left)
            assert kept == pytest.approx(1 - area / SIZE**2, abs=1e-6)
            seen.add("cutmix" if area else "nothing")
        else:
            assert kept == share and (bottom, right) == (0, 0)
            seen.add("mixup")
    assert {"mixup", "cutmix"} <= seen
    plain = load(prepared, PLAIN).batch(1)
    found, labels = mixed(plain, CLASSES, 0.0)
    np.testing.assert_array_equal(labels, np.eye(CLASSES)[plain["label"]])
    np.testing.assert_allclose(found, images.normalised(plain["image"]), atol=3e-6)


def test_top1_counts_images_with_a_label():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(0, 3, (7, 5)), np.array([1, -1, 4, 0, -1, 2, 2])
    loss, right, count = images.top1(jnp.asarray(logits, jnp.float32), jnp.asarray(label))
    known = label >= 0
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -scores[np.arange(7), label][known].sum()
    assert float(loss) == pytest.approx(expected, rel=1e-6) and count == 5
    assert right == (logits.argmax(1) == label)[known].sum()


def test_every_operation_changes_an_image_and_more_with_its_level():
    x = np.linspace(30, 220, 32)
    pixels = np.stack(
        [np.tile(x, (32, 1)), np.tile(x[:, None], (1, 32)), np.full((32, 32), 90)], -1
    )
    pixels[8:14, 5:20] = (250, 10, 60)
    image = Image.fromarray(pixels.astype(np.uint8))
    for number, change in enumerate(augment.OPERATIONS):
        weak, strong = (np.asarray(change(image, level, 1), float) for level in (0.1, 0.9))
        moved = [np.abs(v - np.asarray(image, float)).mean() for v in (weak, strong)]
        assert strong.shape == (32, 32, 3) and moved[1] > 0.1, number
        # The first three have no strength; all others are stronger at a larger level.
        assert (moved[1] == moved[0]) if number < 3 else (moved[1] > moved[0]), number


def test_views_are_as_random_as_the_recipe_says():
    x = np.arange(64)
    image = Image.fromarray(np.stack([np.tile(2 * x, (64, 1))] * 3, -1).astype(np.uint8))
    view = lambda seed, m, e: augment.training_view(image, 16, np.random.default_rng(seed), m, e)
    np.testing.assert_array_equal(view(0, 9.0, 0.5), view(0, 9.0, 0.5))
    plain = [view(seed, 0.0, 0.0).astype(int) for seed in range(400)]
    flipped = np.mean([v[:, 0].mean() > v[:, -1].mean() for v in plain])
    assert abs(flipped - 0.5) < 5 * 0.5 / np.sqrt(400)
    width = np.mean([abs(v[8, -1, 0] - v[8, 0, 0]) / 2 for v in plain])
    assert 25 < width < 60  # the root of a uniform area of 8 to 100 % has a mean of 0.69, of 64
    erased = np.mean([(view(s, 0.0, 0.25) != plain[s]).any() for s in range(400)])
    assert abs(erased - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    coloured = np.mean([(view(s, 9.0, 0.0) != plain[s]).any() for s in range(400)])
    # Each of two operations is done half of the time; on a grey ramp, few change nothing.
    assert 0.6 < coloured < 0.85
    always = augment.erase(np.zeros((16, 16, 3), np.uint8), np.random.default_rng(1), 1.0)
    assert 0.01 < (always.sum(-1) > 0).mean() < 0.4


def test_what_cannot_be_read_is_refused(prepared):
    with pytest.raises(UserError, match="convert_format"):
        load(prepared, data_dir=str(prepared / "tfrecord"))
    with pytest.raises(UserError, match="is not a set of labelled images"):
        wanted = {"size": 8, "batch_size": 2, "seed": 0, "recipe": PLAIN, "held_out": "train"}
        images.load_images("words", data_dir=str(prepared / "array"), **wanted)
    with pytest.raises(UserError, match="no split 'training'"):
        load(prepared, split="training")
    with pytest.raises(UserError, match="share 11 examples"):
        load(prepared, split="test")
    with pytest.raises(UserError, match="tfds build imagenet2012"):
        wanted = {"size": 8, "batch_size": 2, "seed": 0, "recipe": PLAIN}
        images.load_images("imagenet2012", data_dir=str(prepared / "array"), **wanted)
    for name, value in (("erasing", 1.5), ("magnitude", 11.0), ("mixup", -1.0)):
        with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
            dataclasses.replace(PLAIN, **{name: value})


def test_what_is_damaged_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "array/shapes", tmp_path / "shapes")
    made = load(prepared, data_dir=str(tmp_path))
    first, *_, last = sorted((tmp_path / "shapes/1.2.0").glob("*train*"))
    last.write_bytes(b"")
    number = len(made.train) - 1
    place = f"Example {made.train.ranges[-1].take - 1} of {last} "
    with pytest.raises(UserError, match=f"{place}cannot be read: .*again"):
        made.maker.read(made.train, number)
    whole = load(prepared).train[0]
    torn = datasets.RandomAccessSplit([{**whole, "image": whole["image"][:-99]}], made.train.ranges)
    with pytest.raises(UserError, match=f"Example 0 of {first} holds no image"):
        made.maker.read(torn, 0)
    last.unlink()
    with pytest.raises(UserError, match=f"{last} is missing"):
        load(prepared, data_dir=str(tmp_path))


# --- training


def linear(params, x, key=None):
    """Logits from the mean colour of four stripes; a key shifts them, so that it is seen."""
    stripes = x.reshape(len(x), 4, -1, 3).mean(2).reshape(len(x), 12)
    shift = 0 if key is None else params["shift"] * jax.random.normal(key, ())
    return stripes @ params["kernel"] + shift


def weights():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (12, CLASSES), "shift": (CLASSES,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_the_loss_is_the_equation_and_parts_do_not_change_it(prepared):
    batch, params = load(prepared).batch(2), weights()
    params["shift"] = jnp.zeros(CLASSES)  # what is dropped differs between parts, so nothing is
    task = image_task.Classifier(linear, CLASSES, smoothing=0.1)
    both = jax.jit(functools.partial(image_task.loss_and_gradient, task), static_argnums=2)
    (whole, gradient), (parts, same) = (both(params, batch, n) for n in (1, 4))
    x, y = (np.asarray(v, np.float64) for v in images.mixed(batch, CLASSES, 0.1))
    z = np.asarray(linear(params, x), np.float64)
    scores = z - np.log(np.exp(z).sum(1, keepdims=True))
    # float32 against float64: sums over 12 numbers and 5 classes of order one.
    assert float(whole) == pytest.approx(-(y * scores).sum(1).mean(), rel=2e-6)
    assert float(parts) == pytest.approx(float(whole), rel=2e-6)
    np.testing.assert_allclose(same["kernel"], gradient["kernel"], atol=2e-6)
    assert not np.allclose(same["shift"], gradient["shift"])  # every part has noise of its own


def test_replicas_as_workers_have_the_loss_of_all_rows(prepared):
    batch, params = load(prepared, PLAIN).batch(2), weights()
    params["shift"] = jnp.zeros(CLASSES)
    task = image_task.Classifier(linear, CLASSES, smoothing=0.0)
    mesh = sharding.make_mesh(Mesh(replica=2, data=1), 8)
    placed = jax.tree.map(lambda w: jax.NamedSharding(mesh, jax.P()), params)

    def mean(params, batch):
        value, gradient = image_task.loss_and_gradient(task, params, batch, 2)
        return jax.tree.map(replicas.mean, (value, gradient["kernel"]))

    value, gradient = jax.jit(replicas.on_each(mean, placed, None))(params, batch)
    whole, expected = image_task.loss_and_gradient(task, params, batch, 1)
    # float32 sums of eight images in another order.
    assert float(value) == pytest.approx(float(whole), rel=2e-6)
    np.testing.assert_allclose(gradient, expected["kernel"], atol=2e-6)


def test_what_is_dropped_follows_from_the_batch(prepared):
    made, task = load(prepared), image_task.Classifier(linear, CLASSES, smoothing=0.1)
    value = jax.jit(lambda params, b: image_task.loss_and_gradient(task, params, b, 1)[0])
    batch, again = made.batch(2), made.batch(2)
    assert value(weights(), batch) == value(weights(), again)
    other = batch | {"noise": batch["noise"] + np.uint32(1)}
    assert value(weights(), batch) != value(weights(), other)


def test_a_vit_trains_on_two_devices(prepared):
    """Loss and top-1 on the training pictures themselves, the mean of the weights, and one compilation."""
    made = load(prepared, dataclasses.replace(PLAIN, smoothing=0.05, mixup=0.2))
    seen = load(prepared, split="test", held_out="train")
    model = dataclasses.replace(vit.PRESETS["vit-toy"], classes=CLASSES, image_size=SIZE)
    assert model.drop_path > 0
    wanted = {
        "optimizer.learning_rate": 1e-2,
        "run.steps": 40,
        "optimizer.schedule.warmup_steps": 4,
    }
    config = derived(replace(Config(), wanted))
    mesh = sharding.make_mesh(Mesh(data=2), 8)
    axes = vit.axes(model)
    tx, rate = optimizer.build(config, axes), optimizer.schedule(config.optimizer)
    task = image_task.Classifier(functools.partial(vit.forward, model), CLASSES, 0.05, average=0.9)
    init = lambda key: image_task.first_state(task, vit.init(model, key), tx)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.of_train_state(
        shapes, sharding.of_parameters(axes, shapes["params"], mesh)
    )
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    update = compiled(functools.partial(image_task.train_step, task, tx, rate, 1, False), shardings)
    sums, held_out = jax.jit(functools.partial(image_task.sums, task)), list(seen.held_out(9))

    def evaluate(state):
        return image_task.scores(np.sum([sums(state, batch) for batch in held_out], 0))

    before = evaluate(state)
    assert before["loss"] == pytest.approx(np.log(CLASSES), abs=0.2)
    assert before["average_loss"] == before["loss"]
    kept = jax.device_get(state["average"])
    assert made.shape == {name: value.shape for name, value in made.batch(0).items()}
    for index in range(40):
        batch = sharding.put_batch(functools.partial(made.batch, index), made.shape, mesh)
        state, noted = update(state, batch)
        now = jax.device_get(state)
        kept = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, kept, now["params"])
    # Each of 40 steps rounds once to float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), now["average"], kept)
    np.testing.assert_array_equal(batch["label"], made.batch(39)["label"])
    assert update._cache_size() == 1 and int(now["step"]) == 40
    assert set(noted) == {"loss", "gradient_norm", "learning_rate", "skipped", "skipped_in_a_row"}
    after = evaluate(state)
    assert set(after) == {"loss", "top1", "average_loss", "average_top1"}
    assert after["loss"] < before["loss"] - 0.2 and after["top1"] > 0.4 > before["top1"]


def test_a_mean_needs_a_share():
    with pytest.raises(ValueError, match=r"average=1\.0 is out of range"):
        image_task.Classifier(linear, CLASSES, 0.1, average=1.0)
    state = image_task.first_state(
        image_task.Classifier(linear, CLASSES, 0.1), weights(), optimizer_of_nothing()
    )
    assert set(state) == {"params", "optimizer", "step"}


def optimizer_of_nothing():
    import optax

    return optax.sgd(1.0)


def test_an_image_of_far_too_many_pixels_is_refused_before_it_is_decoded():
    small, large = io.BytesIO(), io.BytesIO()
    Image.new("1", (40, 30)).save(small, "PNG")
    Image.new("1", (13_000, 13_000)).save(large, "PNG")
    assert views.decoded(small.getvalue()).size == (40, 30)
    with pytest.raises(
        ValueError, match="it has 13000 x 13000 pixels; allowed are at most 64 million"
    ):
        views.decoded(large.getvalue())
    with pytest.raises(Image.UnidentifiedImageError):  # Pillow would start Ghostscript
        views.decoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
