"""The tokenizer of a run, kept in its folder, so that nobody has to learn or find it again.

    tokenizer/tokenizer.json           the vocabulary and its rules, for any program that reads this format
    tokenizer/tokenizer_config.json    the end-of-text token, likewise; bytes have neither of the two
    tokenizer/facts.json               name and sizes, and digests of tokenizer.json and of the data of the run

It also says what changed if the data of a run are not those that it began with: the text, or the tokenizer.
"""

import hashlib
import json
import pathlib
import shlex
from typing import Any

from train import disk
from train.data import tokens
from train.data.batches import TokenBatches
from train.data.token_store import tokenizer_facts
from train.errors import UserError
from train.run import integrity
from train.run.folder import write

FOLDER, FACTS, VOCABULARY, CONFIG = (
    *("tokenizer", "facts.json", "tokenizer.json", "tokenizer_config.json"),
)


def keep(run: pathlib.Path, data: Any) -> None:
    """Writes the tokenizer of `data` into a run folder; does nothing for images.

    Raises:
        UserError: the folder has the tokenizer of other data.
    """
    if not isinstance(data, TokenBatches):
        return
    folder, facts = run / FOLDER, _facts(data)
    if (before := _read_facts(folder)) is not None:
        _refuse_changes(before, facts, run)
    folder.mkdir(exist_ok=True)
    write_vocabulary(folder, data.tokenizer)
    write(folder / FACTS, json.dumps(integrity.add_digest(facts), indent=1) + "\n")


def write_vocabulary(folder: pathlib.Path, tokenizer: tokens.Tokenizer) -> list[str]:
    """Writes tokenizer.json and tokenizer_config.json; returns their names, none for bytes."""
    if not isinstance(tokenizer, tokens.Subwords):
        return []
    write(folder / VOCABULARY, tokenizer.to_json())
    end = {"eos_token": tokenizer.library.id_to_token(tokenizer.separator)}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **end}
    write(folder / CONFIG, json.dumps(described, indent=2) + "\n")
    return [VOCABULARY, CONFIG]


def read(run: pathlib.Path, digest: str) -> tokens.Tokenizer:
    """The tokenizer of a run.

    Args:
        run: its folder.
        digest: of the data that its weights were trained on, from their checkpoint.

    Raises:
        UserError: the folder does not hold it, or not as it was written, or that of other weights.
    """
    folder = run / FOLDER
    facts = _read_facts(folder)
    again = (
        f"Going on with the run writes it again: python -m train --resume {shlex.quote(str(run))}"
    )
    if facts is None:
        raise UserError(f"{folder / FACTS} is missing or damaged. {again}.")
    if facts["data"] != digest:
        raise UserError(
            f"The tokenizer in {folder} is not that of the weights: it belongs to data with the digest"
            f" {facts['data'][:16]}, and the weights were trained on {digest[:16]}. {again}."
        )
    wanted = facts["tokenizer"]
    content = b""
    if wanted["sha256"] != hashlib.sha256(content).hexdigest():  # bytes have no file
        try:
            content = disk.read_file(folder / VOCABULARY, disk.JSON_FILE)
        except OSError as error:
            raise UserError(f"{folder / VOCABULARY} cannot be read: {error}. {again}.") from None
    if wanted["sha256"] != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{folder / VOCABULARY} was changed after the run wrote it, so it may be that of other weights. {again}."
        )
    try:
        return tokens.tokenizer_from_json(wanted["name"], content.decode(), wanted["separator"])
    except ValueError as error:
        raise UserError(f"{folder}: {error}.") from None


def _facts(data: TokenBatches) -> dict[str, Any]:
    facts = {"data": data.digest, "digests": data.digests}
    return {**facts, "tokenizer": tokenizer_facts(data.tokenizer)}


def _read_facts(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        return integrity.verify_digest(json.loads(disk.read_json_text(folder / FACTS)))
    except (OSError, ValueError, RecursionError, integrity.Damaged):
        return None


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], run: pathlib.Path) -> None:
    if before["data"] == now["data"]:
        return
    both = before["digests"].keys() & now["digests"].keys()
    changed = [name for name in both if before["digests"][name] != now["digests"][name]]
    if "text" in before["digests"] and "text" in now["digests"] and "text" not in changed:
        kept = run / FOLDER
        raise UserError(
            f"The tokenizer of {run} changed: of the same text it makes other tokens than those that the run was"
            f" trained on (other: {', '.join(sorted(changed))}). The run keeps its own in {kept}; to go on with that:"
            f" --resume {shlex.quote(str(run))} --data.tokenizer {shlex.quote(str(kept))}"
        )
    raise UserError(
        f"The text to train on changed since {run} began: the digest was {before['data'][:16]}, now it is"
        f" {now['data'][:16]}. Train on what it was, or start a new run."
    )
