"""Text from a checkpoint: the tokens are the model's, from a run and from a folder for transformers alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt, llama
from tests.support.runs import flags
from train import __main__ as command
from train import main
from train.data.tokens import Bytes
from train.weights import sample

MODEL = llama.Config(vocab_size=300, width=16, mlp_width=20, layers=2, heads=2, init_std=0.5)
START = [7, 200, 31, 31, 4]


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: llama.init(MODEL, key))(jax.random.key(0))


@pytest.mark.parametrize("window", [5, 9])
def test_without_temperature_each_token_is_the_likeliest(window, params):
    """Of the last `window` tokens alone, seen without the filling that makes all steps one program."""
    forward = jax.jit(lambda tokens: llama.forward(MODEL, params, tokens))
    found = list(START)
    for _ in range(8):
        found.append(int(jnp.argmax(forward(np.array([found[-window:]]))[0, -1, :257])))
    source = sample.LanguageModel(MODEL, params, Bytes(), window)
    assert sample.sample_tokens(source, START, 8, 0.0, 3) == found[5:]
    assert len(set(found[5:])) > 2


def test_tokens_are_drawn_as_often_as_the_model_says(params):
    padded = np.zeros((1, 8), np.int32)
    padded[0, :5] = START
    temperature, n = 3.0, 4000
    keys = jax.random.split(jax.random.key(1), n)
    drawn = jax.vmap(
        lambda key: sample._next(MODEL, 257, False, params, padded, 4, temperature, key)
    )(keys)
    logits = np.asarray(llama.forward(MODEL, params, np.array([START]))[0, -1, :257], np.float64)
    odds = np.exp(logits / temperature)
    share = odds / odds.sum()
    counts = np.bincount(np.asarray(drawn), minlength=257)
    assert len(counts) == 257  # none of the 43 rows that no token has
    # Standard deviations of 257 counts, five of them and one draw.
    assert (np.abs(counts - n * share) < 5 * np.sqrt(n * share) + 1).all()
    assert np.sort(counts)[-1] > 2 * n / 257


def test_the_seed_decides(params):
    source = sample.LanguageModel(MODEL, params, Bytes(), 16)
    one, again, other = (sample.sample_tokens(source, START, 12, 1.0, s) for s in (1, 1, 2))
    assert one == again != other
    likeliest, coldest = (sample.sample_tokens(source, START, 4, t, 0) for t in (0.0, 1e-50))
    assert likeliest == coldest
    text = sample.continue_text(source, "ab", 4, 1.0, 0)
    assert text.startswith("ab")
    # Without a prompt it begins behind a separator, which is not shown.
    assert sample.continue_text(source, "", 4, 0.0, 0) == Bytes().decode(
        np.array(sample.sample_tokens(source, [256], 4, 0.0, 0))
    )
    begun = source._replace(begin=(31, 7))
    seen = [31, 7, *b"ab"]
    said = sample.continue_text(begun, "ab", 4, 0.0, 0)
    assert said == Bytes().decode(
        np.array(seen[2:] + sample.sample_tokens(source, seen, 4, 0.0, 0))
    )
    assert said != sample.continue_text(source, "ab", 4, 0.0, 0)


def test_a_run_and_what_it_exports_say_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    asked = [
        *flags(tmp_path, "--data.tokenizer", "bpe-512", "--run.steps", "1"),
        "--model.init_std",
        "0.5",
    ]
    assert main.main(asked) == 0
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert command.main(["export", run, "--out", out]) == 0
    said = []
    for folder in (run, out):
        capsys.readouterr()
        how = ["--prompt", "abc", "--tokens", "20", "--temperature", "0"]
        assert command.main(["sample", folder, *how]) == 0
        said.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert said[0] == said[1] and said[0].startswith("abc") and len(said[0]) > 13
    assert command.main(["sample", run, "--tokens", "2"]) == 0
    wrongs = ["--tokens 0", "--temperature -1", "--temperature nan", f"--seed {1 << 32}"]
    for wrong in [*map(str.split, wrongs), ["--prompt", "\udcff"]]:
        assert command.main(["sample", run, *wrong]) == 2
    (tmp_path / "out/tokenizer.json").unlink()
    assert command.main(["sample", out]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_gpt_sees_as_much_as_it_has_positions():
    model = gpt.Config(
        vocab_size=257, positions=6, width=16, mlp_width=20, layers=1, heads=2, init_std=0.5
    )
    params = jax.jit(lambda key: gpt.init(model, key))(jax.random.key(0))
    source = sample.LanguageModel(model, params, Bytes(), model.positions)
    assert len(sample.sample_tokens(source, START, 9, 0.0, 0)) == 9
