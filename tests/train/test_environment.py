"""The launcher: what it keeps, what it makes anew, and what it says. Nothing here needs a network."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

from train import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A repository with the launcher, a lock, and an environment that is marked as installed."""
    (tmp_path / "train").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROOT / "train/environment.py", tmp_path / "train")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / ".venv")
    (tmp_path / ".venv/installed").write_text(environment.wanted_marker())
    return tmp_path


def launch(checkout: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    # No index and no cache: an install that is tried fails at once.
    cut_off = {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "UV_OFFLINE": "1", "UV_NO_CACHE": "1"}
    return subprocess.run(
        [sys._base_executable, str(checkout / "train/environment.py"), *arguments],
        cwd=checkout / "elsewhere",
        env=os.environ | cut_off,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_ready_environment_runs_the_command_in_the_repository(checkout):
    asked = "import os, sys; print(os.getcwd(), sys.prefix, sys.argv[1:]); sys.exit(7)"
    done = launch(checkout, "-c", asked, "--run.steps", "2")
    assert done.returncode == 7
    assert done.stdout.split("\n")[0] == f"{checkout} {checkout}/.venv ['--run.steps', '2']"
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("using .venv (Python 3.")


def test_the_activated_environment_finds_the_checkout_from_every_folder(checkout):
    """By a relative path, so that a checkout can be moved."""
    launch(checkout, "-c", "pass")
    (checkout / "train/found.py").write_text("")
    moved = checkout.parent / "moved"
    checkout.rename(moved)
    asked = [moved / ".venv/bin/python", "-c", "import train.found; print(train.found.__file__)"]
    done = subprocess.run(asked, cwd=moved / "elsewhere", capture_output=True, text=True)
    assert done.stdout.strip() == str(moved / "train/found.py"), done.stderr


def test_a_linked_environment_of_another_checkout_stays_as_it_is(checkout):
    (checkout / ".venv").rename(checkout / "of-another")
    (checkout / ".venv").symlink_to(checkout / "of-another")
    assert launch(checkout, "-c", "pass").returncode == 0
    assert not list((checkout / "of-another").rglob("checkout.pth"))


@pytest.mark.parametrize("change", ["lock", "python"])
def test_a_linked_environment_that_does_not_fit_is_never_cleared(checkout, change):
    """It belongs to another checkout, where somebody may be using it."""
    (checkout / ".venv").rename(checkout / "of-another")
    (checkout / ".venv").symlink_to(checkout / "of-another")
    if change == "lock":
        with (checkout / "requirements.lock").open("a") as lock:
            lock.write("# changed\n")
    else:
        (checkout / "of-another/installed").write_text("0 python 3.11.0 linux x86_64\n")
    before = sorted(checkout.glob("of-another/**/*"))
    done = launch(checkout, "-c", "print('ran')")
    assert done.returncode == 1 and "ran" not in done.stdout
    assert f".venv is a link to {checkout}/of-another" in done.stderr
    assert "Remove the link" in done.stderr and "Traceback" not in done.stderr
    assert len(before) > 5 and sorted(checkout.glob("of-another/**/*")) == before


@pytest.mark.parametrize("change", ["lock", "interrupted", "python"])
def test_anything_else_is_set_up_again_and_a_failure_is_told(checkout, change):
    marker = checkout / ".venv/installed"
    if change == "lock":
        with (checkout / "requirements.lock").open("a") as lock:
            lock.write("# changed\n")
    else:
        old = {"interrupted": "being installed\n", "python": "0 python 3.11.0 linux x86_64\n"}
        marker.write_text(old[change])
    done = launch(checkout, "-c", "print('ran')")
    assert done.returncode == 1 and "ran" not in done.stdout
    assert done.stderr.startswith("setting up .venv from requirements.lock")
    assert "could not be installed" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists()


def test_no_arguments_shows_how_to_call_it(checkout):
    done = launch(checkout)
    assert done.returncode == 1 and "-m pytest" in done.stderr


def test_the_installer_of_the_lock_is_pinned_by_hash():
    text = environment.stanza((ROOT / "requirements.lock").read_text(), "uv")
    first, *hashes = text.splitlines()
    assert first.startswith("uv==")
    assert hashes and all(line.strip().startswith("--hash=sha256:") for line in hashes)
    assert environment.stanza(
        "a==1 \\\n    --hash=sha256:0\nuv==2 \\\n    --hash=sha256:1\n", "uv"
    ) == ("uv==2 \\\n    --hash=sha256:1\n")


def test_an_environment_that_someone_else_made_is_kept_if_it_fits(checkout, monkeypatch):
    folder = checkout / ".venv"
    monkeypatch.setattr(environment, "PYTHON", folder / "bin/python")
    assert environment.is_own_kind(folder)
    config = folder / "pyvenv.cfg"
    config.write_text(config.read_text().replace("version = 3.", "version = 2."))
    assert not environment.is_own_kind(folder)


def test_an_old_python_can_read_the_file_as_far_as_the_refusal():
    source = (ROOT / "train/environment.py").read_text()
    tree = ast.parse(source, feature_version=(3, 7))
    before = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    refusal = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.If))
    assert all(isinstance(n, ast.Import | ast.Expr) for n in tree.body[:refusal])
    assert before and "3.11 or newer" in ast.unparse(tree.body[refusal])


def test_the_launcher_imports_the_standard_library_alone():
    tree = ast.parse((ROOT / "train/environment.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names <= set(sys.stdlib_module_names)
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    # Called as a script, its folder comes first on the path: no neighbour may hide one of them.
    assert not names & {p.stem for p in (ROOT / "train").glob("*.py")}
