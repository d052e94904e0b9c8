"""The GPT-2 forward pass written again: NumPy, float64, one sequence, one layer, one head at a time.

`rounding` is as in reference_llama.py: applied wherever the model under test stores a number in its
compute type. The sum of the embeddings is one such place, not each of them.
"""

import numpy as np


def forward(config, params, tokens, rounding=lambda x: x):
    """Logits [B, T, V] of integer tokens [B, T]."""
    return np.stack([_sequence(config, params, row, rounding) for row in tokens])


def _get(params, path, layer=None):
    for part in path.split("/"):
        params = params[part]
    array = np.asarray(params, np.float64)
    return array if layer is None else array[layer]


def _sequence(config, params, tokens, rounding):
    embedding = _get(params, "embed/embedding")
    x = rounding(embedding[tokens] + _get(params, "position/embedding")[: len(tokens)])
    for layer in range(config.layers):
        linear = lambda path, x, layer=layer: _linear(config, params, path, layer, x, rounding)
        norm = lambda name, x, layer=layer: _norm(config, params, f"blocks/{name}", layer, x)
        x = rounding(x + _attention(config, linear, rounding(norm("attention_norm", x)), rounding))
        y = linear("mlp/up", rounding(norm("mlp_norm", x)))
        y = rounding(0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))
        x = rounding(x + linear("mlp/down", y))
    x = rounding(_norm(config, params, "final_norm", None, x))
    if config.base_width:
        x = rounding(x * config.base_width / config.width)
    return x @ rounding(embedding.T if config.tied else _get(params, "head/kernel"))


def _linear(config, params, path, layer, x, rounding):
    """From all axes of x but the first to those that are left of the kernel."""
    kernel = rounding(_get(params, f"blocks/{path}/kernel", layer))
    y = rounding(np.tensordot(x, kernel, x.ndim - 1))
    bias = _get(params, f"blocks/{path}/bias", layer) if config.bias else np.zeros(1)
    return rounding(y + rounding(bias))


def _norm(config, params, path, layer, x):
    y = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(
        x.var(axis=-1, keepdims=True) + config.norm_eps
    )
    y = y * _get(params, f"{path}/scale", layer)
    return y + _get(params, f"{path}/bias", layer) if config.bias else y


def _attention(config, linear, x, rounding):
    query, key, value = (linear(f"attention/{name}", x) for name in ("query", "key", "value"))
    mixed = np.zeros_like(value)
    scale = np.sqrt(config.base_head_width or query.shape[2]) / query.shape[2]
    for head in range(config.heads):
        for t in range(len(x)):
            scores = np.array([query[t, head] @ key[s, head] for s in range(t + 1)]) * scale
            odds = np.exp(scores - scores.max())
            mixed[t, head] = rounding(odds / odds.sum()) @ value[: t + 1, head]
    return linear("attention/out", rounding(mixed))
