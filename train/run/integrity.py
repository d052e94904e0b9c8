"""Detects damage to stored data, by digests of arrays, of JSON values, and of the files in a folder.

**Arrays** are digested on their devices. The words w_i of an array (its elements as 32-bit unsigned integers) are
mixed with their positions, and summed modulo 2^32, twice::

    a_i = f(w_i xor f(i + c)),   digest = (sum a_i, sum f(a_i xor k)),   f: MurmurHash3's finaliser

f is a bijection of 32-bit integers, so every change of a single word, such as a flipped bit, changes the digest. Other
damage is missed with a probability of about 2^-64. Sums do not depend on the placement of the parts, so one jitted call
gives the same digest on any mesh and any number of processes. It reads every array once, and moves eight bytes of each
to the host. The digest detects accidental damage, not deliberate forgery.

**Files** are digested by BLAKE2b on the host, and listed in a `seal` in the same folder.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.axes import leaf_paths

SEAL = "seal.json"


class Damaged(Exception):
    """Stored data is not what was written."""


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser, a bijection."""
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
    """Digest of one array, uint32 [2]."""
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
    """Path to digest, 16 hexadecimal digits, for every array in a tree."""
    words = jax.device_get(_digests(jax.tree.leaves(state)))
    texts = [f"{int(a):08x}{int(b):08x}" for a, b in np.asarray(words, np.uint32).reshape(-1, 2)]
    return dict(zip(leaf_paths(state), texts, strict=True))


def compare_digests(actual: dict[str, str], expected: dict[str, str]) -> None:
    """Raises Damaged, with the first path, unless every digest in `actual` equals that in `expected`."""
    wrong = [path for path, digest in actual.items() if expected.get(path) != digest]
    if wrong:
        raise Damaged(
            f"{len(wrong)} of {len(actual)} arrays differ from what was saved: {wrong[0]}"
        )


def add_digest(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the digest of JSON values to them, under the name "digest"."""
    return {**values, "digest": _text_digest(values)}


def verify_digest(values: Any) -> dict[str, Any]:
    """The values without their digest; raises Damaged if there is no digest, or if it does not match."""
    if not isinstance(values, dict) or "digest" not in values:
        raise Damaged("a JSON file has no digest")
    rest = {name: value for name, value in values.items() if name != "digest"}
    if values["digest"] != _text_digest(rest):
        raise Damaged("a JSON file does not match its digest")
    return rest


def _text_digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def seal(folder: pathlib.Path) -> None:
    """Writes a file that lists size and digest of every other file in the folder."""
    part = folder / f"{SEAL}.part"
    part.write_text(json.dumps(add_digest({"files": _files(folder)}), indent=1) + "\n")
    part.replace(folder / SEAL)


def is_sealed(folder: pathlib.Path) -> bool:
    return (folder / SEAL).is_file()


def check_seal(folder: pathlib.Path) -> None:
    """Raises Damaged, with the name of a file, unless the folder holds every file that the seal lists.

    Additional files, such as those of a file manager, are allowed, since they are never read. Paths in the seal are
    compared with those in the folder, but never opened.
    """
    try:
        text = (folder / SEAL).read_text()
        expected = verify_digest(json.loads(text)).get("files")
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{SEAL} cannot be read ({type(error).__name__})") from None
    if not isinstance(expected, dict) or text != json.dumps(json.loads(text), indent=1) + "\n":
        raise Damaged(f"{SEAL} has another form than it was written with")
    actual = _files(folder)
    for name in expected:
        if name not in actual:
            raise Damaged(f"{name} is missing")
        if expected[name] != actual[name]:
            raise Damaged(f"{name} does not match its digest in {SEAL}")


def _files(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Relative path to [bytes, digest], for every file except the seal."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path not in (folder / SEAL, folder / f"{SEAL}.part")
    )

    def digest(path: pathlib.Path) -> list[Any]:
        with path.open("rb") as file:
            hashed = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return [path.stat().st_size, hashed.hexdigest()]

    # hashlib releases Python's global lock, so threads run in parallel.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        facts = pool.map(digest, paths)
        return {path.relative_to(folder).as_posix(): fact for path, fact in zip(paths, facts)}
