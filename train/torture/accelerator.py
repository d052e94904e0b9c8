"""A reliability test on an accelerator: a run that is stopped and goes on has the losses of one that is not."""

import os
import signal
import subprocess
import sys
from typing import Any

from train.torture.runs import INTERVAL, RunProcess, Workspace, last_step, losses

# GPUs add in an order of their own unless told otherwise.
SAME_ORDER = "--xla_gpu_deterministic_ops=true"


def present(platform: str) -> bool:
    """Whether JAX finds devices of this platform here; asked in another process, which lets go of them."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True,
        timeout=300,
    )
    return done.returncode == 0


def stop_and_go_on(workspace: Workspace, platform: str) -> dict[str, Any]:
    """Trains once without a stop, and once with SIGTERM and a restart, on one device of the platform."""
    steps, log = 6 * INTERVAL, workspace.folder / f"{platform}.log"
    more = ["--mesh.data", "1"]
    before = os.environ.get("XLA_FLAGS")
    if platform == "cuda":
        os.environ["XLA_FLAGS"] = f"{before or ''} {SAME_ORDER}".strip()
    try:
        whole = workspace.flags(f"{platform}-whole", steps, *more)
        codes = [RunProcess(whole, log, platform=platform).end()]
        name = f"{platform}-stopped"
        flags, run = workspace.flags(name, steps, *more), workspace.run(name)
        running = RunProcess(flags, log, platform=platform)
        if met := running.until(lambda: last_step(run) > INTERVAL):
            running.process.send_signal(signal.SIGTERM)
        codes += [running.end(), RunProcess(flags, log, platform=platform).end()]
    finally:
        os.environ.pop("XLA_FLAGS", None)
        if before is not None:
            os.environ["XLA_FLAGS"] = before
    expected, seen = losses(workspace.run(f"{platform}-whole")), losses(run)
    return {
        "stopped": met and codes == [0, 128 + signal.SIGTERM, 0],
        "losses": len(expected),
        "wrong_losses": sum(seen.get(step) != loss for step, loss in expected.items()),
    }
