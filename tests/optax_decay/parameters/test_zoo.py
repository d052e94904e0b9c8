"""Axes found on models of other people's kinds: roles, orientation, stacks, and text that can be pasted."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optax_decay
from optax_decay.parameters import axes

WIDTH, MLP, HEADS, GROUPS, TOKENS, EXPERTS = 16, 48, 4, 2, 50, 8


def found(model, params):
    """Role, and matrix shape if it is a matrix, by path; the pasted text must say the same."""
    rules = axes.infer(model)
    pasted: dict = {}
    exec(str(rules), pasted)
    assert pasted["AXES"] == tuple(rules)
    read = axes.signatures(pasted["AXES"], params)
    assert read == axes.signatures(rules, params)
    assert set(rules.basis) == set(read)
    return {p: (s.role, s.matrix_shape if s.is_matrix else None) for p, s in read.items()}


def nnx_block(rngs):
    class Block(nnx.Module):
        def __init__(self, rngs):
            make = lambda a, b, **more: nnx.LinearGeneral(a, b, use_bias=False, rngs=rngs, **more)
            self.q, self.k = make(WIDTH, (HEADS, 4)), make(WIDTH, (GROUPS, 4))
            self.o = make((HEADS, 4), WIDTH, axis=(-2, -1))
            self.gate_up = nnx.Linear(WIDTH, 2 * MLP, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(MLP, WIDTH, use_bias=False, rngs=rngs)
            self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    return Block(rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs, stacked):
        self.tokens = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        stack = nnx.split_rngs(splits=3)(nnx.vmap(nnx_block, in_axes=0, out_axes=0))
        self.blocks = stack(rngs) if stacked else nnx.List([nnx_block(rngs) for _ in range(3)])
        self.experts_up = nnx.Param(jnp.ones((EXPERTS, WIDTH, MLP)))
        self.experts_down = nnx.Param(jnp.ones((EXPERTS, MLP, WIDTH)))
        self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs)
        self.out = nnx.Linear(WIDTH, TOKENS, rngs=rngs)


@pytest.mark.parametrize("stacked", [False, True])
def test_grouped_queries_gates_and_experts_in_nnx(stacked):
    model = NnxModel(nnx.Rngs(0), stacked)
    params = nnx.state(model, nnx.Param)
    got = found(model, params)
    block, L = ("blocks", 3) if stacked else ("blocks/2", 1)
    assert got[f"{block}/q/kernel"] == ("hidden", (L, WIDTH, HEADS * 4))
    assert got[f"{block}/k/kernel"] == ("hidden", (L, WIDTH, GROUPS * 4))
    assert got[f"{block}/o/kernel"] == ("hidden", (L, HEADS * 4, WIDTH))
    assert got[f"{block}/gate_up/kernel"] == ("hidden", (L, WIDTH, 2 * MLP))
    assert got["experts_up"] == ("hidden", (EXPERTS, WIDTH, MLP))
    assert got["experts_down"] == ("hidden", (EXPERTS, MLP, WIDTH))
    assert got["router/kernel"] == ("hidden", (1, WIDTH, EXPERTS))
    assert got["out/kernel"] == ("head", (1, WIDTH, TOKENS))
    assert got["tokens/embedding"] == ("embedding", (1, TOKENS, WIDTH))
    # Without axes an optimizer sees names alone, and reads the same.
    plain = axes.signatures(None, params)
    assert {p: (s.role, s.matrix_shape if s.is_matrix else None) for p, s in plain.items()} == got


class Vit(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), name="embedding")(x).reshape(len(x), -1, WIDTH)
        x += self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], WIDTH))
        x += self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(MLP)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def test_a_linen_vit():
    params = Vit().init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"]
    got = found(params, params)
    assert got["embedding/kernel"] == ("embedding", (16, 3, WIDTH))
    assert got["pos_embedding"] == ("embedding", (1, 9, WIDTH))
    assert got["cls"] == ("vector", None)
    assert got["Dense_1/kernel"] in (("hidden", (1, WIDTH, MLP)), ("hidden", (1, MLP, WIDTH)))
    assert got["Dense_4/kernel"] == ("head", (1, WIDTH, 10))
    # Its name does not say that the last layer is the head: without axes, it is a guess that warns.
    plain = axes.signatures(None, params)
    assert {p for p, s in plain.items() if s.source == "guess"} == {"Dense_4/kernel"}
    for make in (
        lambda: optax_decay.scale_by_muon(),
        lambda: optax_decay.scale_by_root(),
        lambda: optax_decay.scale_by_conda(),
        lambda: optax_decay.decay(0.1, mask="hidden"),
    ):
        with pytest.warns(optax_decay.GuessedRolesWarning, match="Dense_4/kernel"):
            make().init(params)


class Labelled(nn.Module):
    @nn.compact
    def __call__(self, x):
        named = lambda *labels: nn.with_partitioning(nn.initializers.normal(), labels)
        wi = self.param("first", named("exp", "embed", "mlp"), (EXPERTS, WIDTH, MLP))
        wo = self.param("second", named("exp", "mlp", "embed"), (EXPERTS, MLP, WIDTH))
        self.param("third", named("data", "model"), (WIDTH, 3))
        return jnp.einsum("bd,edf,efg->bg", x, wi, wo)


def test_labels_are_evidence_and_mesh_axes_are_not():
    params = Labelled().init(jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]
    with pytest.raises(ValueError, match=r"'third'.*could be 'D -> F', 'F D : D -> F'"):
        axes.infer(params)
    params.pop("third")
    got = found(params, params)
    assert got["first"] == ("hidden", (EXPERTS, WIDTH, MLP))
    assert got["second"] == ("hidden", (EXPERTS, MLP, WIDTH))
    assert "('exp', 'embed', 'mlp')" in axes.infer(params).basis["first"]


class Mixer(eqx.Module):
    patches: eqx.nn.Conv2d
    pixels: eqx.nn.ConvTranspose2d
    blocks: list
    norm: eqx.nn.LayerNorm

    def __init__(self, keys):
        self.patches = eqx.nn.Conv2d(1, WIDTH, 4, 4, key=keys[0])
        self.pixels = eqx.nn.ConvTranspose2d(WIDTH, 1, 4, 4, key=keys[1])
        tokens = lambda key: eqx.nn.MLP(9, 9, 24, 1, key=key)
        channels = lambda key: eqx.nn.MLP(WIDTH, WIDTH, MLP, 1, key=key)
        self.blocks = [(tokens(k), channels(k)) for k in keys[2:]]
        self.norm = eqx.nn.LayerNorm((WIDTH, 9))


def test_an_equinox_mixer():
    model = Mixer(jax.random.split(jax.random.key(0), 4))
    got = found(model, eqx.filter(model, eqx.is_array))
    assert got["patches/weight"] == ("embedding", (16, 1, WIDTH))
    assert got["pixels/weight"] == ("head", (16, WIDTH, 1))
    assert got["blocks/1/0/layers/0/weight"] == ("hidden", (1, 9, 24))
    assert got["blocks/1/1/layers/1/weight"] == ("hidden", (1, MLP, WIDTH))
    assert got["norm/weight"] == ("vector", None)
    assert len(axes.infer(model)) < len(got)  # blocks share their rules


def test_kernels_that_are_stored_the_other_way_round():
    """transformers' GPT-2 for Flax stores [outputs, inputs]; biases and the embedding show it, square ones follow."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    dense = lambda out, into: {"kernel": shape(out, into), "bias": shape(out)}
    params = {
        "wte": {"embedding": shape(TOKENS, WIDTH)},
        "h": {
            "attn": {"c_attn": dense(3 * WIDTH, WIDTH), "c_proj": dense(WIDTH, WIDTH)},
            "mlp": {"c_fc": dense(MLP, WIDTH), "c_proj": dense(WIDTH, MLP)},
        },
    }
    got = found(params, params)
    assert got["h/mlp/c_fc/kernel"] == ("hidden", (1, WIDTH, MLP))
    assert got["h/mlp/c_proj/kernel"] == ("hidden", (1, MLP, WIDTH))
    assert axes.signatures(axes.infer(params), params)["h/attn/c_proj/kernel"].inputs == (1,)
    factors = optax_decay.width.decay_multipliers(
        params, {"D": 8, "F": 24, "G": 24, "D2": 8}, law=optax_decay.width.law(exponent=1.0)
    )
    assert factors["h"]["mlp"]["c_fc"]["kernel"] == factors["h"]["mlp"]["c_proj"]["kernel"] == 2.0


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(tokens):
        x = hk.Embed(TOKENS, WIDTH)(tokens)
        w = hk.initializers.VarianceScaling(1.0)
        x += hk.MultiHeadAttention(HEADS, 4, w_init=w, model_size=WIDTH)(x, x, x)
        x += hk.nets.MLP([MLP, WIDTH])(hk.LayerNorm(-1, True, True)(x))
        return hk.Linear(TOKENS)(x)

    params = hk.transform(forward).init(jax.random.key(0), jnp.zeros((1, 5), int))
    got = found(params, params)
    assert got["embed/embeddings"] == ("embedding", (1, TOKENS, WIDTH))
    assert got["mlp/~/linear_0/w"] == ("hidden", (1, WIDTH, MLP))
    assert got["linear/w"] == ("head", (1, WIDTH, TOKENS))
    assert got["layer_norm/scale"] == got["linear/b"] == ("vector", None)


def test_haliax():
    hax = pytest.importorskip("haliax")
    Embed, Mlp, Vocab, Layers = (
        hax.Axis(n, s) for n, s in zip(("embed", "mlp", "vocab", "layers"), (WIDTH, MLP, TOKENS, 3))
    )

    class Block(eqx.Module):
        up: hax.nn.Linear
        norm: hax.nn.LayerNorm

        @staticmethod
        def init(*, key):
            return Block(hax.nn.Linear.init(Embed, Mlp, key=key), hax.nn.LayerNorm.init(Embed))

    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "table": hax.nn.Embedding.init(Vocab, Embed, key=keys[0]),
        "blocks": hax.nn.Stacked.init(Layers, Block)(key=keys),
        "last": hax.nn.Linear.init(Mlp, Vocab, key=keys[1]),
    }
    got = found(model, eqx.filter(model, eqx.is_array))
    assert got["table/weight/0"] == ("embedding", (1, TOKENS, WIDTH))
    assert got["blocks/stacked/up/weight/0"] == ("hidden", (3, WIDTH, MLP))
    assert got["blocks/stacked/norm/weight/0"] == ("vector", None)
    assert got["last/weight/0"] == ("head", (1, MLP, TOKENS))
