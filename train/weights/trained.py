"""Loads the trained model of a run: the weights of its newest checkpoint, its config and its network. Read-only."""

import json
import pathlib
from typing import Any, NamedTuple

from flax import traverse_util

from train.config.fields import Config, model_config
from train.config.saved import from_json
from train.errors import UserError
from train.weights.params import read_params


class Trained(NamedTuple):
    config: Config
    model: Any  # its network, as a Config of `models/`
    params: Any  # in the memory of the host
    step: int
    digest: str  # of the data that it was trained on


def load_trained(folder: pathlib.Path) -> Trained:
    """Loads the newest intact checkpoint of a run folder, without the state of the optimizer.

    Raises:
        UserError: the folder is not a run folder, or has no intact checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder: it holds no config.json.")
    params, meta = read_params(folder)
    config = from_json(json.dumps(meta["config"]), str(folder))
    # The number of tokens or classes came from the data, which need not be available here.
    rows = params.get("embed/embedding")
    outputs = params["head/kernel"].shape[-1] if rows is None else rows.shape[0]
    model = model_config(config, outputs)
    nested = traverse_util.unflatten_dict(params, sep="/")
    return Trained(config, model, nested, meta["step"], meta["text"])
