"""What can be installed: the library, and the training program as a distribution of its own."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAM = tomllib.loads((ROOT / "train/pyproject.toml").read_text())["project"]


def built(folder: pathlib.Path, out: pathlib.Path, kind: str = "wheel") -> pathlib.Path:
    """Builds the distribution of a folder."""
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return out / done.stdout.strip()


def contents(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return built(ROOT / "train", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_of_the_program_holds_train_and_models_alone(program):
    there = {path for folder in ("train", "models") for path in (ROOT / folder).rglob("*.py")}
    wanted = {str(path.relative_to(ROOT)) for path in there} - {"train/hatch_build.py"}
    assert contents(program) == wanted and len(wanted) > 100


def test_a_source_distribution_of_the_program_makes_the_same_wheel(program, tmp_path):
    with tarfile.open(built(ROOT / "train", tmp_path, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert contents(built(folder, tmp_path)) == contents(program)


def test_the_installed_program_runs_without_a_checkout(program, tmp_path):
    """As pip unpacks it: nothing of the checkout is on the path, and there is no repository around it."""
    for wheel in (program, built(ROOT, tmp_path)):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "elsewhere",
            env=variables,
            capture_output=True,
            text=True,
        )

    asked = run("-m", "train", "--help", "run")
    assert asked.returncode == 0 and "--run.steps INT" in asked.stdout, asked.stderr
    code = "import train.main as m, optax_decay, models.llama as l; from train.run import folder"
    code += "; print(m.__file__, optax_decay.__file__, l.__file__, folder.environment()['commit'])"
    *files, commit = run("-c", code).stdout.split()
    assert len(files) == 3 and commit == "None"
    assert all(file.startswith(str(tmp_path / "installed")) for file in files)


def test_both_have_one_version_and_the_program_asks_for_it():
    assert LIBRARY["version"] == PROGRAM["version"]
    assert f"optax_decay=={LIBRARY['version']}" in PROGRAM["dependencies"]


def test_accelerators_are_extras_that_jax_has():
    extras = LIBRARY["optional-dependencies"]
    assert {"cuda12", "cuda13", "tpu"} <= set(extras)
    # The library holds no extra that promises the program: an extra cannot add packages to a wheel.
    assert "train" not in extras
    import importlib.metadata

    known = set(importlib.metadata.metadata("jax").get_all("Provides-Extra") or ())
    for name in ("cuda12", "cuda13", "tpu"):
        (requirement,) = extras[name]
        assert re.match(rf"jax\[{name}\]", requirement) and name in known


def test_commands_that_pages_show_name_distributions_that_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    asked = set(re.findall(r"(?:\.|optax_decay|\./train|optax_decay_train)\[([\w,-]+)\]", text))
    extras = {*LIBRARY["optional-dependencies"], *PROGRAM["optional-dependencies"]}
    assert asked and {name for names in asked for name in names.split(",")} <= extras
    assert "pip install . ./train" in text
