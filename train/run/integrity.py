"""Whether bytes are still what was written: digests of arrays, of JSON, and of the files of a folder.

**Arrays** are digested where they are. The words w_i of an array (its elements, as unsigned integers
of 32 bits) are mixed with their position and summed modulo 2^32, twice:

    a_i = f(w_i xor f(i + c)),   digest = (sum a_i, sum f(a_i xor k)),   f: MurmurHash3's finaliser

f maps 32 bits to 32 bits one to one, so that whatever happens to one word, a single flipped bit
included, changes the digest with certainty, and any other damage changes it but for one chance in
2^64. Sums do not care who holds which part: one jitted call gives the same digest on any mesh and
any number of processes, reads every array once, and moves eight bytes of each to the host. It
guards against rot, not against an author of forgeries.

**Files** are digested by BLAKE2b on the host, and listed in a `seal` beside them.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.parameters.paths import leaf_paths

SEAL = "seal.json"


class Damaged(Exception):
    """Bytes are not what was written."""


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser; one to one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The elements of an array as uint32, with a last axis of 2 for elements of 64 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)])
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    same = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, same).astype(jnp.uint32)


def _digest(x: jax.Array) -> jax.Array:
    """uint32 [2]."""
    words = _words(x)
    place, stride = jnp.zeros_like(words), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    first = _mix(words ^ _mix(place + jnp.uint32(0x9E3779B9)))
    second = _mix(first ^ jnp.uint32(0x7F4A7C15))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_digest(x) for x in leaves]


def digests(state: Any) -> dict[str, str]:
    """Path to 16 hexadecimal digits of every array of a tree."""
    found = jax.device_get(_digests(jax.tree.leaves(state)))
    texts = [f"{int(a):08x}{int(b):08x}" for a, b in np.asarray(found, np.uint32).reshape(-1, 2)]
    return dict(zip(leaf_paths(state), texts, strict=True))


def compare_digests(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises Damaged, with names, unless every array of `found` has the digest in `wanted`."""
    wrong = [path for path, digest in found.items() if wanted.get(path) != digest]
    if wrong:
        raise Damaged(f"{len(wrong)} of {len(found)} arrays are not what was saved: {wrong[0]}")


def signed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON with a digest of itself."""
    return {**values, "digest": _text_digest(values)}


def verified(values: Any) -> dict[str, Any]:
    """What was `signed`, without the digest; raises Damaged if it is anything else."""
    if not isinstance(values, dict) or "digest" not in values:
        raise Damaged("a file of JSON is not what was written")
    rest = {name: value for name, value in values.items() if name != "digest"}
    if values["digest"] != _text_digest(rest):
        raise Damaged("a file of JSON is not what was written")
    return rest


def _text_digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def seal(folder: pathlib.Path) -> None:
    """Lists size and digest of every file of a folder in a file of its own."""
    part = folder / f"{SEAL}.part"
    part.write_text(json.dumps(signed({"files": _files(folder)}), indent=1) + "\n")
    part.replace(folder / SEAL)


def is_sealed(folder: pathlib.Path) -> bool:
    return (folder / SEAL).is_file()


def check_seal(folder: pathlib.Path) -> None:
    """Raises Damaged, with the name of a file, unless the folder holds all that was sealed.

    Further files, such as a file manager's, are no damage: nobody reads them. The seal only says
    what to find: no path in it is ever opened.
    """
    try:
        text = (folder / SEAL).read_text()
        wanted = verified(json.loads(text)).get("files")
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{SEAL} cannot be read ({type(error).__name__})") from None
    if not isinstance(wanted, dict) or text != json.dumps(json.loads(text), indent=1) + "\n":
        raise Damaged(f"{SEAL} is not what was written")
    found = _files(folder)
    for name in wanted:
        if name not in found:
            raise Damaged(f"{name} is missing")
        if wanted[name] != found[name]:
            raise Damaged(f"{name} is not what was written")


def _files(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Relative path to [bytes, digest] of every file but the seal."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path not in (folder / SEAL, folder / f"{SEAL}.part")
    )

    def digest(path: pathlib.Path) -> list[Any]:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return [path.stat().st_size, found.hexdigest()]

    # hashlib lets go of the interpreter, so that threads do help.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(digest, paths)
        return {path.relative_to(folder).as_posix(): seen for path, seen in zip(paths, found)}
