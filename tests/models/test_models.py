"""The models: sizes of the papers, the exact function, causality, sharding, description by AXES."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models import gpt, llama, vit
from optax_decay.parameters import axes
from tests.references import gpt as reference_gpt
from tests.references import llama as reference_llama

TOY = llama.PRESETS["toy"]
# No field of these is at its default, so that a field that is not read shows.
ODD = dataclasses.replace(
    TOY, rope_base=50.0, norm_eps=0.02, init_std=0.3, base_width=18, base_head_width=10
)
TIED = dataclasses.replace(ODD, tied=True, kv_heads=None, heads=3, layers=2)
GPT = dataclasses.replace(
    gpt.PRESETS["gpt-toy"],
    positions=23,
    norm_eps=0.02,
    init_std=0.3,
    base_width=18,
    base_head_width=10,
)
# Heads of an odd width, no biases, a head of its own.
GPT_BARE = dataclasses.replace(GPT, tied=False, bias=False, heads=8, layers=2)
REFERENCES = {llama: reference_llama, gpt: reference_gpt}


def family(config):
    """The file of models/ that a config belongs to."""
    return sys.modules[type(config).__module__]


def reference(config, *arguments):
    return REFERENCES[family(config)].forward(config, *arguments)


def weights(config, seed=0):
    """Random weights, norm scales and biases included: at their initial 1 or 0 they would hide mistakes."""
    params = jax.jit(lambda key: family(config).init(config, key))(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def noise(path, leaf):
        if path[-1].key == "bias":
            return jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        return leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(noise, params)


def some_tokens(config, B=2, T=7, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)).astype(np.int32)


def rms(x):
    return float(np.sqrt(np.mean(np.asarray(x, np.float64) ** 2)))


def abstract(config):
    return jax.eval_shape(lambda: family(config).init(config, jax.random.key(0)))


def loss(config, params, tokens, place=None):
    logits = family(config).forward(config, params, tokens[:, :-1], place=place)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))


# --- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Conda and AlphaDecay (vocabulary 32000, head of its own)
        ("60M", 58.07),
        ("130M", 134.11),
        ("350M", 367.97),
        ("1B", 1339.08),
        # LLaMA-7B as released
        ("7B", 6738.42),
        # 2 V D + L (4 D² + 3 D F + 2 D) + D with GaLore's shapes
        ("9M", 9.00),
        ("20M", 19.55),
        ("3B", 2685.83),
        # arXiv 2302.13971, table 2: 13.0B, 32.5B, 65.2B; LLaMA-3.2-1B has ROOT's shape
        ("13B", 13015.86),
        ("33B", 32528.94),
        ("65B", 65285.66),
        ("root-1B", 1235.81),
        # GPT-2 as released, all weights
        ("gpt2-124M", 124.439808),
        ("gpt2-355M", 354.823168),
        ("gpt2-774M", 774.030080),
        ("gpt2-1.5B", 1557.611200),
        # V D + T D + L (12 D² + 13 D) + 2 D with the shapes of arXiv 2005.14165, table 2.1
        ("gpt3-125M", 125.226),
        ("gpt3-350M", 355.872),
        ("gpt3-760M", 760.300),
        ("gpt3-1.3B", 1315.723),
        ("gpt3-2.7B", 2651.553),
        ("gpt3-6.7B", 6658.404),
        ("gpt3-13B", 12853.386),
    ],
)
def test_presets_have_the_papers_number_of_weights(name, millions):
    model = llama if name in llama.PRESETS else gpt
    assert model.count(model.PRESETS[name]) == pytest.approx(millions * 1e6, abs=5_000)


def test_our_presets():
    assert 1e6 < llama.count(llama.PRESETS["tiny"]) < 3e6
    assert llama.count(TOY) < 50_000
    assert gpt.count(gpt.PRESETS["gpt-toy"]) < 50_000
    assert not set(llama.PRESETS) & set(gpt.PRESETS)


@pytest.mark.parametrize("config", [ODD, GPT], ids=["llama", "gpt"])
def test_count_is_the_number_of_weights(config):
    params = family(config).init(config, jax.random.key(0))
    assert family(config).count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


# --- the function


@pytest.mark.parametrize(
    "config", [TOY, ODD, TIED, GPT, GPT_BARE], ids=["toy", "odd", "tied", "gpt", "gpt bare"]
)
def test_forward_is_the_reference(config):
    params, tokens = weights(config), some_tokens(config)
    exact = reference(config, params, tokens)
    to_float32 = lambda x: x.astype(np.float32).astype(np.float64)
    stored = rms(reference(config, params, tokens, to_float32) - exact)
    logits = jax.jit(lambda p, t: family(config).forward(config, p, t))(params, tokens)
    assert logits.dtype == jnp.float32
    assert logits.shape == (*tokens.shape, config.vocab_size)
    # `stored` is the error of rounding what is stored once; the sums of up to F products behind
    # each such number round as often again (errors add as squares); 5 is five sigma.
    tolerance = 5 * stored * np.sqrt(config.mlp_width)
    assert tolerance < 1e-4 * rms(exact)
    np.testing.assert_allclose(logits, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", [ODD, GPT], ids=["llama", "gpt"])
def test_bfloat16_errs_as_much_as_rounding_explains(model):
    config = dataclasses.replace(model, dtype="bfloat16")
    params, tokens = weights(config), some_tokens(config, B=3, T=11)
    exact = reference(config, params, tokens)
    to_bfloat16 = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64)
    expected = rms(reference(config, params, tokens, to_bfloat16) - exact)
    logits = family(config).forward(config, params, tokens)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    # Both errors are of the same kind and of ~2000 numbers; XLA may keep more precision between
    # fused operations, but not less. Float32 compute would be 2^16 times better.
    assert expected / 2 < rms(logits - exact) < expected * 1.25
    assert rms(np.asarray(logits) - np.asarray(logits).astype(ml_dtypes.bfloat16)) > 0


@pytest.mark.parametrize("config", [ODD, GPT_BARE], ids=["llama", "gpt"])
def test_no_position_sees_a_later_one(config):
    params = weights(config)
    T = 9
    tokens = np.random.default_rng(0).permutation(config.vocab_size)[None, :T]  # all different

    def logit_sums(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return family(config).forward(config, changed, tokens)[0].sum(-1)

    jacobian_TVD = jax.jacobian(logit_sums)(params["embed"]["embedding"])
    depends_TS = np.abs(np.asarray(jacobian_TVD)).sum(-1)[:, tokens[0]] > 0
    np.testing.assert_array_equal(depends_TS, np.tril(np.ones((T, T), bool)))


def test_rotation_keeps_relative_positions_only():
    T, E, base, shift = 12, 6, 30.0, 5
    angles_TE = llama.rotary_angles(T + shift, E, base)
    np.testing.assert_allclose(angles_TE[1], base ** (-np.arange(0, E, 2) / E), rtol=1e-6)
    rng = np.random.default_rng(0)
    query_E, key_E = rng.normal(size=(2, E)).astype(np.float32)

    def products(start):
        at = lambda x_E: llama.rotate(jnp.tile(x_E, (1, T, 1, 1)), angles_TE[start : start + T])
        return np.asarray(jnp.einsum("BTHE,BSHE->TS", at(query_E[None]), at(key_E[None])))

    # An angle of up to T + shift radians is rounded to 2^-24 of itself; twice that for a pair.
    tolerance = 2 * (T + shift) * 2.0**-23 * np.linalg.norm(query_E) * np.linalg.norm(key_E)
    np.testing.assert_allclose(products(0), products(shift), rtol=0, atol=tolerance)
    for offset in range(-3, 4):
        assert np.ptp(np.diagonal(products(0), offset)) < 2 * tolerance
    assert np.ptp(products(0)) > 100 * tolerance


def test_grouped_queries_are_repeated_keys_and_values():
    grouped, full = ODD, dataclasses.replace(ODD, kv_heads=ODD.heads)
    assert grouped.kv_heads < full.kv_heads and llama.count(grouped) < llama.count(full)
    params, tokens = weights(grouped), some_tokens(grouped)
    attention = dict(params["blocks"]["attention"])
    for name in ("key", "value"):
        kernel = attention[name]["kernel"]
        repeated = jnp.repeat(kernel, grouped.heads // grouped.kv_heads, axis=2)
        attention[name] = {"kernel": repeated}
    repeated = {**params, "blocks": {**params["blocks"], "attention": attention}}
    logits = llama.forward(grouped, params, tokens)
    # The same products in the same order; only their grouping into calls differs.
    tolerance = 2.0**-23 * grouped.mlp_width * float(jnp.abs(logits).max())
    np.testing.assert_allclose(llama.forward(full, repeated, tokens), logits, atol=tolerance)


@pytest.mark.parametrize("tied", [TIED, GPT], ids=["llama", "gpt"])
def test_a_tied_head_is_the_embedding(tied):
    forward, own = family(tied).forward, dataclasses.replace(tied, tied=False)
    params, tokens = weights(tied), some_tokens(tied)
    assert "head" not in params
    embedding = params["embed"]["embedding"]
    with_head = {**params, "head": {"kernel": embedding.T}}
    logits = forward(own, with_head, tokens)
    tolerance = 2.0**-23 * tied.width * float(jnp.abs(logits).max())
    np.testing.assert_allclose(forward(tied, params, tokens), logits, atol=tolerance)
    gradient = jax.grad(lambda p: loss(tied, p, tokens))(params)
    parts = jax.grad(lambda p: loss(own, p, tokens))(with_head)
    both = parts["embed"]["embedding"] + parts["head"]["kernel"].T
    assert rms(parts["embed"]["embedding"]) > 0 and rms(parts["head"]["kernel"]) > 0
    tolerance = 2.0**-23 * tied.width * float(jnp.abs(both).max())
    np.testing.assert_allclose(gradient["embed"]["embedding"], both, atol=tolerance)


# A layer has 7 or 6 matrices and 2 products in attention. "full" repeats all of them but the last
# one, whose result no gradient needs; "dots" only the scores.
@pytest.mark.parametrize(("model", "repeated"), [(ODD, 8), (GPT, 7)], ids=["llama", "gpt"])
def test_remat_recomputes_and_changes_nothing(model, repeated):
    params, tokens = weights(model), some_tokens(model)
    gradients, products = {}, {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(model, remat=remat)
        gradient = jax.grad(lambda p, config=config: loss(config, p, tokens))
        products[remat] = str(jax.make_jaxpr(gradient)(params)).count("dot_general")
        gradients[remat] = jax.jit(gradient)(params)
    assert products["full"] - products["none"] == repeated
    assert products["dots"] - products["none"] == 1
    for remat in ("dots", "full"):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(gradients["none"]),
            jax.tree.leaves(gradients[remat]),
        ):
            # The same operations, fused differently: some roundings of the longest sum.
            largest = (
                a if not unseen(path) else gradients["none"]["blocks"]["attention"]["key"]["kernel"]
            )
            atol = 2.0**-24 * 40 * float(jnp.abs(largest).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))


def unseen(path):
    """A bias of keys adds the same to all scores of a query: the softmax does not see it."""
    return [part.key for part in path[-2:]] == ["key", "bias"]


# --- weights


def test_initial_weights_of_a_gpt():
    """Biases 0, scales 1; out and down are drawn sqrt(2 L) narrower; hidden ones follow the width."""
    config = dataclasses.replace(GPT, width=48, mlp_width=80, base_width=12, init_std=0.07)
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(3))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(part.key for part in path)
        hidden = name.startswith("blocks") and name.endswith("kernel")
        last = name.endswith(("out/kernel", "down/kernel"))
        std = (0.035 if hidden else 0.07) / (np.sqrt(2 * config.layers) if last else 1)
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, name.endswith("scale"))
        else:
            assert abs(float(leaf.std()) - std) <= 5 * std / np.sqrt(2 * leaf.size), name
            assert abs(float(leaf.mean())) <= 5 * std / np.sqrt(leaf.size), name


def test_initial_weights():
    config = dataclasses.replace(TOY, init_std=0.07)
    params = jax.jit(lambda key: llama.init(config, key))(jax.random.key(3))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:  # standard errors of mean and deviation of n normal numbers, five of each
            error = 5 * config.init_std / np.sqrt(leaf.size)
            assert abs(float(leaf.mean())) < error, path
            assert abs(float(leaf.std()) - config.init_std) < error, path
    kernels = [
        *params["blocks"]["attention"]["query"]["kernel"].reshape(config.layers, -1),
        *params["blocks"]["attention"]["out"]["kernel"].reshape(config.layers, -1),
    ]
    for i, a in enumerate(kernels):
        for b in kernels[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)
    again = jax.jit(lambda key: llama.init(config, key))(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = llama.init(config, jax.random.key(4))
    assert not np.array_equal(other["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.parametrize("config", [ODD, GPT], ids=["llama", "gpt"])
def test_gradients_reach_every_weight(config):
    gradient = jax.grad(lambda p: loss(config, p, some_tokens(config)))(weights(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        layers = config.layers if path[0].key == "blocks" else 1
        per_layer = leaf.reshape(layers, -1)
        if not unseen(path):
            assert (np.abs(per_layer).max(axis=1) > 0).all(), path


# --- AXES


@pytest.mark.parametrize(
    "config",
    [ODD, TIED, llama.PRESETS["7B"], GPT, GPT_BARE],
    ids=["odd", "tied", "7B", "gpt", "gpt bare"],
)
def test_axes_describe_every_weight_once(config):
    sizes = {
        "L": config.layers,
        "D": config.width,
        "T": getattr(config, "positions", None),
        "H": config.heads,
        "K": getattr(config, "kv_heads", None) or config.heads,
        "E": config.head_width,
        "F": config.mlp_width,
        "V": config.vocab_size,
    }
    rules = family(config).axes(config)
    used = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        name = "/".join(part.key for part in path)
        matching = [rule for rule in rules if re.fullmatch(rule[0], name)]
        assert len(matching) == 1, (name, matching)
        used += matching
        letters = re.findall("[A-Z]", matching[0][1])
        assert leaf.shape == tuple(sizes[letter] for letter in letters), name
    assert set(used) == set(rules)


def test_axes_give_the_library_roles_and_matrices():
    signatures = axes.resolve(llama.AXES, abstract(ODD))
    leaves = jax.tree.leaves(signatures, is_leaf=lambda x: isinstance(x, axes.Signature))
    D, F, L, V = ODD.width, ODD.mlp_width, ODD.layers, ODD.vocab_size
    KE = ODD.kv_heads * ODD.head_width
    assert {s.path: (s.role, s.matrix_shape) for s in leaves if s.is_matrix} == {
        "embed/embedding": ("embedding", (1, V, D)),
        "blocks/attention/query/kernel": ("hidden", (L, D, D)),
        "blocks/attention/key/kernel": ("hidden", (L, D, KE)),
        "blocks/attention/value/kernel": ("hidden", (L, D, KE)),
        "blocks/attention/out/kernel": ("hidden", (L, D, D)),
        "blocks/mlp/gate/kernel": ("hidden", (L, D, F)),
        "blocks/mlp/up/kernel": ("hidden", (L, D, F)),
        "blocks/mlp/down/kernel": ("hidden", (L, F, D)),
        "head/kernel": ("head", (1, D, V)),
    }
    assert {s.path for s in leaves if s.role == "vector"} == {
        "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        "final_norm/scale",
    }
    axes.resolve(llama.axes(TIED), abstract(TIED))
    with pytest.raises(ValueError, match="head"):
        axes.resolve(llama.AXES, abstract(TIED))


def test_axes_of_a_gpt_give_roles():
    described = axes.signatures(gpt.axes(GPT_BARE), abstract(GPT_BARE)).values()
    roles = {
        role: {s.path for s in described if s.role == role}
        for role in ("hidden", "embedding", "head")
    }
    blocks = (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "mlp/up",
        "mlp/down",
    )
    assert roles["hidden"] == {f"blocks/{name}/kernel" for name in blocks}
    assert roles["embedding"] == {"embed/embedding", "position/embedding"}
    assert roles["head"] == {"head/kernel"}
    vectors = [
        s for s in axes.signatures(gpt.axes(GPT), abstract(GPT)).values() if s.role == "vector"
    ]
    assert len(vectors) == 12  # six biases of matrices, scale and bias of three norms


# --- a base width


def test_weights_of_a_wider_model():
    """Hidden matrices have the variance init_std² · base/width, all others that of the base."""
    config = dataclasses.replace(TOY, init_std=0.07, width=48, mlp_width=80, base_width=12)
    params = jax.jit(lambda key: llama.init(config, key))(jax.random.key(3))
    described = axes.signatures(llama.axes(config), params)
    for (path, leaf), signature in zip(
        jax.tree_util.tree_leaves_with_path(params), described.values()
    ):
        std = {"hidden": 0.035, "embedding": 0.07, "head": 0.07, "vector": 0.0}[signature.role]
        assert abs(float(leaf.std()) - std) <= 5 * std / np.sqrt(leaf.size), path


@pytest.mark.parametrize("model", [TOY, gpt.PRESETS["gpt-toy"]], ids=["llama", "gpt"])
def test_at_its_base_width_a_model_is_as_without(model):
    based = dataclasses.replace(model, base_width=model.width, base_head_width=model.head_width)
    params, tokens = weights(model), some_tokens(model)
    jax.tree.map(np.testing.assert_array_equal, params, weights(based))
    one, other = (
        jax.jit(lambda p, t, c=config: family(c).forward(c, p, t))(params, tokens)
        for config in (model, based)
    )
    np.testing.assert_array_equal(one, other)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 7}, "heads=7 must divide width=512 .* nearest: heads=8"),
        ({"heads": 512}, "even number of features; nearest: heads=256"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=8; nearest: kv_heads=2"),
        ({"kv_heads": 0}, "kv_heads=0 must divide heads=8; nearest: kv_heads=1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"init_std": 0.0}, "init_std=0.0 must be greater than 0"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06"),
        ({"base_width": 0}, "base_width=0 must be at least 1, or None"),
        ({"base_head_width": 64}, "base_head_width=64 needs a base_width"),
        ({"rope_base": float("nan")}, "rope_base=nan"),
        ({"dtype": "bf16"}, "dtype='bf16' must be one of .*'bfloat16'"),
        ({"remat": "all"}, "remat='all' must be one of .*'full'"),
        ({"attention": "flash"}, "attention='flash' must be one of .*'cudnn'"),
        ({"attention": "cudnn"}, 'attention="cudnn" needs dtype="bfloat16"'),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        llama.Config(**change)


@pytest.mark.parametrize(
    "model",
    [
        *(llama.PRESETS["tiny"], llama.PRESETS["toy"], llama.PRESETS["130M"]),
        *(gpt.PRESETS["gpt-toy"], vit.PRESETS["vit-toy"]),
    ],
)
def test_every_suggested_shape_is_a_valid_one(model):
    suggested = 0
    for width in (1, 3, 25, 26, 30, 127, 1000):
        for heads in (1, 2, 3, 4, 7, 33, 200):
            try:
                dataclasses.replace(model, width=width, heads=heads)
            except ValueError as error:
                for shape in str(error).split("nearest: ")[1].split(", or "):
                    parts = dict(part.split("=") for part in shape.split(" with "))
                    changes = {name: int(value) for name, value in parts.items()}
                    dataclasses.replace(model, **{"width": width, "heads": heads, **changes})
                    suggested += 1
    assert suggested > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 7}, "heads=7 must divide width=768; nearest: heads=6"),
        ({"positions": 0}, "positions=0 must be at least 1"),
        ({"norm_eps": float("inf")}, "norm_eps=inf must be greater than 0 and finite"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
    ],
)
def test_impossible_gpts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gpt.Config(**change)


def test_a_sequence_longer_than_the_positions_is_refused():
    tokens = some_tokens(GPT, T=GPT.positions + 1)
    with pytest.raises(ValueError, match="24 tokens is longer than positions=23"):
        gpt.forward(GPT, weights(GPT), tokens)
