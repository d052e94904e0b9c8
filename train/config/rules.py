"""Tables about the fields of a config: what belongs to what, and what may change when a run goes on."""

from typing import Any, Literal

Direction = Literal["adam", "nadam", "lion", "exadam", "conda", "root", "sophia", "one_bit_adam"]

# Pulls with a threshold, and pulls with a proximal map.
BOUNDED = ("huber", "pseudo_huber", "log_cosh", "fair")
PROXIMAL = ("l2", "l1", "huber", "fair")

# What only some optimizers have, and its default.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"eps": 1e-8},
    "nadam": {"eps": 1e-8},
    "lion": {},
    "exadam": {"eps": 1e-8},
    "conda": {"eps": 1e-8, "refresh_every": 2000, "scale": 0.25},
    "root": {"eps": 1e-8, "momentum": 0.95},
    "sophia": {"eps": 1e-15, "refresh_every": 10, "gamma": 0.05},
    "one_bit_adam": {"eps": 1e-8, "freeze": None, "layout": "joined"}
    | {"bias_correction": True, "largest_direction": 1.0},
}
SPECTRAL = {
    "spectral_low": 2 / 3,
    "spectral_high": 3.0,
    "spectral_every": 500,
    "spectral_size": 50,
}

# What a run may change when it is continued: nothing of this moves a weight (a mesh does, by rounding).
MAY_CHANGE = (
    *("run.name", "run.folder", "run.steps", "run.log_every", "run.eval_every", "run.eval_batches"),
    "run.max_skipped",
    *("run.save_every", "run.keep", "run.keep_every", "run.migrate"),
    *("run.tensorboard", "run.wandb"),
    *("data.text", "data.cache", "images.folder"),
    *("mesh.replica", "mesh.data", "mesh.fsdp", "mesh.tensor"),
)

# What it may change besides with run.migrate.
MAY_MIGRATE = ("optimizer.", "decay.")
