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
from train.weights.key_value_cache import decoder

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
    padded = np.zeros(8, np.int32)
    padded[:5] = START
    temperature, n = 3.0, 4000
    keys = jax.random.split(jax.random.key(1), n)
    seen, _ = decoder(MODEL, 8).read(params, padded, 4)
    drawn = jax.vmap(lambda key: sample.choice(257, False, None, seen, temperature, None, key))(
        keys
    )
    logits = np.asarray(llama.forward(MODEL, params, np.array([START]))[0, -1, :257], np.float64)
    odds = np.exp(logits / temperature)
    share = odds / odds.sum()
    counts = np.bincount(np.asarray(drawn), minlength=257)
    assert len(counts) == 257  # none of the 43 rows that no token has
    # Standard deviations of 257 counts, five of them and one draw.
    assert (np.abs(counts - n * share) < 5 * np.sqrt(n * share) + 1).all()
    assert np.sort(counts)[-1] > 2 * n / 257


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, {0, 1, 2, 3, 4}),
        (None, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {3, 1}),
        (99, 1.0, {0, 1, 2, 3, 4}),
        (None, 0.45, {3, 1}),  # the first has 0.4
        (None, 0.39, {3}),
        (None, 1e-9, {3}),
        (3, 0.8, {3, 1}),  # 0.4, 0.3 and 0.15 of 0.85: the first two have 0.82
        (None, 0.8, {3, 1, 0}),
    ],
)
def test_only_the_likeliest_tokens_are_drawn(top_k, top_p, expected):
    share = np.array([0.15, 0.3, 0.1, 0.4, 0.05, 0.9])  # the sixth row belongs to no token
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.vmap(
        lambda key: sample.choice(5, False, top_k, jnp.log(share) / 2, 0.5, top_p, key)
    )(keys)
    assert set(np.asarray(drawn).tolist()) == expected


@pytest.mark.parametrize(
    "model",
    [
        llama.Config(61, width=24, mlp_width=40, layers=3, heads=6, kv_heads=2, init_std=0.3),
        llama.Config(61, width=24, mlp_width=40, layers=2, heads=2, tied=True, base_width=8),
        gpt.Config(61, 12, width=24, mlp_width=40, layers=3, heads=4, init_std=0.3),
        gpt.Config(61, 12, width=24, mlp_width=40, layers=2, heads=3, bias=False, tied=False),
        llama.Config(61, width=24, mlp_width=40, layers=3, heads=6, dtype="bfloat16", init_std=0.3),
    ],
    ids=["llama", "llama-mup", "gpt", "gpt-plain", "bfloat16"],
)
def test_a_cache_gives_the_logits_of_the_whole_text(model):
    family = llama if isinstance(model, llama.Config) else gpt
    params = jax.jit(lambda key: family.init(model, key))(jax.random.key(0))
    text = np.random.default_rng(0).integers(0, 61, 12)
    whole = np.asarray(family.forward(model, params, text[None])[0])
    read, step = decoder(model, 12)
    found, cache = read(params, np.where(np.arange(12) < 5, text, 60), 4)
    rows = [found]
    for at in range(5, 12):
        found, cache = step(params, text[at], at, cache)
        rows.append(found)
    # Some tens of roundings of numbers of the size of the largest logit.
    unit = 2**-8 if model.dtype == "bfloat16" else 2**-24
    allowed = 30 * unit * np.abs(whole).max()
    assert np.abs(np.array(rows) - whole[4:]).max() < allowed
    assert np.abs(np.diff(whole[4:], axis=0)).max() > 10 * allowed


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
    wrongs += ["--top_k 0", "--top_p 0", "--top_p 1.5", "--top_p nan"]
    wrongs += ["--top_k 5 --temperature 0", "--temperature 0 --top_p 0.5"]
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
