"""The models that can be trained: one row per file of `models/`.

Each such file has Config, PRESETS, `init(config, key)`, `forward(config, params, inputs, place=)`, `axes(config)` and
`count(config)`, those of language models `features` as well. A new one is a row here, and fields for what is new in its
Config in `config.Model`.
"""

import dataclasses
from typing import Any

import jax

from models import gpt, llama, loss, vit
from models.layers import Placement

FAMILIES: dict[str, Any] = {"llama": llama, "gpt": gpt, "vit": vit}

# What each learns: a row of `tasks.TASKS`.
TASKS = {"llama": "language", "gpt": "language", "vit": "images"}

# All names for `model.preset`. That of a family alone is its Config as it comes: for a shape of
# which every size is given.
PRESETS: dict[str, Any] = {
    name: preset
    for family, module in FAMILIES.items()
    for name, preset in {**module.PRESETS, family: module.Config()}.items()
}


def of(model: Any) -> Any:
    """The file of `models/` that a model's Config belongs to."""
    return next(module for module in FAMILIES.values() if isinstance(model, module.Config))


def task(preset: str) -> str:
    """What models of a preset learn."""
    return next(TASKS[name] for name, module in FAMILIES.items() if of(PRESETS[preset]) is module)


def learning(task: str) -> list[str]:
    """Families that learn it."""
    return [name for name in FAMILIES if TASKS[name] == task]


def owners(field: str) -> list[str]:
    """Families whose Config has the field."""
    return [
        name
        for name, module in FAMILIES.items()
        if field in {f.name for f in dataclasses.fields(module.Config)}
    ]


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model as a function of weights and inputs alone."""

    model: Any  # Config of a file of models/
    place: Placement | None = None

    def __call__(self, params: Any, inputs: jax.Array, **options: Any) -> jax.Array:
        """Logits; for the options see the model's own `forward`."""
        return of(self.model).forward(self.model, params, inputs, place=self.place, **options)

    def nats(
        self, params: Any, tokens: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sum of the cross-entropy of targets that are not negative, and their number."""
        x, head = of(self.model).features(self.model, params, tokens, place=self.place)
        return loss.nats(x, head, targets)
