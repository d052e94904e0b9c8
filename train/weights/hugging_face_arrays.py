"""Names and layouts of the arrays of GPT-2 and LLaMA in the files of Hugging Face's `transformers`.

In the files, LLaMA's matrices are [out, in] and GPT-2's [in, out]; queries, keys and values of GPT-2 form one array;
and every layer has its own arrays, which are stacked here. A model with a `base_width` scales some activations. The
files have no such factor, so it is multiplied into the final norm and the queries.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from models import gpt, llama, shapes
from optax_decay.axes import signatures
from train.step import families

# One row per array in a file: its name, with {} for the layer; whether it is [out, in]; and our paths, whose outputs
# are concatenated in it.
Row = tuple[str, bool, tuple[str, ...]]
_LAYER, _BLOCK = "model.layers.{}", "transformer.h.{}"
_QUERY, _KEY, _VALUE, _OUT = (f"blocks/attention/{x}" for x in ("query", "key", "value", "out"))
LLAMA: tuple[Row, ...] = (
    ("model.embed_tokens.weight", False, ("embed/embedding",)),
    (f"{_LAYER}.input_layernorm.weight", False, ("blocks/attention_norm/scale",)),
    (f"{_LAYER}.self_attn.q_proj.weight", True, (f"{_QUERY}/kernel",)),
    (f"{_LAYER}.self_attn.k_proj.weight", True, (f"{_KEY}/kernel",)),
    (f"{_LAYER}.self_attn.v_proj.weight", True, (f"{_VALUE}/kernel",)),
    (f"{_LAYER}.self_attn.o_proj.weight", True, (f"{_OUT}/kernel",)),
    (f"{_LAYER}.post_attention_layernorm.weight", False, ("blocks/mlp_norm/scale",)),
    (f"{_LAYER}.mlp.gate_proj.weight", True, ("blocks/mlp/gate/kernel",)),
    (f"{_LAYER}.mlp.up_proj.weight", True, ("blocks/mlp/up/kernel",)),
    (f"{_LAYER}.mlp.down_proj.weight", True, ("blocks/mlp/down/kernel",)),
    ("model.norm.weight", False, ("final_norm/scale",)),
    ("lm_head.weight", True, ("head/kernel",)),
)
GPT2: tuple[Row, ...] = (
    ("transformer.wte.weight", False, ("embed/embedding",)),
    ("transformer.wpe.weight", False, ("position/embedding",)),
    (f"{_BLOCK}.ln_1.weight", False, ("blocks/attention_norm/scale",)),
    (f"{_BLOCK}.ln_1.bias", False, ("blocks/attention_norm/bias",)),
    *(
        (
            f"{_BLOCK}.attn.c_attn.{theirs}",
            False,
            tuple(f"{p}/{ours}" for p in (_QUERY, _KEY, _VALUE)),
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ),
    (f"{_BLOCK}.attn.c_proj.weight", False, (f"{_OUT}/kernel",)),
    (f"{_BLOCK}.attn.c_proj.bias", False, (f"{_OUT}/bias",)),
    (f"{_BLOCK}.ln_2.weight", False, ("blocks/mlp_norm/scale",)),
    (f"{_BLOCK}.ln_2.bias", False, ("blocks/mlp_norm/bias",)),
    (f"{_BLOCK}.mlp.c_fc.weight", False, ("blocks/mlp/up/kernel",)),
    (f"{_BLOCK}.mlp.c_fc.bias", False, ("blocks/mlp/up/bias",)),
    (f"{_BLOCK}.mlp.c_proj.weight", False, ("blocks/mlp/down/kernel",)),
    (f"{_BLOCK}.mlp.c_proj.bias", False, ("blocks/mlp/down/bias",)),
    ("transformer.ln_f.weight", False, ("final_norm/scale",)),
    ("transformer.ln_f.bias", False, ("final_norm/bias",)),
    ("lm_head.weight", True, ("head/kernel",)),
)
ROWS = {llama: LLAMA, gpt: GPT2}
# Arrays in old files that are constants of the architecture.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class LayerSlice(NamedTuple):
    """One layer of one of our parameters, which is all or a part of an array in a file."""

    path: str
    layer: int | None  # None if the parameter is not stacked
    shape: tuple[int, ...]  # of the layer
    matrix: tuple[int, ...]  # the shape as a matrix [inputs, outputs], or of a vector
    factor: float  # the file holds the parameter times this factor


class FileArray(NamedTuple):
    """One array in a file."""

    name: str
    transposed: bool
    pieces: tuple[LayerSlice, ...]  # concatenated along the outputs

    @property
    def shape(self) -> tuple[int, ...]:
        *inputs, _ = self.pieces[0].matrix
        shape = (*inputs, sum(piece.matrix[-1] for piece in self.pieces))
        return shape[::-1] if self.transposed else shape


def arrays(model: Any) -> Iterator[FileArray]:
    """The arrays of a checkpoint of the model, layer by layer."""
    # In the files GPT-2 always has biases, which may be zero.
    full = dataclasses.replace(model, bias=True) if hasattr(model, "bias") else model
    family = families.of(full)
    weights = jax.eval_shape(lambda: family.init(full, jax.random.key(0)))
    described = signatures(family.axes(full), weights)

    def piece(path: str, layer: int | None) -> LayerSlice:
        signature = described[path]
        shape = signature.shape if layer is None else signature.shape[1:]
        matrix = signature.matrix_shape[1:] if signature.is_matrix else (math.prod(shape),)
        return LayerSlice(path, layer, shape, matrix, _factor(model, path))

    known = [row for row in ROWS[family] if row[2][0] in described]
    layered = [row for row in known if "{}" in row[0]]
    for name, transposed, paths in known:
        if "{}" not in name:
            yield FileArray(name, transposed, tuple(piece(path, None) for path in paths))
    for layer in range(model.layers):
        for name, transposed, paths in layered:
            yield FileArray(
                name.format(layer), transposed, tuple(piece(path, layer) for path in paths)
            )


def _factor(model: Any, path: str) -> float:
    """Factor by which the parameter is multiplied in the file."""
    if path.startswith("final_norm/"):
        return shapes.readout(model)
    if path.startswith(_QUERY):
        return shapes.attention_scale(model) * math.sqrt(model.head_width)
    return 1.0
