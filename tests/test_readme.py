"""The code in README.md runs, and does what the text beside it says; CONTRIBUTING.md names what exists."""

import pathlib
import re

import jax
import numpy as np
import optax
import pytest

import optax_decay
from models import llama
from tests.support import toy

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
LLAMA = jax.eval_shape(lambda: llama.init(llama.PRESETS["toy"], jax.random.key(0)))
NAMES = {
    "optax": optax,
    "optax_decay": optax_decay,
    "b1": 0.8,
    "b2": 0.9,
    "lr": 0.05,
    "mask": {**jax.tree.map(lambda _: True, toy.params()), "bias": False},
}


def block_with(text):
    (block,) = [block for block in BLOCKS if text in block]
    return block


def described():
    """README's description of a small LLaMA."""
    names = {}
    exec(block_with("AXES = ("), names)
    return names["AXES"]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block):
    exec(block, {**NAMES, "AXES": described(), "params": LLAMA})


def test_the_readme_is_short_enough_to_read():
    assert len(README.splitlines()) <= 150


def test_the_first_screen_is_the_reason_six_lines_of_code_and_the_picture():
    first, rest = README.split("\n## ", 1)
    assert len(first.splitlines()) <= 24
    code = [line for line in BLOCKS[0].splitlines() if line]
    assert len(code) <= 6 and BLOCKS[0] in first
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", first) == ["notebooks/results/compare-map/map.png"]
    assert README.count("AXES = (") == 1, "shown once, whole"
    assert rest.startswith("Start")


def test_the_axes_of_the_readme_are_those_of_the_model():
    ours = optax_decay.axes.signatures(described(), LLAMA)
    assert ours == optax_decay.axes.signatures(llama.AXES, LLAMA)
    assert {s.role for s in ours.values()} == {"hidden", "embedding", "head", "vector"}


def test_the_product_of_the_readme_is_one_link_of_a_chain():
    names = {**NAMES, "AXES": described(), "params": LLAMA}
    exec(block_with("thresholds.mean_size"), names)
    params = llama.init(llama.PRESETS["toy"], jax.random.key(0))
    updates, _ = names["decay"].update(
        jax.tree.map(np.ones_like, params), names["decay"].init(params), params
    )
    moved = {
        jax.tree_util.keystr(key, simple=True, separator="/")
        for key, u in jax.tree_util.tree_flatten_with_path(updates)[0]
        if np.any(u != 1)
    }
    signatures = optax_decay.axes.signatures(described(), params)
    assert moved == {path for path, s in signatures.items() if s.role == "hidden"}


def test_the_rules_of_the_readme_leave_out_norms_biases_and_embeddings():
    """With the names that Flax and PyTorch give them."""
    (rules,) = re.findall(r"mask=(\(\(.*\)\))\)", block_with("(?i:"))
    left_out = (
        *("LayerNorm_0/scale", "ln_1/scale", "blocks/attention_norm/scale", "norm/weight"),
        *("ln_f/weight", "Dense_0/bias", "Embed_0/embedding", "embed/embedding"),
    )
    decayed = ("Dense_0/kernel", "blocks/attention/query/kernel", "mlp/fc/weight", "lm_head/kernel")
    params = toy.nest({path: np.ones((2, 3), np.float32) for path in left_out + decayed})
    rows = optax_decay.decay_table(params, 0.1, mask=eval(rules)).rows
    assert {row.path for row in rows if row.rate} == set(decayed)


def test_the_migration_line_is_adamw_bit_for_bit():
    ours = eval(block_with("now replace this line").strip(), dict(NAMES))
    adamw = optax.adamw(0.05, 0.8, 0.9, weight_decay=0.1, mask=NAMES["mask"])

    def run(tx):
        params = toy.params()
        state = tx.init(params)
        for gradient in toy.gradients(4):
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    undecayed = run(optax.adam(0.05, 0.8, 0.9))
    for x, y, z in zip(*map(jax.tree.leaves, (run(ours), run(adamw), undecayed))):
        np.testing.assert_array_equal(x, y)
        assert x.ndim == 1 or np.any(x != z)


def test_what_contributing_names_exists_and_it_names_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`([\w./-]*/[\w./-]*)`", text))
    inside = {
        f"{top}/{folder}"
        for top in ("optax_decay", "train")
        for folder in re.findall(
            r"^\| `(\w+/)` \|", text.split(f"folder of `{top}/`")[1].split("\n\n")[0], re.M
        )
    }
    to_write = {name for name in named if "example" in name}
    short = {"compare/", "regimes/", "width/"} | {name.split("/", 1)[1] for name in inside}
    for name in (named - to_write - short) | inside:
        assert (ROOT / name).exists(), name
    for name in to_write:
        assert (ROOT / name).parent.is_dir(), name
    folders = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("optax_decay", "train")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    assert folders == inside, "the tables of CONTRIBUTING.md hold every folder once"
