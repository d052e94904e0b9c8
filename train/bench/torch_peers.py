"""The same models and updates in PyTorch, as its users run them, for comparison with our training step.

torch and transformers are imported when a function is called, not before.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np


def hugging_face(
    tokens: np.ndarray, shape: dict[str, int], autocast: bool, compiled: bool = False
) -> Callable[[], Any]:
    """A function that updates transformers' LlamaForCausalLM by torch's AdamW, on a GPU if torch has one.

    Args:
        tokens: int32 [sequences, positions + 1].
        shape: `width`, `mlp_width`, `layers`, `heads` and `vocabulary`.
        autocast: whether products are computed in bfloat16.
        compiled: whether torch.compile compiles the model; otherwise it runs in eager mode.

    Raises:
        ImportError: torch or transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=tokens.shape[1] - 1,
        use_cache=False,
    )
    torch: Any = importlib.import_module("torch")
    model = transformers.LlamaForCausalLM(config).to(_device())
    model = torch.compile(model) if compiled else model
    return _update(model, lambda x, y: model(input_ids=x, labels=x).loss, tokens, autocast)


def plain_gpt(tokens: np.ndarray, shape: dict[str, int], autocast: bool) -> Callable[[], Any]:
    """A function that updates a GPT-2 written in plain torch, in the style of small training scripts.

    It has no biases, one product for queries, keys and values, fused attention, and a tied head. For arguments and
    errors see `hugging_face`.
    """
    torch: Any = importlib.import_module("torch")
    nn, functional = torch.nn, torch.nn.functional
    D, F, H, V = (shape[name] for name in ("width", "mlp_width", "heads", "vocabulary"))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            heads = self.qkv(self.norm1(x)).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(V, D), nn.Embedding(tokens.shape[1] - 1, D)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape["layers"])))
            self.norm, self.head = nn.LayerNorm(D, bias=False), nn.Linear(D, V, bias=False)
            self.head.weight = self.embed.weight
            nn.init.normal_(self.embed.weight, std=0.02)

        def forward(self, x: Any) -> Any:
            x = self.embed(x) + self.position.weight[: x.shape[1]]
            return self.head(self.norm(self.blocks(x)))

    model = GPT().to(_device())

    def loss(x: Any, y: Any) -> Any:
        return functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())

    return _update(model, loss, tokens, autocast)


def _device() -> str:
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _update(model: Any, loss: Any, tokens: np.ndarray, autocast: bool) -> Callable[[], Any]:
    torch: Any = importlib.import_module("torch")
    device = _device()
    fused = {"fused": True} if device == "cuda" else {}
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **fused)
    x, y = (
        torch.from_numpy(part.astype(np.int64)).to(device)
        for part in (tokens[:, :-1], tokens[:, 1:])
    )

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            value = loss(x, y)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run
