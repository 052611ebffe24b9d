"""Keeps the record of an audit in its folder, from which an interrupted one goes on.

Whoever can write to that folder could put finished intervals into it. So the record carries a code
(HMAC-SHA-256) by a key in the auditor's home: a record without it, or with another one, is somebody
else's.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cluster.output.progress import say
from jobs.proof.audits.page import page_of
from jobs.proof.audits.record import AuditRecord
from raymill.errors import UserError

RECORD, PAGE = "audit.json", "index.html"
_CODE = "code"
_KEY_BYTES = 32


def begun_record(folder: Path, wanted: dict[str, str | None]) -> AuditRecord | None:
    """Returns the record of an audit that this user began in a folder, or None.

    Raises `UserError` where the folder has the audit of another run, head or nonce than is wanted
    (None is any), or one that this user did not write.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        values = {**json.loads(path.read_bytes())}
    except (ValueError, TypeError):
        raise UserError(f"{path} is no audit's record: name another folder with --to") from None
    code = str(values.pop(_CODE, None))
    if not hmac.compare_digest(code, _code_of(values)):
        raise UserError(
            f"{folder} has an audit that this user did not write on this machine: what it says counts for nothing "
            "here; name another folder with --to"
        )
    for name, value in wanted.items():
        if value is not None and values[name] != value:
            raise UserError(
                f"{folder} has an audit whose {name} is {values[name]}, not {value}: name another folder with --to"
            )
    return AuditRecord.of_json(values)


def write_record(folder: Path, record: AuditRecord) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page_of(record), encoding="utf-8")
    # The record last, and at once: an audit that is interrupted here goes on from it
    half = folder / f".{RECORD}"
    values = record.json()
    half.write_text(json.dumps(values | {_CODE: _code_of(values)}, indent=1), encoding="utf-8")
    half.replace(folder / RECORD)


def _code_of(values: Mapping[str, object]) -> str:
    content = json.dumps(values, sort_keys=True).encode()
    return hmac.new(_key(), content, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """Returns this user's key, and makes it where there is none yet."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "raymill" / "audit-key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
    except FileExistsError:
        pass
    except OSError as error:
        say(
            f"{path} cannot be written ({error.strerror}): this audit cannot go on once interrupted"
        )
        return secrets.token_bytes(_KEY_BYTES)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise UserError(f"{path} has {len(key)} bytes, expected {_KEY_BYTES}: remove it")
    return key
