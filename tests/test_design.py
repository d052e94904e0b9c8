"""The rules of the layout: what imports what, what is in the wheel, how long a file is, what is never committed."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "RESULTS.md",
    "docs",
    "models",
    "notebooks",
    "optax_decay",
    "pyproject.toml",
    "requirements.lock",
    "tests",
    "train",
}
MAY_IMPORT = {
    "optax_decay": {"jax", "jaxlib", "numpy", "optax", "scipy", "optax_decay"},
    "models": {"jax", "numpy", "flax", "models"},
}


def tracked() -> list[pathlib.Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def python_files(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_top_level_is_exactly_what_the_design_says():
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert found == TOP_LEVEL


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_point_one_way(folder):
    standard = set(sys.stdlib_module_names)
    for path in python_files(folder):
        extra = imports(path) - standard - MAY_IMPORT[folder]
        assert not extra, f"{path.name} imports {sorted(extra)}"


# From the top of the library down: a shelf may import from those below it, never from those above.
SHELVES = (
    *(
        "optimizers",
        "one_bit",
        "norms",
        "decays",
        "spectral",
        "width",
        "stepping",
        "matrices",
        "product",
    ),
    "parameters",
)


def test_shelves_of_the_library_import_downwards():
    for path in python_files("optax_decay"):
        shelf = path.relative_to(ROOT / "optax_decay").parts[0]
        if shelf not in SHELVES:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optax_decay"):
                parts = node.module.split(".")
                assert len(parts) > 1, f"{path.name} imports names of the package itself"
                assert SHELVES.index(parts[1]) >= SHELVES.index(shelf), (
                    f"{path.name} on {shelf} imports {node.module}"
                )


# Files that still import modules from inside the library. The list may only become shorter.
def public_names() -> set[str]:
    """Names that `optax_decay/__init__.py` binds."""
    tree = ast.parse((ROOT / "optax_decay/__init__.py").read_text("utf-8"))
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imported for alias in node.names}


def internal_names(path: pathlib.Path, public: set[str]) -> set[str]:
    """Names of the library that a file uses, and that are not reachable from `optax_decay/__init__.py`."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names if alias.name.startswith("optax_decay.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "optax_decay":
            used |= {f"optax_decay.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optax_decay."):
            used.add(node.module or "")
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "optax_decay"
        ):
            used.add(f"optax_decay.{node.attr}")
    return {name for name in used if name.count(".") > 1 or name.split(".")[1] not in public}


def test_trainer_and_notebooks_import_public_names_only():
    public = public_names()
    files = [path for folder in ("train", "notebooks") for path in python_files(folder)]
    found = {str(path.relative_to(ROOT)): internal_names(path, public) for path in files}
    found = {path: names for path, names in found.items() if names}
    assert not found, "import these from optax_decay or one of its namespaces"


def test_trainer_does_not_import_the_tests():
    for path in python_files("train"):
        assert "tests" not in imports(path), path


def test_every_folder_says_what_it_holds():
    for top in ("optax_decay", "train"):
        for folder in {path.parent for path in python_files(top)}:
            sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
            assert sentence and sentence.splitlines()[0].endswith("."), folder


def test_library_imports_without_flax_or_the_trainer():
    code = "import sys, optax_decay; assert not {'flax', 'orbax', 'train', 'models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_and_functions_stay_readable():
    """About 300 lines a file and 60 a function, docstrings not counted: past that there is a second idea in it."""
    for folder in ("optax_decay", "models", "train"):
        for path in python_files(folder):
            tree = ast.parse(path.read_text("utf-8"))
            assert code_lines(tree) <= 330, path.name
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    assert code_lines(node) <= 75, f"{path.name}: {node.name}"


# The share may only fall; a tenth is the aim.
PLAIN_ANY = 0.14


def test_few_arguments_of_the_library_are_plainly_any():
    """Annotations tell a reader what an argument is; ``**extra: Any`` and the states of transformations cannot."""
    annotations = [
        argument.annotation
        for path in python_files("optax_decay")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        for argument in [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *filter(None, [node.args.vararg, node.args.kwarg]),
        ]
        if argument.annotation
    ]
    plain = [a for a in annotations if ast.unparse(a) == "Any"]
    assert len(annotations) > 1000
    assert len(plain) / len(annotations) <= PLAIN_ANY


def test_the_nearest_name_is_looked_up_in_one_place():
    users = {p.name for p in python_files("optax_decay") if "difflib" in p.read_text("utf-8")}
    assert users == {"arguments.py"}


def code_lines(node: ast.AST) -> int:
    """Lines from first to last, less docstrings and, for a function, less the functions defined in it."""

    def span(inner: ast.AST) -> int:
        return (inner.end_lineno or 0) - inner.lineno + 1  # type: ignore[attr-defined]

    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    total = max((getattr(n, "end_lineno", 0) or 0) for n in ast.walk(node))
    total -= getattr(node, "lineno", 1) - 1
    if isinstance(node, ast.FunctionDef):
        nested = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node]
        inside = {m for n in nested for m in ast.walk(n) if m is not n}
        total -= sum(span(n) for n in nested if n not in inside)
        return total - (span(node.body[0]) if ast.get_docstring(node) else 0)
    return total - sum(
        span(n.body[0])
        for n in ast.walk(node)
        if isinstance(n, documented) and ast.get_docstring(n)
    )


def test_nothing_is_committed_that_should_not_be():
    hosts = re.compile(r"(pypi|pythonhosted|npmjs|debian)\.org", re.I)
    machine_path = re.compile(r"(^|[\s\"'=(])/(root|home|work|tmp|Users)/")
    for path in tracked():
        assert path.stat().st_size < 5_000_000, path
        if path.suffix in {".png", ".npz", ".npy"} or path == pathlib.Path(__file__):
            continue
        text = path.read_text("utf-8")
        assert not hosts.search(text), path
        assert not machine_path.search(text), path


def test_only_the_library_is_in_the_wheel(tmp_path):
    name = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with zipfile.ZipFile(tmp_path / name) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(next(f for f in files if f.endswith("/METADATA"))).decode()
    code = {f for f in files if ".dist-info/" not in f}
    assert code == {
        str(p.relative_to(ROOT))
        for p in (ROOT / "optax_decay").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    needs = [
        l for l in metadata.splitlines() if l.startswith("Requires-Dist") and "extra ==" not in l
    ]
    assert sorted(re.split(r"[>= ]+", l)[1] for l in needs) == ["jax", "optax"]
