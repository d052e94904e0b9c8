"""Runs `python ARGUMENTS` inside the environment that requirements.lock describes.

    python3 train/environment.py -m train
    python3 train/environment.py -m pytest -n 2

It only needs Python >= 3.11 with pip. The first call creates `.venv` in the repository, and installs every package of
requirements.lock after checking its hash; later calls only read a marker file. The marker is written last, so an
interrupted installation is repeated. It contains the digest of the lock and the version of Python, so a changed lock
is installed again, and another Python gets a new `.venv`.

After `source .venv/bin/activate`, plain `python -m train` works in every folder: the environment knows the checkout.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv

if sys.version_info < (3, 11):  # noqa: UP036  (older versions must get this message, too)
    sys.exit(
        f"This program needs Python 3.11 or newer, and this is Python {platform.python_version()}"
        f" ({sys.executable}). Install a newer one, then call it by name, for example:"
        " python3.12 train/environment.py -m train"
    )

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
MARKER = VENV / "installed"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
UV = PYTHON.with_name("uv.exe" if os.name == "nt" else "uv")


def wanted_marker() -> str:
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return f"{digest} python {platform.python_version()} {sys.platform} {platform.machine()}\n"


def read_marker() -> str:
    return MARKER.read_text() if MARKER.is_file() and PYTHON.exists() else ""


def stanza(lock: str, name: str) -> str:
    """The lines of one package in a lock file: its version, and the hashes below it."""
    lines = lock.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(name + "=="))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i][0].isspace()), len(lines))
    return "".join(lines[start:end])


def is_own_kind(folder: pathlib.Path) -> bool:
    """Whether a `.venv` without a marker is complete and has this version of Python, so that it can be kept."""
    config = folder / "pyvenv.cfg"
    if not (PYTHON.exists() and config.is_file()):
        return False
    pairs = dict(line.split(" = ", 1) for line in config.read_text().splitlines() if " = " in line)
    version = pairs.get("version") or pairs.get("version_info", "")
    return version.startswith(platform.python_version())


def call(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )


def pip(*arguments: object) -> subprocess.CompletedProcess:
    """Runs the pip of the calling Python on `.venv`, which needs no pip of its own."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    return call(sys.executable, "-m", "pip", "--python", PYTHON, *quiet, *arguments)


def install() -> None:
    """Installs exactly the packages of the lock into `.venv`; exits with the installer's message on failure."""
    keep = not MARKER.exists() and is_own_kind(VENV)
    if not keep:
        venv.EnvBuilder(clear=True, symlinks=os.name != "nt", with_pip=False).create(VENV)
    MARKER.write_text("being installed\n")
    first = VENV / "uv.txt"
    first.write_text(stanza(LOCK.read_text(), "uv"))
    output = pip("install", "--require-hashes", "--no-deps", "-r", first).stdout
    first.unlink()
    done = None
    if UV.exists():
        sync = ("pip", "sync", "--quiet", "--require-hashes", "--python", PYTHON, LOCK)
        # A uv that was built for another kind of machine raises OSError.
        with contextlib.suppress(OSError):
            done = call(UV, *sync)
    if done is None or done.returncode:
        output = done.stdout if done else output
        done = pip("install", "--require-hashes", "-r", LOCK)
    if done.returncode:
        MARKER.unlink()
        if not keep:
            shutil.rmtree(VENV, ignore_errors=True)
        last = "\n".join((output + "\n" + done.stdout).strip().splitlines()[-12:])
        sys.exit(
            "Setting up .venv failed: the packages of requirements.lock could not be installed. It needs a"
            " network connection, about 1 GB of disk space, and pip for this Python. The installers' last"
            " lines:\n" + last
        )
    MARKER.write_text(wanted_marker())


def show_checkout() -> None:
    """Puts the checkout on the path of `.venv`, so that its packages can be imported from every folder."""
    packages = pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": str(VENV)}))
    path = packages / "checkout.pth"
    # A link to an environment of another checkout stays as it is.
    if not VENV.is_symlink() and not path.is_file():
        with contextlib.suppress(OSError):
            path.write_text(os.path.relpath(ROOT, packages) + "\n")


@contextlib.contextmanager
def one_at_a_time():
    """Lets only one process install at a time; others wait."""
    with open(LOCK, "rb") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    if read_marker() != wanted_marker():
        if VENV.is_symlink():  # others may be using it, with another lock or another Python
            sys.exit(
                f"{VENV} is a link to {os.path.realpath(VENV)}, which does not hold what requirements.lock and Python"
                f" {platform.python_version()} ask for, and is left as it is. Remove the link, and this command makes a"
                " .venv of its own; or use that environment: source .venv/bin/activate"
            )
        if pathlib.Path(sys.prefix).resolve() == VENV:
            # The Python inside `.venv` cannot rebuild it, so the Python that created it takes over.
            base = sys._base_executable  # pyrefly: ignore
            os.execv(base, [base, __file__, *arguments])
        say("setting up .venv from requirements.lock (about 20 s) ...")
        with one_at_a_time():
            if read_marker() != wanted_marker():
                install()
    show_checkout()
    away = "" if pathlib.Path.cwd() == ROOT else f", in {ROOT}: relative paths start there"
    say(f"using .venv (Python {platform.python_version()}{away})")
    os.chdir(ROOT)
    if os.name == "nt":
        sys.exit(subprocess.run([PYTHON, *arguments]).returncode)
    os.execv(PYTHON, [str(PYTHON), *arguments])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
