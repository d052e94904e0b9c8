"""The packages `train` and `models` of the training program's distribution.

`models` lies beside this folder in a checkout, and inside of it in a source distribution.
"""

import pathlib
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Packages(BuildHookInterface):
    """Says which file goes where."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        here = pathlib.Path(self.root)
        inside, beside = here / "models", here.parent / "models"
        models = inside if inside.is_dir() else beside
        files = {path: f"models/{path.relative_to(models)}" for path in models.rglob("*.py")}
        if self.target_name == "wheel":
            own = set(here.rglob("*.py")) - set(files) - {pathlib.Path(__file__).resolve()}
            files |= {path: f"train/{path.relative_to(here)}" for path in own}
        build_data["force_include"] |= {str(path): place for path, place in files.items()}
