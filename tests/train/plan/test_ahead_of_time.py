"""Compiled for a TPU and for H200: elementwise decays in one fused pass per leaf, spectra without a gathered weight.

And a training step on a GPU that keeps nothing twice.

Skipped where the compilers are not installed.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from models import attention, gpt, layers, llama, loss, products
from train.plan import ahead_of_time, alignment, kernel_model
from train.step import families
from train.step import update as step_lib

pytestmark = pytest.mark.usefixtures("as_for_users")
SHAPES = {"up": (4, 512, 1024), "down": (4, 1024, 512), "norm": (4, 512), "head": (512, 2048)}
AXES = (("up", "L | D -> F"), ("down", "L | F -> D"), ("norm", "L | D"), ("head", "D -> V"))


def devices_of(target):
    try:
        return ahead_of_time.devices(target)
    except ahead_of_time.NotInstalled as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["v5e:2x2", "h200"])
def sharding(request):
    return jax.sharding.SingleDeviceSharding(devices_of(request.param)[0])


def compiled(tx, sharding):
    def place(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = place({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()})
    return ahead_of_time.report(
        step, params, place(jax.eval_shape(tx.init, params)), params, donate=(0, 1)
    )


def passes(seen):
    """Fused kernels that write more than scalars."""
    entry = seen.text[seen.text.index("ENTRY") :]
    kernels = re.findall(r" = (.*) fusion\(", entry)
    return sum(bool(re.search(r"\w\[\d", kernel)) for kernel in kernels)


@pytest.mark.parametrize(
    "link",
    [
        optax_decay.decay(0.1, axes=AXES),
        optax_decay.decay(
            lambda step: 0.1, axes=AXES, coupling=optax_decay.couplings.schedule(1e-3)
        ),
        optax_decay.decay(0.1, cautious=True, mask="hidden", axes=AXES),
        optax_decay.huber_decay(0.1, threshold=0.05, axes=AXES),
        optax_decay.huber_decay(0.1, threshold=lambda step: 0.05, axes=AXES),
        optax_decay.decay(0.1, pull=optax_decay.pulls.pseudo_huber(0.05), axes=AXES),
        optax_decay.width_scaled_decay(0.1, base_width=128, axes=AXES),
    ],
    ids=["l2", "schedule", "cautious", "huber", "huber schedule", "pseudo_huber", "width"],
)
def test_one_pass_like_adamw(link, sharding):
    def chain(decay):
        return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(1e-3))

    ours = compiled(chain(link), sharding)
    adamw = compiled(chain(optax.add_decayed_weights(0.1)), sharding)
    assert passes(ours) == passes(adamw) == len(SHAPES)
    if adamw.bytes_accessed is not None:  # a GPU's compiler has no figure
        # The counter of the schedule is read by every leaf, in tiles of up to 4 KiB; one more pass over the smallest
        # matrix would be 4 MiB of 382.
        assert ours.bytes_accessed - adamw.bytes_accessed < 4096 * len(SHAPES)
    assert ours.temporary - adamw.temporary < 4096 * len(SHAPES)
    assert not ours.collectives


def spectral_refresh_on(target, method):
    """A refresh of AlphaDecay for eight devices, the matrices split over all of them."""
    devices = devices_of(target)
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(4, 2), ("fsdp", "tensor"))
    partition = optax_decay.axes.partition_specs(AXES, SPECTRAL, {"D": "fsdp", "F": "tensor"})
    spectra = optax_decay.spectra
    score = spectra.hill(method=spectra.matrix_products() if method == "matmul" else method)
    link = optax_decay.spectral_alpha_decay(0.1, axes=AXES, score=score, param_specs=partition)
    state = jax.eval_shape(link.init, SPECTRAL)

    def placed(tree, specs):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)
            ),
            tree,
            specs,
        )

    weights = placed(SPECTRAL, partition)
    with jax.set_mesh(mesh):
        return ahead_of_time.report(
            lambda s, p: link.update(p, s, p, refresh=True)[1],
            placed(state, jax.tree.map(lambda _: jax.P(), state)),
            weights,
        )


SPECTRAL = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {
        "up": (8, 128, 384),
        "down": (8, 384, 128),
        "norm": (8, 128),
        "head": (128, 256),
    }.items()
}


@pytest.mark.parametrize("target", ["v5e:2x4", "h200"])
def test_spectra_on_eight_devices_move_every_matrix_once(target):
    """Matrix products: an all-to-all per mesh axis and stack, no weight gathered anywhere."""
    found = spectral_refresh_on(target, "matmul").collectives
    # Both kinds of matrices have one shape and go as one stack; every chip hears of 16 numbers in one sum.
    assert "all-gather" not in found and "collective-permute" not in found
    assert found["all-to-all"] <= 2 * 2
    assert found["all-reduce"] == 1


def step_on_a_gpu(**changes):
    """A training step of a small LLaMA with cuDNN's attention, compiled; its number of layers."""
    config = llama.Config(
        vocab_size=8192,
        width=256,
        mlp_width=688,
        layers=4,
        heads=4,
        dtype="bfloat16",
        attention="cudnn",
        **changes,
    )
    return step_of(config), config.layers


def step_of(config, sequences=16):
    """A training step of sequences of 256 tokens, compiled for an H200."""
    device = devices_of("h200")[0]
    if not importlib.util.find_spec("nvidia.cudnn"):
        pytest.skip("cuDNN is not installed: pip install --no-deps nvidia-cudnn-cu12")
    init, tx = functools.partial(families.of(config).init, config), optax.adamw(1e-3)
    mesh = jax.sharding.Mesh([device], ("data",))
    everywhere = jax.NamedSharding(mesh, jax.P())
    place = functools.partial(
        jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    )
    state = place(jax.eval_shape(lambda: step_lib.first_state(init(jax.random.key(0)), tx)))
    update = step_lib.compile_update(
        families.Forward(config),
        optax.with_extra_args_support(tx),
        lambda step: 1e-3,
        1,
        jax.tree.map(lambda x: everywhere, state),
    )
    tokens = place(jax.ShapeDtypeStruct((sequences, 257), jnp.int32))
    return ahead_of_time.read(update.lower(state, tokens), device)


@pytest.mark.parametrize(("remat", "forward_runs"), [("none", 1), ("dots", 1), ("full", 2)])
def test_a_step_on_a_gpu_copies_nothing_and_attends_once(remat, forward_runs):
    seen, depth = step_on_a_gpu(remat=remat)
    kernels = kernel_model.kernels(seen.text)
    names = [kernel.source.rsplit("/", 1)[-1] for kernel in kernels if kernel.kind == "attention"]
    assert names.count("dot_product_attention_bwd") == depth
    assert len(names) == depth * (1 + forward_runs)
    assert all(kernel.times == 1 for kernel in kernels if kernel.kind == "attention")
    activation = 2 * 16 * 256 * 256
    copied = sum(k.times * k.bytes for k in kernels if k.kind == "copies")
    # XLA takes queries, keys and values in one product and slices them out of it; where layers are recomputed it slices
    # weights too. A loop over layers copies 22 times an activation in each.
    assert copied < 6 * depth * 2 * activation


@pytest.mark.parametrize("vocabulary", [8192, 8001])
def test_the_loss_reads_the_logits_twice_and_writes_the_gradient_once(vocabulary):
    """Beside the three products: logsumexp, and one pass for the gradient."""
    config = llama.Config(
        vocab_size=vocabulary, width=256, mlp_width=688, layers=1, heads=4, dtype="bfloat16"
    )
    kernels = kernel_model.kernels(step_of(config).text)
    of_loss = [k for k in kernels if "(loss)" in k.source and k.kind in ("elementwise", "copies")]
    logits = 2 * 16 * 256 * vocabulary
    moved = sum(kernel.times * kernel.bytes for kernel in of_loss)
    # The head, once in float32 and twice in bfloat16, and its gradient in float32.
    head = 4 * 256 * vocabulary
    assert 3 * logits < moved < 3.1 * logits + 6 * head


def test_a_gpt_on_a_gpu_transposes_no_activations(monkeypatch):
    config = gpt.Config(
        vocab_size=8192, positions=256, width=384, mlp_width=640, layers=1, heads=4,
        dtype="bfloat16", attention="cudnn",
    )  # fmt: skip
    batch_last = "bf16[256,384,32]"
    assert batch_last not in step_of(config, sequences=32).text
    monkeypatch.setattr(layers, "contiguous", lambda x: x)
    jax.clear_caches()
    assert batch_last in step_of(config, sequences=32).text


ODD = {
    "llama": llama.Config(
        vocab_size=8191, width=240, mlp_width=641, layers=1, heads=3, dtype="bfloat16"
    ),
    "gpt": gpt.Config(
        vocab_size=8197, positions=256, width=250, mlp_width=1001, layers=1, heads=5,
        dtype="bfloat16", attention="cudnn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_step_of_odd_sizes_has_aligned_products(name, monkeypatch):
    """Vocabulary, MLP, width and heads of no multiple of 8; without padding, the same program has other rows."""
    assert not alignment.unaligned(step_of(ODD[name]).text, least=1e7)
    if name == "llama":
        for module in (products, loss, attention):
            monkeypatch.setattr(module, "aligned", lambda size: size)
        jax.clear_caches()
        assert alignment.unaligned(step_of(ODD[name]).text, least=1e7)


def test_the_embedding_of_a_step_is_added_to_without_atomic_instructions():
    text = step_of(ODD["llama"]).text
    scatters = re.findall(r" scatter\(.*", text)
    assert scatters and all("unique_indices=true" in line for line in scatters)
