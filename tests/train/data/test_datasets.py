"""Prepared tfds sets of text in both forms on disk, and what is said of damaged and missing ones."""

import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from tests.support import tfds_files
from tests.train.data.test_tokenise import HELD_OUT, TEXTS, build, texts_of
from train.data import datasets
from train.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A text data set called pages/en... by tfds, as array_record, and as tfrecord elsewhere."""
    root = tmp_path_factory.mktemp("prepared")
    features = {"text": tfds.features.Text(), "url": tfds.features.Text()}
    rows = {
        "train": [{"text": text, "url": f"u{i}"} for i, text in enumerate(TEXTS)],
        "validation": [{"text": text, "url": "v"} for text in HELD_OUT],
    }
    first = tfds_files.prepare(root / "array", tfds_files.make_builder("pages", features, rows))
    tfds_files.as_tfrecord(first, root / "tfrecord")
    return root


@pytest.mark.parametrize("kind", ["array", "tfrecord"])
def test_tfds_without_tensorflow(prepared, tmp_path, kind):
    made = build(tmp_path / "out", "tfds:pages:1.2.0", data_dir=str(prepared / kind), field="text")
    assert sorted(texts_of(made, made.train)) == sorted(TEXTS)
    assert sorted(texts_of(made, made.held_out)) == sorted(HELD_OUT)
    assert len(made.shards["train"]) >= 3
    assert "tensorflow" not in sys.modules


def test_both_kinds_give_the_same_tokens(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared / "array"))
    one = build(tmp_path / "one", "tfds:pages", field="text", shard_megabytes=1.0)
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared / "tfrecord"))
    two = build(tmp_path / "two", "tfds:pages", field="text", shard_megabytes=1.0)
    assert (tmp_path / "one/manifest.json").read_text() == (
        tmp_path / "two/manifest.json"
    ).read_text()
    assert one.digest == two.digest


def test_parts_of_splits(prepared, tmp_path):
    root = str(prepared / "tfrecord")
    wanted = {"split": "train[:50%]", "held_out": "train[50%:]", "field": "text"}
    made = build(tmp_path / "out", "tfds:pages", data_dir=root, **wanted)
    both = texts_of(made, made.train), texts_of(made, made.held_out)
    assert sorted(both[0] + both[1]) == sorted(TEXTS) and abs(len(both[0]) - len(both[1])) <= 1


def test_missing_data_says_what_to_run_where(prepared, monkeypatch):
    root = str(prepared / "array")
    for name, said in (
        ("c4/en:3.0.1", "tfds build c4/en:3.0.1 --data_dir DATA --file_format array_record"),
        ("page", "nearest: pages"),
        ("pages:1.0.0", "versions there are 1.2.0"),
        ("c4 en", "is not the name of a tfds data set"),
        ("imagenet2012", "downloads/manual"),
    ):
        with pytest.raises(UserError) as caught:
            datasets.builder(name, root)
        assert said in str(caught.value)
    with pytest.raises(UserError) as caught:
        datasets.builder("c4/en", root)
    for part in ("TensorFlow", "apache-beam", "TFDS_DATA_DIR", root):
        assert part in str(caught.value)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'tensorflow-datasets"):
        datasets.builder("pages", root)


def test_a_set_is_read_with_its_only_configuration(prepared, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(prepared / "tfrecord/pages/1.2.0", root / "books/old/1.2.0")
    (root / "books/new/incomplete.9X_1.3.0").mkdir(parents=True)
    for name in ("books", "books:1.2.0", "books/old", "books/old:1.2.0"):
        assert str(datasets.builder(name, str(root)).data_path) == str(root / "books/old/1.2.0")
    made = build(tmp_path / "out", "tfds:books", data_dir=str(root), field="text")
    assert sorted(texts_of(made, made.train)) == sorted(TEXTS)
    shutil.copytree(root / "books/old", root / "books/new", dirs_exist_ok=True)
    (root / "books/new/1.2.0").rename(root / "books/new/1.3.0")
    with pytest.raises(UserError, match=r"2 configurations of books.*: books/new, books/old\.$"):
        datasets.builder("books", str(root))
    newer = datasets.builder("books:1.3.0", str(root)).data_path
    assert str(newer) == str(root / "books/new/1.3.0")
    with pytest.raises(UserError, match=r"books:9\.0\.0 is not prepared .* books/new, books/old"):
        datasets.builder("books:9.0.0", str(root))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_damaged_array_record_is_noticed(prepared, tmp_path, share):
    shutil.copytree(prepared / "array", tmp_path / "data")
    path = next((tmp_path / "data").rglob("*train.array_record-00001*"))
    content = bytearray(path.read_bytes())
    used = [place for place, byte in enumerate(content) if byte]  # the rest is padding
    content[used[int(share * len(used))]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        build(tmp_path / "out", "tfds:pages", data_dir=str(tmp_path / "data"), field="text")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"field": "label"}, "no field 'label' .* nearest"),
        ({"split": "training"}, "no split 'training'; it has train, validation"),
        ({"split": "train[90%:20%]"}, r"'train\[90%:20%\]' of pages/1.2.0 is empty"),
        ({"held_out": "train[:4]"}, "training split 'train' and .* share 4 examples"),
    ],
)
def test_wrong_fields_and_splits(prepared, tmp_path, more, said):
    wanted = {"field": "text"} | more
    with pytest.raises(UserError, match=said):
        build(tmp_path / "out", "tfds:pages", data_dir=str(prepared / "array"), **wanted)


def test_a_torn_tfrecord_is_noticed(prepared, tmp_path):
    shutil.copytree(prepared / "tfrecord", tmp_path / "data")
    path = next((tmp_path / "data").rglob("*train.tfrecord-00001*"))
    whole = path.read_bytes()
    first = 16 + int.from_bytes(whole[:8], "little")
    flipped = [bytearray(whole) for _ in range(4)]
    for content, where in zip(flipped, (1, 9, 12 + first // 2, first - 1)):
        content[where] ^= 1
    for content in (whole[:-3], whole[:first], *flipped, None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            build(tmp_path / "out", "tfds:pages", data_dir=str(tmp_path / "data"), field="text")
        shutil.rmtree(tmp_path / "out")


def test_what_tfds_did_not_finish_is_not_taken(prepared, tmp_path):
    shutil.copytree(prepared / "array", tmp_path / "data")
    folder = tmp_path / "data/pages/1.2.0"
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=f"{folder} is not a data set that tfds has prepared"):
        datasets.builder("pages", str(tmp_path / "data"))
    shutil.copytree(prepared / "array/pages/1.2.0", folder.with_name("incomplete.9X_9.9.9"))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="pages is not prepared"):
        datasets.builder("pages", str(tmp_path / "data"))


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_no_module_of_the_working_directory_is_imported(prepared, tmp_path, monkeypatch, key):
    shutil.copytree(prepared / "array", tmp_path / "array")
    (path,) = (tmp_path / "array").rglob("features.json")
    (tmp_path / "innocent.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    datasets.builder("pages", str(tmp_path / "array"))  # as tfds made it
    text = path.read_text()
    assert '"pythonClassName": "tensorflow_datasets' in text
    # The last one is that of a field.
    before, _, after = text.rpartition('"pythonClassName": "tensorflow_datasets.core.features.')
    name = after.partition('"')[0]
    path.write_text(f'{before}"{key}": "innocent.{name}"{after.partition(chr(34))[2]}')
    with pytest.raises(
        UserError, match=rf"names the class 'innocent.{name}', which would be imported"
    ):
        datasets.builder("pages", str(tmp_path / "array"))
    assert not (tmp_path / "ran").exists() and "innocent" not in sys.modules
    for content in ("{", "[" * 99_999, "\udcff"):
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=r"features.json cannot be read"):
            datasets.builder("pages", str(tmp_path / "array"))
