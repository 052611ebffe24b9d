"""The files of an engine's state in a folder: each is written beside its place and renamed, and is
read again only if it has the SHA-256 that the facts about the state vouch for."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raymill.errors import UserError
from raymill.files.hashed_file import write_hashed
from raymill.files.stored_tensors import StoredTensors, stored_in

FACTS = "exact.json"
_FILES = "files"
_SAVE_AGAIN = "take another folder of ExactEngine.save"


def file_name(place: int, num_files: int) -> str:
    return f"exact-{place:05}-of-{num_files:05}.safetensors"


def write_beside(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file that has its name only once it is whole, in place of an earlier one. Returns
    its size and SHA-256."""
    begun = path.with_name(f".{path.name}.part")
    written = write_hashed(begun, pieces)
    begun.replace(path)
    return written


def write_facts(folder: Path, facts: Mapping[str, object], files: Mapping[str, object]) -> None:
    """Makes the files in a folder a state, with what its bits depend on."""
    content = json.dumps({**facts, _FILES: files}, indent=2) + "\n"
    write_beside(folder / FACTS, [content.encode()])


def state_in(folder: Path, facts: Mapping[str, object]) -> StoredTensors:
    """Returns the tensors of the state in a folder. Raises `UserError` if its bits depend on other
    facts, or if one of its files is not what was saved."""
    found = _read_facts(folder)
    for name, value in facts.items():
        if name not in found:
            raise UserError(
                f"{folder / FACTS} has no {name}: another version of raymill saved it, and this one cannot tell "
                "whether the bits would be the same"
            )
        if found[name] != value:
            raise UserError(
                f"{folder} was trained with {name} {found[name]}, and this engine has {value}: with another one the "
                "bits would be others"
            )
    files = found.get(_FILES)
    names = [file_name(place, len(files)) for place in range(len(files))] if files else []
    if not isinstance(files, dict) or sorted(files) != names:
        raise UserError(f"{folder / FACTS} does not list the files of its state: {_SAVE_AGAIN}")
    for name in names:
        _require_whole(folder, name, files[name], num_files=len(files))
    return stored_in(folder, names)


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {FACTS}: it is no folder of ExactEngine.save") from None
    except ValueError as error:  # of JSON or of its encoding
        raise UserError(f"{path} is damaged ({error}): {_SAVE_AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it is no object): {_SAVE_AGAIN}")
    return found


def _require_whole(folder: Path, name: str, saved: Any, *, num_files: int) -> None:
    path = folder / name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {name}, one of the {num_files} files of this state: save it on all workers"
        ) from None
    if saved != {"size": size, "sha256": digest}:
        raise UserError(
            f"{path} has {size} bytes with the SHA-256 {digest}, and {FACTS} says {saved}: it is damaged, or of "
            f"another save; {_SAVE_AGAIN}"
        )
