"""The ViT forward pass written again: NumPy, float64, one image, one patch, one head at a time."""

import math

import numpy as np


def forward(config, params, images, kept=None):
    """Logits [B, C]; `kept` [L, 2, B] multiplies what sublayers add."""
    kept = np.ones((config.layers, 2, len(images))) if kept is None else np.asarray(kept)
    params = _float64(params)
    return np.stack([_image(config, params, x, kept[..., i]) for i, x in enumerate(images)])


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def _image(config, params, image, kept):
    size, rows = config.patch_size, [params["class_token"]]
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            patch = image[top : top + size, left : left + size].astype(np.float64)
            rows.append(patch.ravel() @ params["embed"]["kernel"] + params["embed"]["bias"])
    x = np.stack(rows) + params["position"]["embedding"]
    for layer in range(config.layers):
        block = _slice(params["blocks"], layer)
        x = x + kept[layer, 0] * _attend(
            block["attention"], _norm(config, block["attention_norm"], x)
        )
        y = _norm(config, block["mlp_norm"], x) @ block["mlp"]["up"]["kernel"]
        y = y + block["mlp"]["up"]["bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        y = y @ block["mlp"]["down"]["kernel"] + block["mlp"]["down"]["bias"]
        x = x + kept[layer, 1] * y
    x = _norm(config, params["final_norm"], x[0])
    x = x * (config.base_width or config.width) / config.width
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def _slice(tree, layer):
    return {n: _slice(t, layer) if isinstance(t, dict) else t[layer] for n, t in tree.items()}


def _norm(config, part, x):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * part["scale"] + part["bias"]
    )


def _attend(part, x):
    heads = part["query"]["kernel"].shape[1]
    total = part["out"]["bias"]
    for h in range(heads):
        q, k, v = (
            x @ part[name]["kernel"][:, h] + part[name]["bias"][h]
            for name in ("query", "key", "value")
        )
        odds = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        total = total + odds / odds.sum(-1, keepdims=True) @ v @ part["out"]["kernel"][h]
    return total
