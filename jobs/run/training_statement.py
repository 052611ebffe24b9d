"""States what a checkpoint was trained from, for its signer."""

import hashlib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.storage.uris import Storage, open_storage
from jobs.run.end import End, end_of
from jobs.run.find_run import data_identity, find_tokens
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.ledger_chain import chain_of
from jobs.run.signed_lines import newest_stated_line, shown_ledger
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import SOURCES, TOKENIZER, TokenStoreError
from model.files.checkpoint_folder import Metadata, fingerprint, read_metadata
from model.signing.signature import TRAINING_TYPE
from raymill.errors import CheckpointError


def training_of(checkpoint: str, folder: Path, *, ledger: Ledger | None = None) -> dict[str, Any]:
    """Returns the statement of a checkpoint's training, by the fields of SLSA's provenance
    (slsa.dev/spec/v1.0/provenance). Settings, data and the ledger's head are its run's, where the
    checkpoint lies in one.

    Where `ledger` has the lines that count, as not all may, its head is left out: that is to be
    compared with what was signed, and not to be signed."""
    metadata = read_metadata(folder)
    run = _run_of(checkpoint)
    config = run.find_bytes(CONFIG_FILE) if run else None
    return {
        "buildDefinition": {
            "buildType": TRAINING_TYPE,
            "externalParameters": {CONFIG_FILE: config.decode()} if config else {},
            "resolvedDependencies": _materials(metadata, folder, run, ledger),
        },
        "runDetails": {
            "builder": {"id": "raymill", "version": {"code": metadata.code_version}},
            "metadata": {
                "invocationId": metadata.run_id,
                "signedOn": datetime.now(UTC).isoformat(timespec="seconds"),
                "step": str(metadata.step),
                "tokensSeen": str(metadata.tokens_seen),
                "parameterHash": metadata.parameter_hash,
            },
            "byproducts": [_head_of(run)] if run and ledger is None else [],
        },
    }


def _run_of(checkpoint: str) -> Storage | None:
    """Returns the run in which a checkpoint lies; None where it lies elsewhere."""
    above, _, folder = checkpoint.rpartition("/")[0].rpartition("/")
    run = open_storage(above)
    return run if folder == "checkpoints" and run.exists(LEDGER) else None


def _materials(
    metadata: Metadata, folder: Path, run: Storage | None, ledger: Ledger | None
) -> list[dict[str, Any]]:
    tokenizer = fingerprint(folder / "tokenizer.json")["sha256"]
    materials = [_material("tokenizer.json", tokenizer)]
    if metadata.data_manifest_hash:
        materials.append(_material("the token store's manifest.json", metadata.data_manifest_hash))
    if metadata.base_hash:
        materials.append(_material("the base's parameters", metadata.base_hash))
    if run:
        materials += _materials_of(run, ledger or shown_ledger(run))
    return materials


def _materials_of(run: Storage, ledger: Ledger) -> list[dict[str, Any]]:
    materials = [
        _material("the parameters that it began from", line["parameter_hash"])
        for line in ledger.events("checkpoint")
        if line["step"] == 0
    ]
    with suppress(TokenStoreError):  # it may be gone by now
        store = find_tokens(run, data_identity(ledger))
        for file in (DOCUMENTS, SOURCES, TOKENIZER):
            content = store.find_bytes(file)
            if content is not None:
                sha256 = hashlib.sha256(content).hexdigest()
                materials.append(_material(f"the token store's {file}", sha256))
    for start in ledger.events("start")[-1:]:
        for name, sha256 in start.get("validation_manifests", {}).items():
            materials.append(_material(f"the manifest.json of validation set {name}", sha256))
    return materials


def _material(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _head_of(run: Storage) -> dict[str, Any]:
    """Returns the ledger's last line: its chain is what makes it stand for all lines."""
    chain = chain_of((run.find_bytes(LEDGER) or b"").rpartition(b"\n")[0].splitlines())
    if chain.problems:
        raise CheckpointError(
            f"{run.uri}/{LEDGER} is not as it was written: {chain.problems[0]}. `raymill verify` says more"
        )
    stated = newest_stated_line(run)
    if stated and stated.number < chain.num_lines and _has_end(run, stated.number):
        raise CheckpointError(
            f"{run.uri}/{LEDGER} has lines behind line {stated.number}, though the run had finished when that was "
            "signed: `raymill verify --signed-by` says more; take them out before you sign again"
        )
    head = str(chain.head)
    return _material(f"{LEDGER}, line {chain.num_lines}", head)


def _has_end(run: Storage, number: int) -> bool:
    """Reports whether the run had finished by a line of its ledger."""
    return end_of(Ledger.read(run).lines[:number]) is End.FINISHED
