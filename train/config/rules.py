"""What a run may change when it goes on."""

# Nothing of this moves a weight (a mesh does, by rounding).
MAY_CHANGE = (
    *("run.name", "run.folder", "run.steps", "run.log_every", "run.eval_every", "run.eval_batches"),
    "run.max_skipped",
    *("run.save_every", "run.keep", "run.keep_every", "run.migrate", "run.restart"),
    *("run.tensorboard", "run.wandb"),
    # The digest of the tokens decides.
    *("data.text", "data.tokenizer", "data.cache", "images.folder", "images.workers"),
    *("mesh.replica", "mesh.data", "mesh.fsdp", "mesh.tensor"),
)

# What it may change besides with run.migrate.
MAY_MIGRATE = ("optimizer.", "decay.")
