"""Extracts the weights of a run into a separate folder.

    python -m train params runs/small-001 --out weights [--step 500]

    weights/params/          the tree of weights (Orbax)
    weights/manifest.json    step and config of the run; shape, type and digest of every weight

Without `--step`, they come from the newest intact checkpoint. `load_params` reads them and verifies the digests.
`orbax.checkpoint.StandardCheckpointer().restore(FOLDER / "params")` reads them without this repository.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from train import disk
from train.display import say
from train.errors import UserError
from train.run import integrity
from train.run.checkpoints import Checkpoints, structure
from train.run.folder import write
from train.run.migration import parse_shape


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train params", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=disk.user_path, help="a run folder")
    parser.add_argument("--out", type=disk.user_path, required=True, help="a new folder")
    parser.add_argument("--step", type=int, help="default: the newest intact checkpoint")
    options = parser.parse_args(arguments)
    params, meta = read_params(options.run, options.step)
    save_params(options.out, params, {"step": meta["step"], "config": meta["config"]})
    count = sum(x.size for x in params.values())
    say(f"{count / 1e6:.2f}M weights of step {meta['step']}: {options.out / 'params'}")
    return 0


def read_params(run: pathlib.Path, step: int | None = None) -> tuple[dict[str, jax.Array], Any]:
    """Reads the weights in a checkpoint of a run.

    Args:
        run: folder of the run.
        step: of the checkpoint; None means the newest intact one.

    Returns:
        Weights by path, in host memory, and the meta of their checkpoint.

    Raises:
        UserError: there is no such checkpoint, or none is intact.
    """
    folder = run / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps or (step is not None and step not in steps):
        near = f" nearest: {min(steps, key=lambda n: abs(n - (step or 0)))}." if steps else ""
        raise UserError(f"{run} has no checkpoint" + (f" of step {step};{near}" if steps else "s."))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with Checkpoints(folder, read_only=True) as checkpoints:
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return checkpoints.parameters(candidate, host)
            except Exception as error:
                say(f"The checkpoint of step {candidate} cannot be read: {error}")
    raise UserError(f"No checkpoint in {folder} has intact weights.")


def save_params(folder: pathlib.Path, params: dict[str, jax.Array], more: dict[str, Any]) -> None:
    """Writes weights, given by path, into a new folder; `more` is added to the manifest.

    Raises:
        UserError: the folder is not empty.
    """
    disk.check_folder(folder, "--out")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name another with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(
            folder.resolve() / "params", traverse_util.unflatten_dict(dict(params), sep="/")
        )
    table = {
        path: {"array": text, "digest": digest}
        for (path, text), digest in zip(
            structure(params).items(), integrity.digests(params).values(), strict=True
        )
    }
    manifest = integrity.add_digest({**more, "weights": table})
    write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def load_params(folder: pathlib.Path, sharding: jax.sharding.Sharding) -> Any:
    """Loads the tree of weights that `save_params` wrote, and verifies the digests in its manifest.

    Raises:
        integrity.Damaged: the weights or the manifest are damaged.
    """
    table = integrity.verify_digest(json.loads((folder / "manifest.json").read_text()))["weights"]
    shapes = {path: parse_shape(entry["array"]) for path, entry in table.items()}
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for path, x in shapes.items()
    }
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(
            folder.resolve() / "params", traverse_util.unflatten_dict(wanted, sep="/")
        )
    wanted_digests = {path: entry["digest"] for path, entry in table.items()}
    integrity.compare_digests(integrity.digests(params), wanted_digests)
    return params
