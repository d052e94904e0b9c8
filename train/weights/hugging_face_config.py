"""Converts the config.json of a Hugging Face model to a Config of `models/`, and back."""

import json
import pathlib
from typing import Any

from models import gpt, llama
from train import disk
from train.config.fields import Config, UserError
from train.config.tree import replace
from train.step import families

# Our field: the field in config.json, and its default in transformers (`...` if it is required).
FIELDS: dict[Any, dict[str, tuple[str, Any]]] = {
    llama: {
        "vocab_size": ("vocab_size", ...),
        "width": ("hidden_size", ...),
        "mlp_width": ("intermediate_size", ...),
        "layers": ("num_hidden_layers", ...),
        "heads": ("num_attention_heads", ...),
        "kv_heads": ("num_key_value_heads", None),
        "tied": ("tie_word_embeddings", False),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "rope_base": ("rope_theta", 10_000.0),
    },
    gpt: {
        "vocab_size": ("vocab_size", ...),
        "positions": ("n_positions", ...),
        "width": ("n_embd", ...),
        "mlp_width": ("n_inner", None),
        "layers": ("n_layer", ...),
        "heads": ("n_head", ...),
        "tied": ("tie_word_embeddings", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
}
# Field in config.json: values that agree with our models. The first one is the default, and is written.
FIXED: dict[Any, dict[str, tuple[Any, ...]]] = {
    llama: {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0, None),
        "sliding_window": (None,),
        "num_local_experts": (None, 0, 1),
        "quantization_config": (None,),
    },
    gpt: {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
}
NAMES = {llama: ("llama", "LlamaForCausalLM"), gpt: ("gpt2", "GPT2LMHeadModel")}
NOT_WRITTEN = (
    "partial_rotary_factor",
    "sliding_window",
    "num_local_experts",
    "quantization_config",
)


def read_config(folder: pathlib.Path) -> Any:
    """Reads config.json in a folder, as a Config of `models/`.

    Raises:
        UserError: there is no such file, or a field has an unsupported value, which the message names.
    """
    path = folder / "config.json"
    if disk.kind(path) is None:
        raise UserError(
            f"{folder} holds no config.json. Name a folder on this machine with config.json and"
            " model.safetensors, as save_pretrained of the package transformers writes them."
        )
    try:
        theirs = json.loads(disk.config_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    family = next((f for f, (name, _) in NAMES.items() if name == kind), None)
    if family is None:
        allowed = " and ".join(name for name, _ in NAMES.values())
        raise UserError(f"{path}: model_type = {kind!r} is not supported; allowed are {allowed}.")
    theirs = _plain_rope(theirs, path) if family is llama else theirs
    for name, allowed in FIXED[family].items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: {name} = {str(theirs[name])[:80]!r} is not supported; allowed is {allowed[0]!r}."
            )
    fields = {ours: _field(theirs, *known, path) for ours, known in FIELDS[family].items()}
    if family is gpt and fields["mlp_width"] is None:
        fields["mlp_width"] = 4 * fields["width"]
    try:
        model = family.Config(**fields)
    except ValueError as error:
        raise UserError(f"{path} describes an impossible model: {error}.") from None
    if theirs.get("head_dim") not in (None, model.head_width):
        raise UserError(
            f"{path}: head_dim = {theirs['head_dim']} is not supported; allowed is hidden_size /"
            f" num_attention_heads = {model.head_width}."
        )
    return model


def longest(folder: pathlib.Path) -> int:
    """The longest sequence that config.json in a folder allows [tokens].

    Raises:
        UserError: see `read_config`.
    """
    model, path = read_config(folder), folder / "config.json"
    if families.of(model) is gpt:
        return model.positions
    return max(
        1, _field(json.loads(path.read_text("utf-8")), "max_position_embeddings", 2048, path)
    )


def _field(theirs: dict[str, Any], name: str, default: Any, path: pathlib.Path) -> Any:
    if default is ... and name not in theirs:
        raise UserError(f"{path} has no field {name}.")
    value = theirs.get(name, default)
    kind = (
        bool if isinstance(default, bool) else (int, float) if isinstance(default, float) else int
    )
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        if value is None and default is None:
            return None
        wanted = "true or false" if kind is bool else "a number"
        raise UserError(f"{path}: {name} = {str(value)[:80]!r} must be {wanted}.")
    return value


def _plain_rope(theirs: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Replaces `rope_parameters`, which newer files contain, by `rope_theta` and `rope_scaling`."""
    rope = theirs.get("rope_parameters")
    if rope is None:
        scaling = theirs.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
            return {**theirs, "rope_scaling": None}
        return theirs
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters = {str(rope)[:80]!r} must be an object.")
    known = {"rope_theta", "rope_type", "partial_rotary_factor"}
    plain = rope.get("rope_type", "default") == "default" and set(rope) <= known
    moved = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {**theirs, **moved, "rope_scaling": None if plain else rope}


def config_json(model: Any, length: int, separator: int | None) -> dict[str, Any]:
    """The content of config.json for a model.

    Args:
        model: a Config of `models/`.
        length: the longest sequence that a LLaMA was trained on [tokens].
        separator: the token after each text; None if there is none.
    """
    family = families.of(model)
    kind, architecture = NAMES[family]
    written = {theirs: getattr(model, ours) for ours, (theirs, _) in FIELDS[family].items()}
    written |= {n: v[0] for n, v in FIXED[family].items() if n not in NOT_WRITTEN}
    if family is llama:
        written["num_key_value_heads"] = model.kv_heads or model.heads
        written["max_position_embeddings"] = length
    else:
        written |= {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    tokens = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": None}
    common = {"model_type": kind, "architectures": [architecture]}
    return common | written | {"initializer_range": model.init_std} | tokens


def shape_from_weights(config: Config) -> Config:
    """Copies the shape of the weights in `model.weights` into the fields of a config.

    Raises:
        UserError: the weights are not supported, or a field of the model has another value than they have.
    """
    model = read_config(disk.user_path(config.model.weights or ""))
    family = families.of(model)
    fields: dict[str, Any] = {name: getattr(model, name) for name in FIELDS[family]}
    fields |= {"bias": True} if family is gpt else {}
    for name, value in fields.items():
        own = getattr(config.model, name)
        if own not in (None, value):
            raise UserError(
                f"model.{name} = {own}, but the weights in {config.model.weights} have {value}; leave it"
                " out."
            )
    name = next(name for name, module in families.FAMILIES.items() if module is family)
    return replace(config, {f"model.{n}": v for n, v in {**fields, "preset": name}.items()})
