"""The words in a path that tell layers apart, in Flax Linen, Haiku, MaxText, transformers and PyTorch."""

import re


def _component(*alternatives: str) -> re.Pattern[str]:
    """Matches a whole component of a path that is one of these."""
    return re.compile("|".join(alternatives), re.I)


_HEAD = _component(
    "lm_head",
    "head",
    "logits?",
    "logits_dense",
    "classifier",
    "readout",
    r"unembed\w*",
    "embed_out",
)
# Layers that take in the features of the residual stream, and layers that put them out.
_INWARD = _component(
    *("[qkv]", "qkv", "kv", "query", "key", "value", "query_key_value", "c_attn"),
    *(
        "w_?(?:[qkv]|qkv|kv|query|key|value)",
        "to_(?:[qkv]|qkv|kv)",
        "(?:[qkv]|qkv|kv|query|key|value|in)_proj",
        "(?:[qkv]|qkv|kv|gating)_einsum",
        "w?(?:q|kv)_[ab](?:_proj(?:_with_mqa)?)?",  # of latent attention
    ),
    *("gate", "up", "gate_up", "wi(?:_[01])?", "w13?", "w3", "w_?(?:in|up|gate)", "c_fc", "fc_?1"),
    *("(?:gate|up|gate_up|up_gate)_proj", r"router(?:_\d+)?"),
    *("weight_[ih]h", "dense_[ih]", "[hi][ifgonrz]"),  # the gates of recurrent cells
)
_OUTWARD = _component(
    *("o", "out", "w_?o", "to_out", "(?:o|out|c|down)_proj", "down", "w2", "w_?(?:out|down)"),
    *("fc_?2", "(?:attn|attention)_out(?:_proj)?", "attn_vec_einsum"),
)
# Of these, layers with an axis of attention heads.
_TO_HEADS = _component(
    *("[qkv]", "query", "key", "value", "w_?(?:[qkv]|query|key|value)"),
    *("(?:[qkv]|query|key|value)_proj", "[qkv]_einsum", "w?(?:q|kv)_b(?:_proj)?"),
)
_FROM_HEADS = _component(
    *("o", "out", "w_?(?:o|out)", "(?:o|out)_proj", "(?:attn|attention)_out(?:_proj)?"),
    "attn_vec_einsum",
)
_NORM = _component(r"\w*norm\w*", r"ln(?:_\w+)?\d*", r"bn\d*", "scale")
_EMBED = _component(r"\w*embed\w*", "wte", r"tok(?:en)?_?emb\w*")
_POSITIONS = _component("wpe", r"(?:\w+_)?position(?:s|al)?(?:_\w+)?", r"pos_?emb\w*")
VECTORS = {"bias", "scale", "gamma", "beta", "offset", "b", "a_log"}
CONVOLUTION = re.compile("conv", re.I)
_EXPERTS = _component(
    r"(?:\w+_)?experts?(?:_\w+)?", "moe(?:_?block|_?layer)?(?:_?\\d+)?", "mixture_of_experts"
)
TOKEN = _component("cls", r"\w*_token", "registers?", r"\w*_tokens", "query_tokens")
FUSED = {  # the number of matrices that one array holds side by side
    3: _component(
        "(?:w_?)?qkv(?:_proj)?", "to_qkv", "query_key_value", "c_attn", "in_proj", r"fused_qkv"
    ),
    2: _component(
        *("(?:w_?)?kv(?:_proj)?", "to_kv", "(?:kv|gating)_einsum"),
        *("(?:gate_up|up_gate)(?:_proj)?", "wi", "w13", "mlp_in"),
    ),
}


def components(path: str) -> list[str]:
    return re.split(r"[/.]", path)


def layer_of(path: str) -> str:
    """The name of the layer that a parameter belongs to: the component before its own name."""
    return ["", *components(path)][-2]


def names_of(path: str) -> list[str]:
    """The layer's name and the parameter's own, which count where a parameter is named like a layer."""
    own = components(path)[-1]
    if own.lower() in ("kernel", "weight", "w", "bias", "b"):
        return [layer_of(path)]
    return [re.sub(r"^(?:\w*_)?experts?_(?:\d+_)?", "", own), own, layer_of(path)]


def is_head(path: str) -> bool:
    """Whether the name of its layer, or its own, says that a matrix is an output head."""
    if (
        len(components(path)) <= 2 and components(path)[0] == "output"
    ):  # LLaMA's; inside it is another
        return True
    return any(_HEAD.fullmatch(part) for part in components(path)[-2:])


def is_inside(path: str) -> bool:
    """Whether the name of its layer says that a matrix lies inside a block."""
    return is_inward(path) or is_outward(path)


def is_inward(path: str) -> bool:
    """Whether a matrix takes in the features of the embedding, such as a query or an up-projection."""
    return any(_INWARD.fullmatch(name) for name in names_of(path))


def is_outward(path: str) -> bool:
    """Whether a matrix puts out the features of the embedding, such as a down-projection."""
    return not is_inward(path) and any(_OUTWARD.fullmatch(name) for name in names_of(path))


def side_of_heads(path: str) -> str | None:
    """Whether a matrix puts out attention heads ("out"), takes them in ("in"), or its name says neither."""
    last = components(path)[-2:]
    outward = any(_TO_HEADS.fullmatch(part) for part in last)
    inward = any(_FROM_HEADS.fullmatch(part) for part in last)
    return None if outward == inward else "out" if outward else "in"


def is_of_positions(path: str) -> bool:
    """Whether the name of its layer, or its own, says that an embedding is one of positions."""
    return any(_POSITIONS.fullmatch(part) for part in components(path)[-2:])


def is_of_norm(path: str) -> bool:
    return any(_NORM.fullmatch(part) for part in components(path))


def is_embedding(path: str) -> bool:
    """Whether the name of its layer, or its own, says that a matrix holds one row of features per token."""
    return any(_EMBED.fullmatch(part) for part in components(path)[-2:]) and not is_head(path)


def is_expert(path: str) -> bool:
    """Whether a name says that a parameter belongs to the experts of a mixture."""
    return any(_EXPERTS.fullmatch(part) for part in components(path)) and "router" not in path
