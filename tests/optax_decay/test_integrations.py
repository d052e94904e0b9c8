"""One line each in other people's training code: real optimizers and wrappers of the libraries named in the tests.

MaxText needs Python 3.12 and pins what it needs; its hook, `get_optimizer(config, learning_rate_schedule)`, returns an
optax transformation, and the test has that shape and no more. The names and shapes are those that MaxText 0.2.5 makes.
Levanter and haliax work with this jax as pre-releases alone, so their tests run where somebody has installed them; they
passed with levanter 1.2.dev1644 and haliax 1.4.dev453.
"""

import dataclasses
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_decay
from optax_decay import masks
from optax_decay.parameters import axes, paths

WIDTH, MLP, TOKENS = 8, 12, 20
RATE, DECAY = 0.5, 0.2
KEPT = 1 - RATE * DECAY  # of a weight without a gradient, after one step


def chain(**options):
    """SGD with decay: a weight without a gradient is multiplied by `KEPT`."""
    return optax.chain(optax_decay.decay(DECAY, **options), optax.scale_by_learning_rate(RATE))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(TOKENS, WIDTH)(tokens)
        x = nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(MLP, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(TOKENS)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, MLP, rngs=rngs), nnx.Linear(MLP, WIDTH, rngs=rngs)
        self.unembed = nnx.Linear(WIDTH, TOKENS, rngs=rngs)


def linen_params():
    return Linen().init(jax.random.key(0), jnp.zeros((1, 3), int))["params"]


def ratio(before, after):
    """How much of each parameter is left, by path; parameters of zeros are left out."""
    pairs = zip(*(jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (before, after)))
    found = {}
    for (key, old), (_, new) in pairs:
        old, new = np.asarray(old), np.asarray(new)
        if np.any(old):
            found[paths.path_string(key)] = float(np.linalg.norm(new) / np.linalg.norm(old))
    return found


def check_roles(left, decays=lambda path: path.endswith(("kernel", "weight"))):
    assert any(map(decays, left)) and not all(map(decays, left))
    for path, kept in left.items():
        assert kept == pytest.approx(KEPT if decays(path) else 1.0, rel=1e-5), path


def test_nnx_optimizer():
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(mask=("hidden", "head")), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)

    step(model, optimizer)
    check_roles(ratio(before, nnx.state(model, nnx.Param)))


def test_linen_train_state():
    params = linen_params()
    state = TrainState.create(
        apply_fn=Linen().apply, params=params, tx=chain(mask=("hidden", "head"))
    )
    state = jax.jit(lambda s: s.apply_gradients(grads=jax.tree.map(jnp.zeros_like, s.params)))(
        state
    )
    check_roles(ratio(params, state.params))


def test_equinox():
    model = eqx.nn.MLP(WIDTH, WIDTH, MLP, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = chain(mask=("hidden", "head"), axes=axes.infer(model))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = eqx.filter(eqx.apply_updates(model, updates), eqx.is_inexact_array)
    check_roles(ratio(params, after))


def test_optax_partition():
    params = linen_params()
    labels = jax.tree_util.tree_map_with_path(
        lambda key, _: "table" if "Embed_0" in str(key) else "rest", params
    )
    tx = optax.partition({"table": optax.set_to_zero(), "rest": chain(mask="hidden")}, labels)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    left = ratio(params, optax.apply_updates(params, updates))
    # In a part of a tree, nothing shows that the last layer is the head; by its name it is hidden.
    check_roles(left)


def test_optax_masked():
    params = linen_params()
    hidden = jax.tree_util.tree_map_with_path(lambda key, _: "up" in str(key), params)
    tx = optax.chain(
        optax.masked(optax_decay.decay(DECAY), hidden), optax.scale_by_learning_rate(RATE)
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    check_roles(ratio(params, optax.apply_updates(params, updates)), lambda path: "up/" in path)


def test_inject_hyperparams():
    params = linen_params()
    link = optax.inject_hyperparams(optax_decay.decay, static_args=("mask",))(DECAY, mask="hidden")
    tx = optax.chain(link, optax.scale_by_learning_rate(RATE))
    state = tx.init(params)
    state[0].hyperparams["weight_decay"] = jnp.float32(DECAY / 2)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    left = ratio(params, optax.apply_updates(params, updates))
    assert left["up/kernel"] == pytest.approx(1 - RATE * DECAY / 2, rel=1e-5)
    assert left["Dense_0/kernel"] == 1.0  # the head: its outputs are the tokens of the embedding


def test_multi_steps():
    params = linen_params()
    tx = optax.MultiSteps(chain(mask="hidden"), every_k_schedule=2)
    zeros, state, after = jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    kept = []
    for _ in range(4):
        updates, state = tx.update(zeros, state, after)
        after = optax.apply_updates(after, updates)
        kept.append(ratio(params, after)["up/kernel"])
    np.testing.assert_allclose(kept, [1, KEPT, KEPT, KEPT**2], rtol=1e-5)


def test_lora_decays_the_adapters_and_leaves_the_base_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
            self.up = nnx.LoRALinear(WIDTH, MLP, lora_rank=2, rngs=rngs)
            self.up.lora.lora_b[...] = jnp.ones_like(self.up.lora.lora_b[...])

    model = Model(nnx.Rngs(0))
    roles = axes.signatures(axes.infer(model), nnx.state(model, nnx.Param))
    assert roles["up/lora/lora_a"].matrix_shape == (1, WIDTH, 2)
    assert roles["up/lora/lora_b"].matrix_shape == (1, 2, MLP)
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.LoRAParam)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    adapters = nnx.state(model, nnx.LoRAParam)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, adapters))
    check_roles(ratio(before, nnx.state(model, nnx.Param)), lambda path: "lora_" in path)


def test_levanter_optimizer_config():
    """A subclass of levanter's own `OptimizerConfig`, over a model of haliax's named arrays."""
    config = pytest.importorskip("levanter.optim.config")
    hax = pytest.importorskip("haliax")

    @config.OptimizerConfig.register_subclass("huber_decay")
    @dataclasses.dataclass(frozen=True)
    class Huber(config.OptimizerConfig):
        def build(self, num_train_steps):
            rate = self.lr_scheduler(num_train_steps)
            return optax.chain(
                optax_decay.decay(self.weight_decay, mask=("hidden", "head")),
                optax.scale_by_learning_rate(rate),
            )

    Embed, Mlp, Vocab = hax.Axis("embed", WIDTH), hax.Axis("mlp", MLP), hax.Axis("vocab", TOKENS)
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "embed": hax.nn.Embedding.init(Vocab, Embed, key=keys[0]),
        "up": hax.nn.Linear.init(Embed, Mlp, key=keys[1]),
        "head": hax.nn.Linear.init(Mlp, Vocab, key=keys[2]),
    }
    params = eqx.filter(model, eqx.is_inexact_array)
    given = {"learning_rate": RATE, "weight_decay": DECAY, "lr_schedule": "constant", "warmup": 0}
    tx = Huber(**given).build(10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    left = ratio(params, eqx.apply_updates(params, updates))
    check_roles(left, lambda path: "weight" in path and "embed" not in path)


def test_the_shape_of_maxtexts_hook():
    """`opt_type` chooses between functions of a config and a schedule; MaxText itself does not run here."""

    @dataclasses.dataclass
    class Config:
        opt_type: str = "adam_huber_decay"
        adam_weight_decay: float = DECAY

    def get_optimizer(config, learning_rate_schedule):
        assert config.opt_type == "adam_huber_decay"
        return optax_decay.adam_huber_decay(
            learning_rate_schedule, weight_decay=config.adam_weight_decay
        )

    stack = {"scale": jnp.ones((WIDTH, 3))}  # MaxText stacks its layers along axis 1
    layers = {
        "pre_self_attention_layer_norm": stack,
        "mlp": {
            "wi_0": {"kernel": jnp.ones((WIDTH, 3, MLP))},
            "wo": {"kernel": jnp.ones((MLP, 3, WIDTH))},
        },
        "self_attention": {"query": {"kernel": jnp.ones((WIDTH, 3, 2, 4))}},
    }
    params = {
        "token_embedder": {"embedding": jnp.ones((TOKENS, WIDTH))},
        "decoder": {"layers": layers, "logits_dense": {"kernel": jnp.ones((WIDTH, TOKENS))}},
    }
    tx = get_optimizer(Config(), optax.constant_schedule(RATE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    left = ratio(params, optax.apply_updates(params, updates))
    assert {path for path, kept in left.items() if kept < 1} == {p for p in left if "kernel" in p}


NAMES = {
    "embed_tokens.weight": (TOKENS, WIDTH),
    "layers.0.norm.weight": (WIDTH,),
    "layers.0.up.weight": (MLP, WIDTH),
    "layers.0.up.bias": (MLP,),
    "layers.1.norm.weight": (WIDTH,),
    "layers.1.up.weight": (MLP, WIDTH),
    "layers.1.up.bias": (MLP,),
}


def groups_of(names):
    no_decay = [n for n in names if "norm" in n or n.endswith("bias")]
    return [
        {"params": [n for n in names if n not in no_decay], "weight_decay": 0.1},
        {"params": no_decay, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("form", ["torch", "nested", "flax", "stacked"])
def test_from_torch_groups(form):
    """One list of groups, for trees with PyTorch's names, and with Flax's."""
    found = masks.from_torch_groups(groups_of(NAMES))
    assert found.weight_decay == 0.1
    params = {}
    for name, shape in NAMES.items():
        if form == "stacked":
            name = name.replace("layers.0", "layers").replace("layers.1", "layers")
        if form == "flax":
            name = name.replace("norm.weight", "norm.scale").replace("up.weight", "up.kernel")
            name = name.replace("tokens.weight", "tokens.embedding")
        params[name if form == "torch" else name.replace(".", "/")] = jnp.ones(shape)
    link = optax_decay.decay(found.weight_decay, mask=found.mask)
    updates, _ = link.update(jax.tree.map(jnp.zeros_like, params), link.init(params), params)
    decayed = {path for path, u in updates.items() if jnp.any(u)}
    assert decayed == {p for p in params if "norm" not in p and "bias" not in p} and decayed
    assert all(jnp.allclose(updates[p], 0.1) for p in decayed)


def test_torch_groups_of_three_strengths_and_their_numbers():
    groups = [
        {"params": ["h.0.fc.weight"], "weight_decay": 0.2},
        {"params": ["h.1.fc.weight", "fc.weight"], "weight_decay": 0.05},
        {"params": ["h.0.fc.bias", "h.1.fc.bias"]},
    ]
    found = masks.from_torch_groups(groups, weight_decay=0.0)
    params = {
        "h": [{"fc": {"weight": jnp.ones(2), "bias": jnp.ones(2)}}] * 2,
        "fc": {"weight": jnp.ones(2)},
    }
    link = optax_decay.decay(found.weight_decay, mask=found.mask)
    updates, _ = link.update(jax.tree.map(jnp.zeros_like, params), link.init(params), params)
    np.testing.assert_allclose(updates["h"][0]["fc"]["weight"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["h"][1]["fc"]["weight"], 0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["fc"]["weight"], 0.05, rtol=1e-6)
    assert not jnp.any(updates["h"][0]["fc"]["bias"])


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([], "empty or a single dictionary"),
        ({"params": ["a"]}, "empty or a single dictionary"),
        ([{"params": ["a"]}], "group 0 gives no weight_decay"),
        ([{"params": ["a"], "weight_decay": -0.1}], "outside"),
        ([{"params": ["a", "a"], "weight_decay": 0.1}], "'a' is in two groups"),
        ([{"params": [], "weight_decay": 0.1}], "hold no parameters"),
        (
            [{"params": [np.ones((2, 3))], "weight_decay": 0.1}],
            r"\(2, 3\), has no name.*named_parameters",
        ),
        (
            [
                {"params": ["a"], "weight_decay": 0.1, "lr": 1.0},
                {"params": ["b"], "weight_decay": 0.1, "lr": 2.0},
            ],
            r"learning rates \[1.0, 2.0\].*partition",
        ),
    ],
)
def test_torch_groups_that_cannot_be_translated(groups, says):
    with pytest.raises(ValueError, match=says):
        masks.from_torch_groups(groups)


def test_param_groups_of_a_real_torch_optimizer():
    """Every decay of one step without gradients equals AdamW's of PyTorch."""
    torch = pytest.importorskip("torch")
    block = lambda: torch.nn.ModuleDict(
        {"norm": torch.nn.LayerNorm(WIDTH), "up": torch.nn.Linear(WIDTH, WIDTH)}
    )
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(TOKENS, WIDTH),
            "layers": torch.nn.ModuleList([block(), block()]),
        }
    )
    named = dict(model.named_parameters())
    plain = [p for n, p in named.items() if p.ndim == 1]
    rest = [p for p in named.values() if p.ndim > 1]
    groups = [{"params": rest, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    params = {n: jnp.asarray(p.detach().numpy().copy()) for n, p in named.items()}
    found = masks.from_torch_groups(optimizer.param_groups, model.named_parameters())
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tx = chain(mask=found.mask)
    assert found.weight_decay == DECAY
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    for name, parameter in named.items():
        np.testing.assert_allclose(after[name], parameter.detach().numpy(), rtol=1e-6, err_msg=name)
    assert ratio(params, after)["embed.weight"] == pytest.approx(KEPT, rel=1e-5)
