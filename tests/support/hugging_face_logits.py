"""What transformers makes of models; run by a Python that has torch and transformers:

    python tests/support/hugging_face_logits.py FOLDER

Every folder in it holds tokens.npy, and may hold `ours/`, a model to load, whose logits go to ours.npy,
and asked.json, a config whose model is drawn at random and saved to `theirs/`, its logits to theirs.npy.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def make(asked: pathlib.Path, folder: pathlib.Path) -> None:
    torch.manual_seed(7)
    described = transformers.AutoConfig.for_model(**json.loads(asked.read_text()))
    model = transformers.AutoModelForCausalLM.from_config(described)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # at their first values norms and biases would hide mistakes
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder, max_shard_size="10KB")


def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(told[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")):
        sys.exit(f"transformers did not take all of {folder}: {told}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


if __name__ == "__main__":
    for case in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        if (case / "asked.json").exists():
            make(case / "asked.json", case / "theirs")
        for kind in ("theirs", "ours"):
            if (case / kind).exists():
                np.save(case / f"{kind}.npy", logits(case / kind, np.load(case / "tokens.npy")))
