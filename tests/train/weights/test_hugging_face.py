"""Weights from and to transformers: the same logits both ways, one array at a time, clear refusals.

The forward rules are those of reference_hugging_face.py. With TRANSFORMERS_PYTHON naming a Python that
has torch and transformers (or with both installed here) they are transformers' own as well.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt, llama
from optax_decay.parameters.paths import leaf_paths
from tests.references import hugging_face as reference
from tests.support.runs import flags, records
from train import __main__ as command
from train import main
from train.cli import parse
from train.config.fields import Mesh, UserError
from train.step import families, sharding
from train.weights import hugging_face
from train.weights.hugging_face_config import read_config
from train.weights.trained import load_trained

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "rms_norm_eps": 0.02,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_positions": 19,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 40,
    "layer_norm_epsilon": 0.02,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {
    "llama": LLAMA,
    "llama-tied": {
        **{k: v for k, v in LLAMA.items() if k != "rope_parameters"},
        **{
            "rope_theta": 20.0,
            "tie_word_embeddings": True,
            "num_key_value_heads": 6,
            "vocab_size": 67,
        },
    },
    "gpt2": GPT2,
    "gpt2-own-head": {**GPT2, "n_inner": None, "tie_word_embeddings": False, "n_layer": 2},
}
# Models of ours with all that has no name there: a base width, no biases.
OURS = {
    "llama": llama.Config(
        **dict(vocab_size=61, width=24, mlp_width=40, layers=3, heads=6, kv_heads=3),
        **dict(rope_base=70.0, norm_eps=0.01, init_std=0.3, base_width=18, base_head_width=10),
    ),
    "llama-tied": llama.Config(vocab_size=59, width=16, mlp_width=20, layers=2, heads=2, tied=True),
    "gpt2": gpt.Config(
        **dict(vocab_size=53, positions=19, width=24, mlp_width=40, layers=3, heads=4),
        **dict(norm_eps=0.01, init_std=0.3, base_width=18, base_head_width=10),
    ),
    "gpt2-own-head": gpt.Config(
        **dict(vocab_size=51, positions=17, width=16, mlp_width=20, layers=2, heads=2),
        **dict(tied=False, bias=False, init_std=0.3),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 51, (2, 13))


def written(folder, config, seed=0, prefix=None):
    """A folder with the config and random weights, as another program would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = reference.random_arrays(config, np.random.default_rng(seed))
    (folder / "config.json").write_text(json.dumps(config))
    named = {name.removeprefix(prefix or ""): array for name, array in arrays.items()}
    reference.write(folder / "model.safetensors", named)
    return arrays


def shapes(model):
    return jax.eval_shape(lambda: families.of(model).init(model, jax.random.key(0)))


def places(model, sizes=(1, 1, 1)):
    asked = Mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    mesh = sharding.make_mesh(asked, math.prod(sizes))
    return sharding.of_parameters(families.of(model).axes(model), shapes(model), mesh)


def loaded(folder, sizes=(1, 1, 1)):
    model = read_config(folder)
    return model, hugging_face.load_pretrained(folder, model, places(model, sizes))


def random_params(model, seed=0):
    """Of the size that `init` makes, around 1 for scales; biases included. Without a compilation."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = model.init_std * rng.normal(size=x.shape) + (path[-1].key == "scale")
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def logits(model, params):
    forward = families.of(model).forward
    return np.asarray(jax.jit(lambda p, t: forward(model, p, t))(params, TOKENS))


def assert_same(found, exact):
    # The bound, and that the logits are not so small that it says nothing.
    assert np.abs(exact).max() > 0.3
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_reading_gives_the_logits_of_the_file(name, tmp_path):
    arrays = written(tmp_path, CASES[name])
    model, params = loaded(tmp_path)
    assert_same(logits(model, params), reference.forward(CASES[name], arrays, TOKENS))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_has_our_logits(name, tmp_path):
    model = OURS[name]
    params = random_params(model)
    files = hugging_face.save_pretrained(tmp_path, model, params, length=77, separator=5)
    assert files == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == 5 and 77 in {config.get("max_position_embeddings"), 77}
    arrays = reference.read(tmp_path / "model.safetensors")
    assert_same(logits(model, params), reference.forward(config, arrays, TOKENS))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_there_and_back_over_several_files_and_devices(name, tmp_path):
    model = dataclasses.replace(OURS[name], base_width=None, base_head_width=None)
    params = random_params(model)
    files = hugging_face.save_pretrained(tmp_path, model, params, largest=9000)
    sizes = [(tmp_path / file).stat().st_size for file in files[1:]]
    assert len(sizes) > 4 and files[1] == f"model-00001-of-{len(sizes):05d}.safetensors"
    # 9000 bytes of arrays and the header, or one array alone.
    assert max(sizes) < 9000 + 2000
    back, again = loaded(tmp_path, (2, 2, 2))
    assert (back.width, back.tied) == (model.width, model.tied)
    for path, a, b in zip(leaf_paths(params), *map(jax.tree.leaves, (params, again)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
        assert b.committed and len(b.sharding.device_set) == 8
    spec = again["blocks"]["mlp"]["up"]["kernel"].sharding.spec
    assert tuple(spec) == (None, "fsdp", "tensor")


def test_bfloat16_files_hold_rounded_weights(tmp_path):
    model = OURS["llama-tied"]
    params = random_params(model)
    hugging_face.save_pretrained(tmp_path, model, params, dtype="bfloat16")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 2 * llama.count(model) < size < 2 * llama.count(model) + 4000
    _, again = loaded(tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(jnp.asarray(a, jnp.bfloat16), b), params, again
    )


def test_a_base_width_comes_back_out(tmp_path):
    model = OURS["llama"]
    params = random_params(model)
    hugging_face.save_pretrained(tmp_path, model, params)
    again = hugging_face.load_pretrained(tmp_path, model, places(model))
    # Times a factor and divided by it: two roundings.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-22), params, again)
    plain = hugging_face.load_pretrained(tmp_path, read_config(tmp_path), places(model))
    assert not np.allclose(plain["final_norm"]["scale"], params["final_norm"]["scale"], rtol=0.1)


def test_the_host_holds_one_array_at_a_time(tmp_path):
    """Peak of what NumPy and Python allocate; the parameters themselves are JAX's and not counted."""
    model = llama.Config(vocab_size=600, width=256, mlp_width=640, layers=8, heads=4)
    whole, largest = 4 * llama.count(model), 4 * 256 * 640
    params = random_params(model)
    hugging_face.save_pretrained(tmp_path / "warm", model, params)
    loaded(tmp_path / "warm")
    peaks = []
    for work in (
        lambda: hugging_face.save_pretrained(tmp_path / "out", model, params),
        lambda: loaded(tmp_path / "warm"),
    ):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The array, its transpose in the order of the file, the slice on its way; some names and JAX's tracing.
    assert max(peaks) < 4 * largest + 2_000_000 < whole / 4, (peaks, largest, whole)


def test_names_without_their_first_word_and_constants_in_the_file(tmp_path):
    """As the files of GPT-2 were first released."""
    arrays = written(tmp_path, GPT2, prefix="transformer.")
    path = tmp_path / "model.safetensors"
    more = {
        "h.0.attn.bias": np.ones((1, 1, 19, 19), np.float32),
        "lm_head.weight": np.ones((53, 24)),
    }
    reference.write(path, {**reference.read(path), **more})
    model, params = loaded(tmp_path)
    assert_same(logits(model, params), reference.forward(GPT2, arrays, TOKENS))


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0}},
            "rope_scaling = .*yarn",
        ),
        (
            LLAMA,
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "linear",
        ),
        (LLAMA, {"rope_parameters": 7}, "rope_parameters = '7' must be an object"),
        (
            LLAMA,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = '0.5' is not supported; allowed is 1.0",
        ),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (
            LLAMA,
            {"attention_bias": True},
            "attention_bias = 'True' is not supported; allowed is False",
        ),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed is 'silu'"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA, {"head_dim": 8}, "head_dim = 8 is not supported; .* = 4"),
        (
            LLAMA,
            {"model_type": "mixtral"},
            "'mixtral' is not supported; allowed are llama and gpt2",
        ),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size = '24' must be a number"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers = 'True'"),
        (LLAMA, {"num_attention_heads": 5}, "heads=5 must divide"),
        (
            GPT2,
            {"activation_function": "relu"},
            "activation_function = 'relu'.*allowed is 'gelu_new'",
        ),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"n_layer": 0}, "layers=0 must be at least 1"),
    ],
)
def test_models_that_cannot_be_had_are_refused(base, change, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**base, **change}))
    with pytest.raises(UserError, match=said):
        read_config(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no config"):
        read_config(tmp_path)
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "None is not supported"),
        ("[" * 99999, "cannot be read"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no field vocab_size"):
        read_config(tmp_path)
    arrays = written(tmp_path, LLAMA)
    path, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    for changed, said in (
        ({n: a for n, a in arrays.items() if n != name}, f"no array '{name}'"),
        (
            {**arrays, name: arrays[name].T},
            r"has the shape \(24, 8\); its config.json requires \(8, 24\)",
        ),
        ({**arrays, "model.layers.3.x": arrays[name]}, "hold 1 arrays .* 'model.layers.3.x'"),
    ):
        reference.write(path, changed)
        with pytest.raises(UserError, match=said):
            loaded(tmp_path)
    with pytest.raises(UserError, match="have heads = 6, but the model has 3"):
        other = dataclasses.replace(read_config(tmp_path), heads=3, kv_heads=1)
        hugging_face.load_pretrained(tmp_path, other, places(other))


# --- runs


def without_shape(asked):
    """The flags of a toy run, less those of the model."""
    pairs = zip(asked[::2], asked[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--model.") for word in pair]


def test_a_run_starts_from_weights_and_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    config = {**CASES["llama-tied"], "vocab_size": 257, "num_key_value_heads": 3}
    arrays = written(tmp_path / "weights", config)
    asked = [*without_shape(flags(tmp_path)), "--model.weights", str(tmp_path / "weights")]
    ready = main.assemble(parse(asked), main.read_data(parse(asked)))
    start = ready.begin()
    assert_same(
        logits(ready.program.model, start["params"]), reference.forward(config, arrays, TOKENS)
    )
    assert int(start["step"]) == 0
    assert main.main([*asked, "--run.steps", "2", "--optimizer.schedule.steps", "6"]) == 0
    run = tmp_path / "run"
    first = next(r for r in records(run) if r["kind"] == "held_out")
    assert first["loss"] == pytest.approx(ready.evaluate(start)["loss"], rel=1e-6)
    saved = json.loads((run / "config.json").read_text())["model"]
    assert (saved["preset"], saved["width"], saved["kv_heads"], saved["tied"]) == (
        "llama",
        24,
        3,
        True,
    )

    # The run needs the folder no more, and goes to another one.
    shutil.rmtree(tmp_path / "weights")
    assert command.main(["--resume", str(run), "--run.steps", "3"]) == 0
    out = tmp_path / "out"
    assert command.main(["export", str(run), "--out", str(out)]) == 0
    trained = load_trained(run)
    assert trained.step == 3
    theirs = json.loads((out / "config.json").read_text())
    arrays = reference.read(out / "model.safetensors")
    exact = reference.forward(theirs, arrays, TOKENS)
    assert_same(logits(trained.model, trained.params), exact)
    assert theirs["eos_token_id"] == 256 and theirs["max_position_embeddings"] == 12
    assert command.main(["export", str(run), "--out", str(out)]) == 2  # not empty


def test_flags_at_odds_with_the_weights_are_refused(tmp_path):
    written(tmp_path, GPT2)
    asked = ["--model.weights", str(tmp_path), "--data.length", "12"]
    config = parse(asked)
    assert (config.model.preset, config.model.positions, config.model.bias) == ("gpt", 19, True)
    for more, said in (
        (["--model.layers", "4"], "model.layers = 4, but the weights in .* have 3"),
        (["--model.rope_base", "4"], "rope_base = 4.0 would have no effect"),
        (["--data.length", "20"], "longer than model.positions = 19"),
    ):
        with pytest.raises(UserError, match=said):
            parse([*asked, *more])


# --- transformers itself


def interpreter():
    """A Python with torch and transformers."""
    if named := os.environ.get("TRANSFORMERS_PYTHON"):
        return named
    here = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return sys.executable if here else None


@pytest.mark.skipif(interpreter() is None, reason="set TRANSFORMERS_PYTHON, or install the extra")
def test_transformers_agrees_both_ways(tmp_path):
    for name in CASES:
        case = tmp_path / name
        case.mkdir()
        (case / "asked.json").write_text(json.dumps(CASES[name]))
        np.save(case / "tokens.npy", TOKENS)
        files = hugging_face.save_pretrained(
            case / "ours", OURS[name], random_params(OURS[name]), largest=9000
        )
        assert len(files) > 3
    script = pathlib.Path(__file__).parents[2] / "support/hugging_face_logits.py"
    subprocess.run([interpreter(), str(script), str(tmp_path)], check=True, timeout=540)
    for name in CASES:
        case = tmp_path / name
        assert len(list((case / "theirs").glob("*.safetensors"))) > 1
        assert_same(logits(OURS[name], random_params(OURS[name])), np.load(case / "ours.npy"))
        assert_same(logits(*loaded(case / "theirs")), np.load(case / "theirs.npy"))
