"""Folders of parquet and arrow files as text: their layouts, their splits, and damage."""

import json
import pathlib

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.train.data.test_tokenise import HELD_OUT, TEXTS, build, files, texts_of
from train.data import batches, hugging_face_sets
from train.errors import UserError


def table(texts, column="text", kind=None, **more):
    values = pa.array(texts, kind or pa.string())
    return pa.table({column: values, "id": list(range(len(texts))), **more})


def write_arrow(path: pathlib.Path, content: pa.Table, *, as_file=False, rows=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with new(str(path), content.schema) as file:
        file.write_table(content, max_chunksize=rows)


def write_parquet(path: pathlib.Path, content: pa.Table):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(content, path, row_group_size=11, write_page_checksum=True)


def save(folder: pathlib.Path, texts, shards=2, **more):
    """As `Dataset.save_to_disk` does."""
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-len(texts) // shards)
    for i, name in enumerate(names):
        write_arrow(folder / name, table(texts[i * size : (i + 1) * size], **more))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )


def save_dict(root: pathlib.Path):
    for split, texts in (("train", TEXTS), ("test", HELD_OUT)):
        save(root / split, texts)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def save_hub(root: pathlib.Path):
    cut = len(TEXTS) // 3
    write_parquet(root / "data/train-00000-of-00002.parquet", table(TEXTS[:cut]))
    write_parquet(root / "data/train-00001-of-00002.parquet", table(TEXTS[cut:]))
    write_parquet(root / "data/validation-00000-of-00001.parquet", table(HELD_OUT))
    (root / "README.md").write_text("A card.")


def save_folders(root: pathlib.Path):
    write_parquet(root / "default/train/0000.parquet", table(TEXTS, kind=pa.large_string()))
    codes = table(HELD_OUT).set_column(0, "text", pa.array(HELD_OUT).dictionary_encode())
    write_parquet(root / "default/test/0000.parquet", codes)


def save_cache(root: pathlib.Path):
    write_arrow(root / "pages-train.arrow", table(TEXTS), as_file=True)
    write_arrow(root / "pages-test.arrow", table(HELD_OUT))
    write_arrow(root / "cache-0123.arrow", table(["a result of map"]))
    (root / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("layout", [save_dict, save_hub, save_folders, save_cache])
def test_layouts(layout, tmp_path):
    layout(tmp_path / "set")
    made = build(tmp_path / "out", f"hf:{tmp_path / 'set'}")
    assert texts_of(made, made.train) == TEXTS and texts_of(made, made.held_out) == HELD_OUT
    assert len(made.shards["train"]) >= 1
    whole = batches.load_text(str(tmp_path / "set"), "bytes", length=32, batch_size=2, seed=0)
    assert texts_of(whole, whole.train) == TEXTS and texts_of(whole, whole.held) == HELD_OUT
    assert whole.batch(3).shape == (2, 33)


def test_workers_and_parts_do_not_change_a_store(tmp_path):
    save_hub(tmp_path / "set")
    more = {"tokenizer": "bpe-512", "shard_megabytes": 0.002}
    one = build(tmp_path / "one", f"hf:{tmp_path / 'set'}", **more)
    build(tmp_path / "two", f"hf:{tmp_path / 'set'}", workers=2, **more)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(one.shards["train"]) >= 3 and texts_of(one, one.train) == TEXTS


def test_the_end_is_held_out_where_no_split_is(tmp_path):
    save(tmp_path / "set", TEXTS[:40], shards=3)
    found = hugging_face_sets.read_corpus(f"hf:{tmp_path / 'set'}")
    assert list(found.train.values()) == TEXTS[:38]
    assert list(found.held_out.values()) == TEXTS[38:40]
    again = hugging_face_sets.read_corpus(str(tmp_path / "set"))
    assert again.digest == found.digest
    save(tmp_path / "other", [*TEXTS[:39], "another"], shards=3)
    assert hugging_face_sets.read_corpus(f"hf:{tmp_path / 'other'}").digest != found.digest


def test_rows_without_text_and_bytes_that_are_not_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", table(["one", None, "", "two"] * 30))
    found = hugging_face_sets.read_corpus(str(tmp_path / "a.parquet"))
    assert set(found.train.values()) == {"one", "two"} and len(found.train) == 57
    raw = pa.array([b"ab\xffcd", b"rest"] * 20).view(pa.string())
    write_parquet(tmp_path / "b.parquet", pa.table({"text": raw}))
    found = hugging_face_sets.read_corpus(str(tmp_path / "b.parquet"))
    assert "ab\ufffdcd" in found.train.values()


def test_a_column_is_chosen(tmp_path):
    path = tmp_path / "set/train.parquet"
    write_parquet(path, table(TEXTS, column="body", url=["u"] * len(TEXTS)))
    source = f"hf:{path.parent}"
    with pytest.raises(UserError, match=r"no column 'text'.* body, url; nearest.*--field COLUMN"):
        hugging_face_sets.find(source)
    made = build(tmp_path / "out", source, field="body")
    assert texts_of(made, made.train) + texts_of(made, made.held_out) == TEXTS
    with pytest.raises(UserError, match="columns of texts are: body, url"):
        hugging_face_sets.find(source, "id")
    write_parquet(path, table(TEXTS, column="body"))
    assert hugging_face_sets.find(source)[1]["column"] == "body"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"split": "dev"}, "no split 'dev'; it has train, test"),
        ({"held_out": "train"}, "split train cannot be trained on and held out"),
        ({"data_dir": "x"}, "--data_dir applies to tfds data sets only"),
    ],
)
def test_wrong_splits_and_options(tmp_path, more, said):
    save_dict(tmp_path / "set")
    with pytest.raises(UserError, match=said):
        build(tmp_path / "out", f"hf:{tmp_path / 'set'}", **more)


def test_several_sets_in_a_folder_are_named(tmp_path):
    for name in ("small", "large"):
        write_parquet(tmp_path / name / "train-0.parquet", table(TEXTS))
    with pytest.raises(UserError, match=f"2 data sets; .*hf:{tmp_path}/large, hf:{tmp_path}/small"):
        hugging_face_sets.find(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="there is no folder"):
        hugging_face_sets.find(f"hf:{tmp_path}/medium")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no parquet or arrow file"):
        hugging_face_sets.find(f"hf:{tmp_path}/empty")


def test_folders_of_text_are_read_as_before(tmp_path):
    write_parquet(tmp_path / "mixed/a.parquet", table(TEXTS))
    (tmp_path / "mixed/b.py").write_text("text = 1\n")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/README.md").write_text("text")
    for name in ("mixed", "text", "absent"):
        assert not hugging_face_sets.is_source(str(tmp_path / name))
    assert not hugging_face_sets.is_source("stdlib")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damage_is_noticed(tmp_path, kind):
    path = tmp_path / f"set/train.{kind}"
    write_arrow(path, table(TEXTS)) if kind == "arrow" else write_parquet(path, table(TEXTS))
    whole = path.read_bytes()
    torn = [whole[:-1], whole[:-8], whole[: len(whole) // 2], whole[:3], b""]
    if kind == "parquet":  # arrow files have no checksums
        torn += [whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]]
    for content in torn:
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            hugging_face_sets.read_corpus(f"hf:{path.parent}")


def test_a_saved_set_that_is_incomplete(tmp_path):
    save(tmp_path / "set", TEXTS)
    state = json.loads((tmp_path / "set/state.json").read_text())
    selected = state | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "set/state.json").write_text(json.dumps(selected))
    with pytest.raises(UserError, match="flatten_indices"):
        hugging_face_sets.find(f"hf:{tmp_path / 'set'}")
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    (tmp_path / "set/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing"):
        hugging_face_sets.find(f"hf:{tmp_path / 'set'}")
    (tmp_path / "set/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        hugging_face_sets.find(f"hf:{tmp_path / 'set'}")
