"""Logits of GPT-2 and LLaMA from config.json and a dict of arrays as transformers names them: NumPy, float64.

Written from the rules of the two architectures, with matrices as they lie in the files: LLaMA's map by
x @ W.T, GPT-2's by x @ W + b with queries, keys and values in one.
"""

import json
import math

import numpy as np


def read(path):
    """All float32 arrays of one safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: np.frombuffer(content[start + a : start + b], "<f4").reshape(part["shape"])
        for name, part in header.items()
        if name != "__metadata__"
        for a, b in [part["data_offsets"]]
    }


def write(path, arrays):
    """Float32 arrays as one safetensors file, without padding of the header."""
    header, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + 4 * array.size
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    parts = [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays.values()]
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def random_arrays(config, rng):
    """All arrays of a model, at random."""
    llama = config["model_type"] == "llama"
    shapes = _llama_shapes(config) if llama else _gpt2_shapes(config)
    return {
        name: (0.3 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _llama_shapes(config):
    D, F, V = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    KE = D // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    layer |= {"self_attn.q_proj": (D, D), "self_attn.o_proj": (D, D)}
    layer |= {"self_attn.k_proj": (KE, D), "self_attn.v_proj": (KE, D)}
    layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | ({} if config["tie_word_embeddings"] else {"lm_head.weight": (V, D)})


def _gpt2_shapes(config):
    D, V, T = (config[n] for n in ("n_embd", "vocab_size", "n_positions"))
    F = config.get("n_inner") or 4 * D
    maps = {
        "attn.c_attn": (D, 3 * D),
        "attn.c_proj": (D, D),
        "mlp.c_fc": (D, F),
        "mlp.c_proj": (F, D),
    }
    layer = {f"{name}.weight": shape for name, shape in maps.items()}
    layer |= {f"{name}.bias": shape[1:] for name, shape in maps.items()}
    layer |= {f"{name}.{part}": (D,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes = {"wte.weight": (V, D), "wpe.weight": (T, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(config["n_layer"]):
        shapes |= {f"h.{i}.{name}": shape for name, shape in layer.items()}
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
    tied = config.get("tie_word_embeddings", True)
    return shapes | ({} if tied else {"lm_head.weight": (V, D)})


def forward(config, arrays, tokens):
    """Logits [B, T, V]."""
    rule = {"llama": _llama, "gpt2": _gpt2}[config["model_type"]]
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    return np.stack([rule(config, arrays, row) for row in tokens])


def _attend(q, k, v):
    """[T, heads, width] of each; a key and value head serves the next len(q) / len(k) query heads."""
    group = q.shape[1] // k.shape[1]
    later = np.triu(np.full((len(q), len(q)), -np.inf), 1)
    mixed = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[2]) + later
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(odds / odds.sum(-1, keepdims=True) @ v[:, head // group])
    return np.concatenate(mixed, -1)


def _llama(config, w, tokens):
    T, heads = len(tokens), config["num_attention_heads"]
    E = config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    angles = np.outer(np.arange(T), theta ** -(np.arange(0, E, 2) / E))
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    rotate = lambda x: x * cos + np.concatenate([-x[..., E // 2 :], x[..., : E // 2]], -1) * sin
    rms = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = lambda name, layer=layer: w[f"model.layers.{layer}.{name}.weight"]
        y = rms(x) * at("input_layernorm")
        q, k, v = ((y @ at(f"self_attn.{n}_proj").T).reshape(T, -1, E) for n in "qkv")
        x = x + _attend(rotate(q), rotate(k), v) @ at("self_attn.o_proj").T
        y = rms(x) * at("post_attention_layernorm")
        gate = y @ at("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at("mlp.up_proj").T)) @ at("mlp.down_proj").T
    x = rms(x) * w["model.norm.weight"]
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _gpt2(config, w, tokens):
    T, heads = len(tokens), config["n_head"]
    part = lambda name: w[f"transformer.{name}"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * part(f"{name}.weight") + part(f"{name}.bias")

    linear = lambda name, x: x @ part(f"{name}.weight") + part(f"{name}.bias")
    x = part("wte.weight")[tokens] + part("wpe.weight")[:T]
    for layer in range(config["n_layer"]):
        fused = linear(f"h.{layer}.attn.c_attn", norm(f"h.{layer}.ln_1", x))
        q, k, v = (y.reshape(T, heads, -1) for y in np.split(fused, 3, -1))
        x = x + linear(f"h.{layer}.attn.c_proj", _attend(q, k, v))
        y = linear(f"h.{layer}.mlp.c_fc", norm(f"h.{layer}.ln_2", x))
        y = y / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(f"h.{layer}.mlp.c_proj", y)
    return norm("ln_f", x) @ w.get("lm_head.weight", part("wte.weight")).T
