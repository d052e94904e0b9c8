"""The weights of a run alone, in a folder of their own.

    python -m train params runs/small-001 --out weights [--step 500]

    weights/params/          the tree of weights (Orbax)
    weights/manifest.json    step, config of the run; shape, type and digest of every weight

Without `--step`, of the newest checkpoint whose weights are what was saved. They can be read without
this repository, by `orbax.checkpoint.StandardCheckpointer().restore(FOLDER / "params")`, and with it
by `load`, which compares digests.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.config.fields import UserError
from train.display import say
from train.run import checkpoints as checkpoint
from train.run import integrity
from train.run import migration as migrate
from train.run.folder import write


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m train params", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=pathlib.Path, help="a run folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder to make")
    parser.add_argument("--step", type=int, help="of which checkpoint; else the newest good one")
    asked = parser.parse_args(arguments)
    params, meta = read(asked.run, asked.step)
    save(asked.out, params, {"step": meta["step"], "config": meta["config"]})
    count = sum(x.size for x in params.values())
    say(f"{count / 1e6:.2f}M weights of step {meta['step']}: {asked.out / 'params'}")
    return 0


def read(run: pathlib.Path, step: int | None = None) -> tuple[dict[str, jax.Array], Any]:
    """Weights by path, on the host's memory, and the meta of their checkpoint.

    Raises:
        UserError: no such checkpoint, or none whose weights are what was saved.
    """
    folder = run / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps or (step is not None and step not in steps):
        near = f" nearest: {min(steps, key=lambda n: abs(n - (step or 0)))}." if steps else ""
        raise UserError(f"{run} has no checkpoint" + (f" of step {step};{near}" if steps else "s."))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return checkpoints.parameters(candidate, host)
            except Exception as error:
                say(f"The checkpoint of step {candidate} cannot be read: {error}")
    raise UserError(f"No weights in {folder} are what was saved.")


def save(folder: pathlib.Path, params: dict[str, jax.Array], more: dict[str, Any]) -> None:
    """Writes weights given by path; refuses a folder that holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name another with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.resolve() / "params", nested(params))
    table = {
        path: {"array": text, "digest": digest}
        for (path, text), digest in zip(
            checkpoint.structure(params).items(), integrity.digests(params).values(), strict=True
        )
    }
    manifest = integrity.signed({**more, "weights": table})
    write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def load(folder: pathlib.Path, sharding: jax.sharding.Sharding) -> Any:
    """The tree of weights that `save` wrote, compared with the digests in its manifest.

    Raises:
        integrity.Damaged: they are not what was written.
    """
    table = integrity.verified(json.loads((folder / "manifest.json").read_text()))["weights"]
    shapes = {path: migrate.parse(entry["array"]) for path, entry in table.items()}
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for path, x in shapes.items()
    }
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder.resolve() / "params", nested(wanted))
    wanted_digests = {path: entry["digest"] for path, entry in table.items()}
    integrity.compare_digests(integrity.digests(params), wanted_digests)
    return params


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """ "a/b/c" to x as {"a": {"b": {"c": x}}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *groups, name = path.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = leaf
    return tree
