"""Run by a Python that has torch and transformers, alone or from the tests:

python tests/hugging_face_logits.py make CONFIG.json FOLDER SEED     a random model, saved by transformers
python tests/hugging_face_logits.py logits FOLDER TOKENS.npy OUT.npy  what transformers makes of a folder
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def make(config: str, folder: str, seed: str, shard: str = "50GB") -> None:
    torch.manual_seed(int(seed))
    described = transformers.AutoConfig.for_model(**json.loads(pathlib.Path(config).read_text()))
    model = transformers.AutoModelForCausalLM.from_config(described)
    with torch.no_grad():
        for weight in model.parameters():
            # At their first values norms and biases would hide mistakes.
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    model.eval().save_pretrained(folder, max_shard_size=shard)


def logits(folder: str, tokens: str, out: str) -> None:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]:
        sys.exit(f"transformers did not take all: {told}")
    with torch.no_grad():
        np.save(out, model.eval()(torch.from_numpy(np.load(tokens)).long()).logits.numpy())


if __name__ == "__main__":
    {"make": make, "logits": logits}[sys.argv[1]](*sys.argv[2:])
