"""Finds what is untrue in what a run says to have forgotten, and in its certificate.

What a certificate says follows from the run's own records, with which it is compared: the list of
documents, the token store and the chained ledger. That the steps were taken again without the
documents is what an audit computes.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage.uris import Storage
from jobs.proof.recorded.certificate import (
    CERTIFICATE,
    FORGETTING,
    Certificate,
    ForgettingRecords,
)
from jobs.run.end import FORGOTTEN
from jobs.run.find_run import data_identity, find_tokens, holes_of
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.tokens.document_map import DocumentMap, NoDocumentMapError
from jobs.tokens.holes import Hole, Holes
from jobs.tokens.shard_reader import Piece, read_piece
from jobs.tokens.token_store import Manifest, TokenStoreError, read_manifest
from model.signing.signature import SignatureError, Trusted, check

_SHOWN = 12  # of a hash
_MAY_DIFFER = {"ledger", "documents", "made"}
"""What is compared otherwise, and the time."""


def forgetting_problems(
    run: Storage, lines: Sequence[bytes], ledger: Ledger, *, signed_by: Trusted | None
) -> list[str]:
    """Returns the untrue statements; none for a run that forgets nothing. `ledger` has the events
    of the `lines` that count."""
    if not run.exists(CONFIG_FILE):
        return []
    config = recorded_config(run)
    content = run.child(FORGETTING).find_bytes(CERTIFICATE)
    if config.data.forgotten is None:
        return [] if content is None else [f"{CERTIFICATE} is there, and the run forgets nothing"]
    try:
        holes = holes_of(run, config)
        problems = _store_problems(run, ledger, holes)
    except TokenStoreError as error:
        return [str(error)]
    told = ledger.events(FORGOTTEN)
    own = ledger.lines[ledger.lines.index(told[-1]) + 1 :] if told else ledger.lines
    problems += _start_problems(own, config.data.forgotten)
    if content is None:
        if signed_by and told and ledger.is_finished:
            problems.append(f"{FORGETTING}/{CERTIFICATE} is missing: `raymill forget` makes it")
        return problems
    if signed_by:
        problems += _signature_problems(run, signed_by)
    if problems:
        return problems
    return [f"{CERTIFICATE}: {problem}" for problem in _untrue(content, run, lines, ledger)]


def _untrue(content: bytes, run: Storage, lines: Sequence[bytes], ledger: Ledger) -> list[str]:
    """Returns what the records do not bear out."""
    if not ledger.events(FORGOTTEN):
        return [f"{LEDGER} does not say from which run this one goes on"]
    try:
        certificate = Certificate.from_json(content)
    except ValueError as error:
        return [f"it is no certificate ({error})"]
    records = ForgettingRecords.read(run, lines, ledger)
    now = records.certificate()
    problems = _documents_that_stayed(certificate, now) + _steps_not_taken(records, now)
    if not certificate.ledger.stands_in(lines):
        problems.append(f"{LEDGER} has another line {certificate.ledger.number} than it names")
    elif certificate.ledger.number < len(lines):
        problems.append(f"{LEDGER} has lines behind line {certificate.ledger.number}, its last one")
    for name, value in vars(certificate).items():
        found = getattr(now, name)
        if name not in _MAY_DIFFER and value != found:
            problems.append(f"it says {name} {_short(value)}, the run's records {_short(found)}")
    return problems


def _documents_that_stayed(certificate: Certificate, now: Certificate) -> list[str]:
    named, left_out = {*certificate.documents}, {*now.documents}
    problems = [
        f"the document {document.sha256[:_SHOWN]}… stayed: data.forgotten does not leave it out"
        for document in sorted(named - left_out)
    ]
    if unnamed := left_out - named:
        problems.append(f"it does not name {len(unnamed)} of the documents that are left out")
    return problems


def _steps_not_taken(records: ForgettingRecords, now: Certificate) -> list[str]:
    """Returns steps that read a document and were not taken again."""
    begun = records.from_step
    if begun >= now.first_step:
        return [
            f"step {now.first_step} reads one of the documents and was not taken again: the run goes on from step "
            f"{begun}"
        ]
    again = {line["step"] for line in records.own if line.get("event") in (None, "skip")}
    for first, last in records.ledger.rollbacks:
        again |= {*range(first, last + 1)}
    missing = [step for step in range(begun + 1, now.last_step + 1) if step not in again]
    if missing:
        return [f"step {missing[0]} was not taken again: no line of the new run tells it"]
    return []


def _signature_problems(run: Storage, signed_by: Trusted) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="raymill-certificate-") as scratch:
        run.download_folder(FORGETTING, Path(scratch))
        try:
            check(Path(scratch), signed_by)
        except SignatureError as error:
            return [str(error).replace(scratch, f"{run.uri}/{FORGETTING}")]
    return []


def _start_problems(own: Sequence[Line], wanted: str) -> list[str]:
    """Returns attempts that the ledger tells to have read what the settings leave out."""
    return [
        f"attempt {line['attempt']} of the ledger was not trained without the documents of data.forgotten"
        for line in own
        if line.get("event") == "start" and line.get("forgotten") != wanted
    ]


def _store_problems(run: Storage, ledger: Ledger, holes: Holes) -> list[str]:
    """Returns the holes that are not the documents which the list names."""
    if data_identity(ledger) not in (None, holes.data_identity):
        return ["data.forgotten lists documents of another token store than the run was trained on"]
    store = find_tokens(run, holes.data_identity)
    manifest = read_manifest(store)
    shards = {shard.file: shard for shard in manifest.shards}
    mapped = _map(store, manifest)
    problems: list[str] = []
    for hole in holes.holes:
        shard = shards.get(hole.shard)
        if shard is None or hole.end > shard.tokens:
            problems.append(f"data.forgotten names tokens of {hole.shard} that are not there")
            continue
        content = read_piece(store, Piece(shard, hole.start, hole.end), manifest.dtype)
        if hashlib.sha256(content).hexdigest() != hole.sha256:
            problems.append(
                f"the document {hole.sha256[:_SHOWN]}… stayed: it does not lie at {hole.shard}:{hole.start}, where "
                "data.forgotten leaves one out"
            )
        elif not _is_whole(hole, content, manifest, mapped):
            problems.append(
                f"data.forgotten leaves out a part of a document at {hole.shard}:{hole.start}: the rest of it stayed"
            )
    return problems


def _map(store: Storage, manifest: Manifest) -> DocumentMap | None:
    try:
        return DocumentMap(store, manifest)
    except NoDocumentMapError:
        return None


def _is_whole(hole: Hole, content: bytes, manifest: Manifest, mapped: DocumentMap | None) -> bool:
    """Reports whether a hole is a whole document; by its last token, where nothing says where
    documents begin."""
    documents = mapped.documents_of(hole.shard) if mapped else None
    if documents is None:
        last = int(np.frombuffer(content, manifest.dtype)[-1])
        return max(last, ~last) == manifest.eot_id
    document = documents.document(documents.number_at(hole.start))
    return (document.start, document.end) == (hole.start, hole.end)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:_SHOWN]}…" if len(text) > 4 * _SHOWN else text
