"""What a run has learned: the weights of its newest checkpoint, and what they are weights of. Only reads."""

import json
import pathlib
from typing import Any, NamedTuple

from train.config.fields import Config, UserError, model_config
from train.config.saved import from_json
from train.weights import params as params_lib


class Trained(NamedTuple):
    config: Config
    model: Any  # its network, as a Config of `models/`
    params: Any  # in the memory of the host
    step: int


def newest(folder: pathlib.Path) -> Trained:
    """The newest checkpoint of a run folder, without the state of its optimizer.

    Raises:
        UserError: not a run folder, or one without a checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder: it holds no config.json.")
    params, meta = params_lib.read(folder)
    config = from_json(json.dumps(meta["config"]), str(folder))
    # Only the data knew how many tokens or classes there are.
    rows = params.get("embed/embedding")
    outputs = params["head/kernel"].shape[-1] if rows is None else rows.shape[0]
    model = model_config(config, outputs)
    return Trained(config, model, params_lib.nested(params), meta["step"])
