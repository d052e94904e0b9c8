# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # Interrupt a training run and resume it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# This notebook uses the training program from its command line. It starts a named experiment, stops it as a scheduler
# stops a job on a preempted machine, and resumes it. The losses equal those of an uninterrupted run bit for bit.

# %% tags=["setup"]
# Finds the library, and installs what is missing. In a checkout there is nothing to do. Elsewhere, as in Colab, either
# upload the two wheels that `pip wheel --no-deps . ./train` makes in a checkout, or write its git address here:
REPOSITORY = ""
import importlib.util
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
places = (here, *here.parents, here / "optax_decay")
root = next((p for p in places if (p / "optax_decay" / "__init__.py").is_file()), None)
needed = ("optax", "flax", "orbax", "tyro", "tokenizers", "rich", "matplotlib")
install = []
if root is not None:
    sys.path.insert(0, str(root))
    if not all(map(importlib.util.find_spec, needed)):
        install = [str(root), str(root / "train")]
elif not importlib.util.find_spec("optax_decay"):
    install = [str(wheel) for wheel in here.glob("optax_decay*.whl")]
    if not install and REPOSITORY:
        install = [f"git+{REPOSITORY}", f"git+{REPOSITORY}#subdirectory=train"]
    if not install:
        raise FileNotFoundError(
            f"There is no checkout in {here}, above it, or in {places[-1]}, no wheel optax_decay*.whl in {here},"
            " and REPOSITORY, in this cell, is empty. One of the three is needed."
        )
if install:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *install], check=True)

# %% tags=["parameters"]
experiment, steps, stop_after = "small_alphadecay", 120, 40
flags = []

# %%
import json
import shutil
import signal
import time

import matplotlib.pyplot as plt

root = root or here  # without a checkout, the runs lie beside the notebook
folders = {name: pathlib.Path("runs") / f"notebook-{name}" for name in ("whole", "interrupted")}
for folder in folders.values():
    shutil.rmtree(root / folder, ignore_errors=True)


def start(*arguments):
    command = [sys.executable, "-m", "train", *arguments]
    print("$", "python -m train", *arguments)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=root, text=True, **pipes)


def finish(process):
    output, _ = process.communicate()
    print("\n".join(output.splitlines()[-8:]), "\n")
    return process.returncode


def losses(name):
    """Loss of every step that was recorded."""
    path = root / folders[name] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def options(name):
    return [experiment, "--run.steps", str(steps), "--run.folder", str(folders[name]), *flags]


# %% [markdown]
# ## An uninterrupted run

# %%
assert finish(start(*options("whole"))) == 0

# %% [markdown]
# ## Interrupted
# The scheduler asks the program to end by sending SIGTERM. The program finishes its step, saves a checkpoint, and
# prints the command that resumes the run.

# %%
process = start(*options("interrupted"))
while process.poll() is None and len(losses("interrupted")) < stop_after:
    time.sleep(0.1)
process.send_signal(signal.SIGTERM)
print("exit code", finish(process))
reached = max(losses("interrupted"))
print(f"saved after step {reached} of {steps}")

# %% [markdown]
# ## Resumed

# %%
assert finish(start("--resume", str(folders["interrupted"]))) == 0
whole, resumed = losses("whole"), losses("interrupted")
print(f"{len(whole)} steps; losses that differ: {sum(whole[s] != resumed[s] for s in whole)}")
assert whole == resumed

# %%
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.plot(
    list(whole), list(whole.values()), "-", color="0.7", linewidth=4, label="uninterrupted run"
)
axis.plot(list(resumed), list(resumed.values()), "k--", linewidth=1, label="interrupted run")
axis.axvline(reached, color="k", linestyle=":", label="interrupted and resumed here")
axis.set(xlabel="step", ylabel="training loss [nats per token]")
axis.legend(frameon=False)
plt.show()
