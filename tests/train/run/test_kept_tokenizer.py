"""The tokenizer in a run folder: the one that the weights were trained with, or a refusal."""

import json
import shutil

import pytest

from tests.support.runs import flags, write_text
from tests.train.data.test_batches import prose
from train import __main__ as command
from train import main
from train.data import batches, tokens
from train.errors import UserError
from train.run import kept_tokenizer


def load(folder, tokenizer):
    text = folder / "text.txt"
    if not text.exists():
        write_text(folder)
    return batches.load_text(str(text), str(tokenizer), length=12, batch_size=2, seed=0)


def learned(folder, seed):
    """A folder with a vocabulary of 512 tokens, learned from other text for every seed."""
    folder.mkdir(exist_ok=True)
    kept_tokenizer.write_vocabulary(folder, tokens.learn_tokenizer("bpe-512", [prose(seed)]))
    return folder


@pytest.mark.parametrize("name", ["bytes", "bpe-512", "given"])
def test_it_is_what_made_the_tokens(tmp_path, name):
    data = load(tmp_path, learned(tmp_path / "given", 3) if name == "given" else name)
    kept_tokenizer.keep(tmp_path, data)
    again = kept_tokenizer.read(tmp_path, data.digest)
    text = "naïve words abc \n"
    assert again.encode([text]).tolist() == data.tokenizer.encode([text]).tolist()
    assert (again.separator, again.name) == (data.tokenizer.separator, data.tokenizer.name)
    kept_tokenizer.keep(tmp_path, data)  # going on changes nothing
    if name != "bytes":  # and it is a vocabulary for everybody
        given = load(tmp_path, tmp_path / "tokenizer")
        assert given.digest == data.digest


def test_another_or_none_is_refused(tmp_path):
    data, other = load(tmp_path, "bpe-512"), load(tmp_path, learned(tmp_path / "given", 3))
    with pytest.raises(UserError, match=r"facts.json is missing or damaged. .*--resume"):
        kept_tokenizer.read(tmp_path, data.digest)
    kept_tokenizer.keep(tmp_path, data)
    with pytest.raises(UserError, match="is not that of the weights"):
        kept_tokenizer.read(tmp_path, other.digest)
    folder = tmp_path / "tokenizer"
    good = (folder / "tokenizer.json").read_text()
    for bad in (other.tokenizer.to_json(), "", "{"):
        (folder / "tokenizer.json").write_text(bad)
        with pytest.raises(UserError, match="was changed after the run wrote it"):
            kept_tokenizer.read(tmp_path, data.digest)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        kept_tokenizer.read(tmp_path, data.digest)
    (folder / "tokenizer.json").write_text(good)
    facts = json.loads((folder / "facts.json").read_text())
    for bad in (json.dumps({**facts, "data": other.digest}), "[]", "null", "{", ""):
        (folder / "facts.json").write_text(bad)
        with pytest.raises(UserError, match=r"facts.json is missing or damaged"):
            kept_tokenizer.read(tmp_path, data.digest)


def test_a_run_whose_tokenizer_was_replaced_says_so_and_goes_on_with_its_own(
    tmp_path, monkeypatch, capsys
):
    """Of the same size, so that nothing else would be seen."""
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    given, run = learned(tmp_path / "given", 3), tmp_path / "run"
    asked = [*flags(tmp_path), "--data.tokenizer", str(given), "--run.steps", "1"]
    assert command.main(asked) == 0
    shutil.rmtree(given)
    learned(given, 4)
    on = ["--resume", str(run), "--run.steps", "2"]
    capsys.readouterr()
    assert command.main(on) == 2
    said = capsys.readouterr().err
    assert "The tokenizer of" in said and "it makes other tokens" in said
    config = (run / "config.json").read_text()
    assert command.main([*on, "--data.tokenizer", "bytes"]) == 2
    assert "The tokenizer of" in capsys.readouterr().err
    assert (run / "config.json").read_text() == config  # what was refused leaves no trace
    # Without the note, the digest in the checkpoint says no.
    (run / "tokenizer/facts.json").rename(run / "facts.json")
    assert command.main(on) == 2
    assert "to train on changed since" in capsys.readouterr().err
    shutil.rmtree(run / "tokenizer")
    shutil.rmtree(given)
    learned(given, 3)
    assert command.main([*on, "--data.tokenizer", str(given)]) == 0
    shutil.rmtree(given)
    (tmp_path / "moved").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "moved/text.txt")
    # The text is gone, and so is the tokenizer: sampling and exporting need neither.
    assert command.main(["sample", str(run), "--tokens", "2", "--prompt", "a"]) == 0
    assert command.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    here = (run / "tokenizer/tokenizer.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == here
    moved = ["--data.text", str(tmp_path / "moved/text.txt"), "--run.steps", "3"]
    own = ["--data.tokenizer", str(run / "tokenizer")]
    assert command.main(["--resume", str(run), *moved, *own]) == 0
