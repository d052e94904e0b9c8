"""The LLaMA forward pass written again: NumPy, float64, one sequence, one layer, one head at a time.

`rounding` is applied wherever the model under test stores a number in its compute type: with the
identity this is the exact function, with a cast to bfloat16 it says how much error that type
makes, which is where the tests take their tolerances from.
"""

import numpy as np


def forward(config, params, tokens, rounding=lambda x: x):
    """Logits [B, T, V] of integer tokens [B, T]."""
    return np.stack(
        [_sequence(config, _Weights(params, rounding), row, rounding) for row in tokens]
    )


class _Weights:
    """Parameters by path, in float64 after `rounding`; norm scales are never stored rounded."""

    def __init__(self, params, rounding):
        self.params, self.rounding = params, rounding

    def __call__(self, path, layer=None):
        node = self.params
        for part in path.split("/"):
            node = node[part]
        array = np.asarray(node, np.float64)
        if layer is not None:
            array = array[layer]
        return array if path.endswith("scale") else self.rounding(array)


def _sequence(config, weights, tokens, rounding):
    x = weights("embed/embedding")[tokens]
    for layer in range(config.layers):
        y = rounding(_norm(x, weights("blocks/attention_norm/scale", layer), config.norm_eps))
        x = rounding(x + _attention(config, weights, layer, y, rounding))
        y = rounding(_norm(x, weights("blocks/mlp_norm/scale", layer), config.norm_eps))
        gate = rounding(y @ weights("blocks/mlp/gate/kernel", layer))
        up = rounding(y @ weights("blocks/mlp/up/kernel", layer))
        gated = rounding(rounding(gate / (1 + np.exp(-gate))) * up)
        x = rounding(x + rounding(gated @ weights("blocks/mlp/down/kernel", layer)))
    x = rounding(_norm(x, weights("final_norm/scale"), config.norm_eps))
    if config.base_width:
        x = rounding(x * config.base_width / config.width)
    head = weights("embed/embedding").T if config.tied else weights("head/kernel")
    return x @ head


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def _attention(config, weights, layer, x, rounding):
    query = weights("blocks/attention/query/kernel", layer)
    key = weights("blocks/attention/key/kernel", layer)
    value = weights("blocks/attention/value/kernel", layer)
    out = weights("blocks/attention/out/kernel", layer)
    total = np.zeros_like(x)
    for head in range(config.heads):
        shared = head * key.shape[1] // config.heads
        q = rounding(_rotate(rounding(x @ query[:, head]), config.rope_base))
        k = rounding(_rotate(rounding(x @ key[:, shared]), config.rope_base))
        v = rounding(x @ value[:, shared])
        mixed = np.zeros_like(v)
        for t in range(len(x)):
            scores = np.array([q[t] @ k[s] for s in range(t + 1)]) / np.sqrt(q.shape[1])
            if config.base_head_width:
                scores *= np.sqrt(config.base_head_width / q.shape[1])
            odds = np.exp(scores - scores.max())
            mixed[t] = rounding(odds / odds.sum()) @ v[: t + 1]
        total += rounding(mixed) @ out[head]
    return rounding(total)


def _rotate(x, base):
    """Feature pairs (j, j + E/2) as complex numbers, turned by position / base^(2j/E) radians."""
    T, E = x.shape
    pairs = x[:, : E // 2] + 1j * x[:, E // 2 :]
    turns = np.exp(1j * np.outer(np.arange(T), base ** (-2 * np.arange(E // 2) / E)))
    return np.concatenate([(pairs * turns).real, (pairs * turns).imag], axis=1)
