"""Axes that are found: on real modules of Flax NNX, Flax Linen and Equinox, and on trees that others name."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_decay
from optax_decay.parameters import axes

WIDTH, MLP, HEADS, VOCABULARY = 16, 48, 4, 50


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
        self.up = nnx.Linear(WIDTH, MLP, rngs=rngs)
        self.down = nnx.Linear(MLP, WIDTH, use_bias=False, rngs=rngs)
        self.before, self.after = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs, stacked):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(12, WIDTH, rngs=rngs)
        if stacked:
            make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
            self.blocks = make(rngs)
        else:
            self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)


def roles(model, params):
    """Role and matrix shape by path, from the rules that were found."""
    found = axes.signatures(axes.infer(model), params)
    return {path: (s.role, s.matrix_shape if s.is_matrix else None) for path, s in found.items()}


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_nnx(stacked):
    model = NnxModel(nnx.Rngs(0), stacked)
    found = roles(model, nnx.state(model, nnx.Param))
    block, layers = ("blocks", 3) if stacked else ("blocks/1", 1)
    assert found["embed/embedding"] == ("embedding", (1, VOCABULARY, WIDTH))
    assert found["positions/embedding"] == ("embedding", (1, 12, WIDTH))
    assert found[f"{block}/attention/query/kernel"] == ("hidden", (layers, WIDTH, WIDTH))
    assert found[f"{block}/attention/out/kernel"] == ("hidden", (layers, WIDTH, WIDTH))
    assert found[f"{block}/up/kernel"] == ("hidden", (layers, WIDTH, MLP))
    assert found[f"{block}/down/kernel"] == ("hidden", (layers, MLP, WIDTH))
    assert found["head/kernel"] == ("head", (1, WIDTH, VOCABULARY))
    vectors = {path for path, (role, _) in found.items() if role == "vector"}
    assert vectors == {path for path in found if path.endswith(("bias", "scale"))}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h)
        h = nn.gelu(nn.Dense(MLP)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h), None


class LinenModel(nn.Module):
    axis: int | None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        if self.axis is None:
            for _ in range(3):
                x, _ = LinenBlock()(x, None)
        else:
            options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
            x, _ = nn.scan(LinenBlock, length=3, **options)(name="layers")(x, None)
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm()(x))


@pytest.mark.parametrize("axis", [None, 0, 1])  # MaxText stacks its layers along axis 1
def test_flax_linen(axis):
    params = LinenModel(axis).init(jax.random.key(0), jnp.zeros((1, 5), int))
    found = roles(params, params)
    block, layers = ("params/LinenBlock_0", 1) if axis is None else ("params/layers", 3)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    assert found["params/Embed_0/embedding"] == ("embedding", (1, VOCABULARY, WIDTH))
    assert found[f"{attention}/key/kernel"] == ("hidden", (layers, WIDTH, WIDTH))
    assert found[f"{attention}/out/kernel"] == ("hidden", (layers, WIDTH, WIDTH))
    assert {found[f"{block}/Dense_{i}/kernel"] for i in (0, 1)} == {
        ("hidden", (layers, WIDTH, MLP)),
        ("hidden", (layers, MLP, WIDTH)),
    }
    assert found["params/logits/kernel"] == ("head", (1, WIDTH, VOCABULARY))
    vectors = {path for path, (role, _) in found.items() if role == "vector"}
    assert vectors == {path for path in found if path.endswith(("bias", "scale"))}


def test_equinox():
    keys = jax.random.split(jax.random.key(0), 4)
    model = {
        "tokens": eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[1]),
        "norm": eqx.nn.LayerNorm(WIDTH),
    }

    class Model(eqx.Module):
        parts: dict
        mlp: eqx.nn.MLP
        out: eqx.nn.Linear

    mlp = eqx.nn.MLP(WIDTH, WIDTH, MLP, 2, key=keys[2])
    whole = Model(model, mlp, eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[3]))
    found = roles(whole, eqx.filter(whole, eqx.is_array))
    assert found["parts/tokens/weight"] == ("embedding", (1, VOCABULARY, WIDTH))
    assert found["parts/attention/output_proj/weight"] == ("hidden", (1, WIDTH, WIDTH))
    assert found["mlp/layers/0/weight"] == ("hidden", (1, WIDTH, MLP))
    assert found["mlp/layers/2/weight"] == ("hidden", (1, MLP, WIDTH))
    assert found["out/weight"] == ("head", (1, WIDTH, VOCABULARY))
    assert found["parts/norm/weight"][0] == found["mlp/layers/1/bias"][0] == "vector"


def test_an_mlp_of_equinox_has_fixed_ends():
    """What enters and what leaves does not grow with the width; in between everything does."""
    mlp = eqx.nn.MLP(in_size=8, out_size=4, width_size=16, depth=3, key=jax.random.key(0))
    found = roles(mlp, eqx.filter(mlp, eqx.is_array))
    assert [found[f"layers/{i}/weight"][0] for i in range(4)] == [
        *("embedding", "hidden", "hidden", "head")
    ]


def test_names_of_transformers():
    """PyTorch's layout is [outputs, inputs]."""
    shape = jax.ShapeDtypeStruct
    layer = "model.layers.0"
    params = {
        "model.embed_tokens.weight": shape((VOCABULARY, WIDTH), jnp.float32),
        f"{layer}.self_attn.k_proj.weight": shape((8, WIDTH), jnp.float32),
        f"{layer}.mlp.down_proj.weight": shape((WIDTH, MLP), jnp.float32),
        f"{layer}.mlp.up_proj.weight": shape((MLP, WIDTH), jnp.float32),
        f"{layer}.input_layernorm.weight": shape((WIDTH,), jnp.float32),
        "lm_head.weight": shape((VOCABULARY, WIDTH), jnp.float32),
    }
    found = roles(params, params)
    assert found[f"{layer}.self_attn.k_proj.weight"] == ("hidden", (1, WIDTH, 8))
    assert found[f"{layer}.mlp.down_proj.weight"] == ("hidden", (1, MLP, WIDTH))
    assert found["lm_head.weight"] == ("head", (1, WIDTH, VOCABULARY))
    assert found["model.embed_tokens.weight"] == ("embedding", (1, VOCABULARY, WIDTH))


def test_what_is_found_can_be_pasted_and_says_what_it_rests_on():
    model = NnxModel(nnx.Rngs(0), stacked=True)
    found = axes.infer(model)
    pasted: dict = {}
    exec(str(found), pasted)
    assert pasted["AXES"] == tuple(found)
    assert found.basis["blocks/up/kernel"] == "flax.nnx.Linear"
    params = nnx.state(model, nnx.Param)
    assert axes.signatures(pasted["AXES"], params) == axes.signatures(found, params)


def test_one_letter_has_one_size():
    model = NnxModel(nnx.Rngs(0), stacked=True)
    sizes: dict = {}
    for signature in axes.signatures(axes.infer(model), nnx.state(model, nnx.Param)).values():
        for name, size in zip(signature.names, signature.shape):
            assert sizes.setdefault(name, size) == size


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_what_is_not_known_raises_with_the_candidates(shape):
    params = {"norm": {"scale": jnp.zeros(4)}, "mystery": {"theta": jnp.zeros(shape)}}
    with pytest.raises(ValueError, match=r"'mystery/theta'.*could be.*->"):
        axes.infer(params)


def test_the_found_axes_steer_a_decay():
    """Hidden matrices and the head decay; embeddings, norms and biases do not."""
    params = LinenModel(0).init(jax.random.key(0), jnp.zeros((1, 5), int))
    link = optax_decay.decay(0.5, mask=("hidden", "head"), axes=axes.infer(params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = link.update(zeros, link.init(params), params)
    moved = {p for p, u in axes.signatures(None, updates).items() if jnp.any(_at(updates, p))}
    assert moved == {p for p in axes.signatures(None, params) if p.endswith("kernel")}
    assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize("axis", [None, 0])
def test_without_axes_names_decide_and_nothing_is_guessed_against_them(axis):
    """Attention kernels of three dimensions are matrices; stacked norm scales and biases are not."""
    params = LinenModel(axis).init(jax.random.key(0), jnp.zeros((1, 5), int))
    found = axes.signatures(None, params)
    block = "params/LinenBlock_0" if axis is None else "params/layers"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    assert found[f"{attention}/query/kernel"].role == "hidden"
    assert found[f"{attention}/query/bias"].role == "vector"
    assert found[f"{block}/LayerNorm_0/scale"].role == "vector"
    assert found[f"{block}/Dense_0/kernel"].matrix_shape[0] == (1 if axis is None else 3)
    assert found["params/Embed_0/embedding"].role == "embedding"
    assert found["params/logits/kernel"].role == "head"
    assert {s.source for s in found.values()} == {"name"}


HAND_WRITTEN = {
    "wte": ((60, 24), "V -> D"),
    "block/w_q": ((24, 6, 4), "D -> H2 K"),
    "block/w_kv": ((2, 24, 2, 4), "B | D -> H K"),
    "block/w_o": ((6, 4, 24), "H2 K -> D"),
    "block/w_gate": ((24, 40), "D -> F"),
    "block/w_down": ((40, 24), "F -> D"),
    "block/ln": ((24,), "D"),
    "unembed": ((24, 60), "D -> V"),
}
GEMMA = {
    "embedder/input_embedding": ((60, 24), "V -> D"),
    "layer_0/attn/q_einsum/w": ((6, 24, 4), "H2 D K : D -> H2 K"),
    "layer_0/attn/kv_einsum/w": ((2, 2, 24, 4), "B H D K : B | D -> H K"),
    "layer_0/attn/attn_vec_einsum/w": ((6, 4, 24), "H2 K -> D"),
    "layer_0/mlp/gating_einsum": ((2, 24, 40), "B | D -> F"),
    "layer_0/mlp/linear": ((40, 24), "F -> D"),
    "layer_0/pre_attention_norm/scale": ((24,), "D"),
    "final_norm/scale": ((24,), "D"),
}
LLAMA = {
    "tok_embeddings": ((60, 24), "V -> D"),
    "layers/0/attention/output/kernel": ((24, 24), "D -> D2"),
    "layers/0/feed_forward/w1": ((24, 40), "D -> F"),
    "layers/0/feed_forward/w2": ((40, 24), "F -> D"),
    "norm": ((24,), "D"),
    "output": ((24, 60), "D -> V"),
}
LAYERS = {
    "0/W": ((7, 12), "P -> D [embedding]"),
    "0/B": ((12,), "D"),
    "1/W": ((12, 9), "D -> F"),
    "1/B": ((9,), "F"),
    "2/W": ((9, 5), "F -> C [head]"),
    "2/A_log": ((5, 3), "C G"),
}


# What MaxText 0.2.5 makes of decoder_block=deepseek: latent attention, a stack of one dense layer, experts.
DEEPSEEK = {
    "token_embedder/embedding": ((128, 64), "V -> D"),
    "decoder/dense_layers/mlp/wi_0/kernel": ((64, 1, 96), "D L F : L | D -> F"),
    "decoder/dense_layers/mlp/wo/kernel": ((96, 1, 64), "F L D : L | F -> D"),
    "decoder/dense_layers/self_attention/wkv_b/kernel": (
        (512, 1, 4, 256),
        "J L H K : L | J -> H K",
    ),
    "decoder/dense_layers/self_attention/kv_norm/scale": ((512, 1), "J L : L | J"),
    "decoder/dense_layers/post_self_attention_layer_norm/scale": ((64, 1), "D L : L | D"),
    "decoder/moe_layers/post_self_attention_layer_norm/scale": ((64, 2), "D L : L | D"),
    "decoder/moe_layers/self_attention/wkv_a/kernel": ((64, 2, 576), "D L I : L | D -> I"),
    "decoder/moe_layers/self_attention/wkv_b/kernel": ((512, 2, 4, 256), "J L H K : L | J -> H K"),
    "decoder/moe_layers/self_attention/query/kernel": ((64, 2, 4, 192), "D L H M : L | D -> H M"),
    "decoder/moe_layers/self_attention/out/kernel": ((4, 2, 128, 64), "H L N D : L | H N -> D"),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": (
        (64, 2, 4),
        "D L G : L | D -> G",
    ),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0": ((4, 2, 64, 32), "E L | D -> W"),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo": ((4, 2, 32, 64), "E L | W -> D"),
    "decoder/decoder_norm/scale": ((64,), "D"),
    "decoder/logits_dense/kernel": ((64, 128), "D -> V"),
}


@pytest.mark.parametrize("tree", [HAND_WRITTEN, GEMMA, LLAMA, LAYERS, DEEPSEEK])
def test_models_written_by_hand(tree):
    """Bare arrays with the names of papers' programs: einsum kernels, kernels in a list, several in one array."""
    shapes = {p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, (shape, _) in tree.items()}
    found = axes.infer(shapes)
    known = axes.signatures(tuple(found), shapes)
    said = axes.signatures(tuple((p, rule) for p, (_, rule) in tree.items()), shapes)
    for path in tree:
        for what in ("role", "matrix_shape", "batch_shape"):
            assert getattr(known[path], what) == getattr(said[path], what), (path, what)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("multi_head_attention/query_proj/kernel", "hidden"),
        ("transpose/kernel", "hidden"),
        ("post_mlp/kernel", "hidden"),
        ("token_mixer/kernel", "hidden"),
        ("time_embed/dense/kernel", "hidden"),
        ("unembed/kernel", "head"),
        ("embed_out/weight", "head"),
        ("decoder/logits_dense/kernel", "head"),
        ("wpe/embedding", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("embeddings/word_embeddings/weight", "embedding"),
        ("patch_embed/kernel", "embedding"),
        ("output/kernel", "head"),
        ("blocks/attention/output/kernel", "hidden"),
        ("ln_1/scale", "vector"),
        ("model.layers.0.post_attention_layernorm.weight", "vector"),
    ],
)
def test_names_are_read_as_whole_components(path, role):
    """A word inside another word says nothing: "pos" in "transpose", "head" in "multi_head_attention"."""
    shape = (6,) if role == "vector" else (4, 6)
    found = axes.signatures(None, {path: jax.ShapeDtypeStruct(shape, jnp.float32)})
    assert found[path].role == role and found[path].source == "name"


def test_a_role_that_is_guessed_warns():
    params = {"mystery": jnp.ones((4, 6)), "offset": jnp.ones(4)}
    with pytest.warns(optax_decay.GuessedRolesWarning, match=r"'mystery'.*guessed to be 'hidden'"):
        optax_decay.decay(0.1, mask="hidden").init(params)
    named = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optax_decay.decay(0.1, mask="hidden").init(named)
        optax_decay.decay(0.1).init(params)


def test_a_mask_that_decays_nothing_warns():
    params = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    for mask in ("head", {"up": False}, ((".*", 0.0),), lambda p: jax.tree.map(lambda x: False, p)):
        with pytest.warns(optax_decay.NothingDecaysWarning):
            optax_decay.decay(0.1, mask=mask).init(params)


@pytest.mark.parametrize(
    ("mask", "leaf", "says"),
    [
        (lambda path: "kernel" in path, jnp.ones((4, 6)), "called once, with the tree"),
        (lambda path: "bias" not in path, jnp.ones((4, 6)), "called once, with the tree"),
        ({"up": "yes"}, jnp.ones((4, 6)), "'up' is 'yes'"),
        (None, jnp.ones((4, 6), int), "'up' holds integers"),
        (None, jnp.ones((0, 6)), "'up' of shape .0, 6. has no elements"),
    ],
)
def test_what_cannot_decay_is_named(mask, leaf, says):
    with pytest.raises(ValueError, match=says):
        optax_decay.decay(0.1, mask=mask).init({"up": leaf})


def _at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree
