"""Compares a run's settings and data with what its ledger recorded of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.storage.uris import Storage
from jobs.run.base import recorded_base
from jobs.run.find_run import data_identity, find_tokens, last_start
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import Ledger
from jobs.tokens import inspect_store
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import (
    MANIFEST,
    SOURCES,
    TOKENIZER,
    TokenStoreError,
    read_manifest,
)
from model.files.checkpoint import stored_parameter_hash
from model.files.checkpoint_folder import Metadata, verify_checkpoint
from raymill.errors import CheckpointError


@dataclass
class DataProof:
    """The findings about a run's settings and token stores."""

    num_shards: int = 0
    hashes: dict[str, str | None] = field(default_factory=dict)  # of the store's files, by name
    problems: list[str] = field(default_factory=list)


def data_problems(run: Storage, ledger: Ledger, checkpoints: Sequence[Metadata]) -> DataProof:
    """Recomputes the hashes of the run's token stores; compares them, and the run's settings, with
    its newest start and its sound checkpoints."""
    identity = data_identity(ledger)
    start = last_start(ledger, identity)
    proof = DataProof()
    config_hash = _sha256(run.find_bytes(CONFIG_FILE))
    if start.get("config_hash", config_hash) != config_hash:
        proof.problems.append(f"{CONFIG_FILE} is not the one that the run began with")
    try:
        store = find_tokens(run, identity)
        _check_store(store, proof)
    except TokenStoreError as error:
        proof.problems.append(str(error))
        return proof
    found = str(proof.hashes[MANIFEST])
    if start.get("data_manifest_hash", found) != found:
        wanted = start["data_manifest_hash"]
        proof.problems.append(
            f"{store.uri}: its manifest's hash is {found[:12]}…, the run began with {wanted[:12]}…"
        )
    proof.problems += [
        f"{store.uri}: its manifest's hash is {found[:12]}…, the checkpoint of step {checkpoint.step} was trained "
        f"with {wanted[:12]}…"
        for checkpoint in checkpoints
        if (wanted := checkpoint.data_manifest_hash) and wanted != found
    ]
    for file, field_of_start in ((DOCUMENTS, "documents_hash"), (SOURCES, "sources_hash")):
        wanted = start.get(field_of_start)
        if wanted and proof.hashes[file] != wanted:
            is_gone = proof.hashes[file] is None
            proof.problems.append(
                f"{store.uri}/{file} {'is gone' if is_gone else 'is another one'}, and the run began with it"
            )
    proof.problems += _set_problems(run, start)
    return proof


def _check_store(store: Storage, proof: DataProof) -> None:
    """Raises `TokenStoreError` for shards or tables that are not as recorded."""
    result = inspect_store.verify(store)
    proof.num_shards = int(result["shards"])
    manifest = read_manifest(store, opens_lists=False)
    tokenizer = _sha256(store.find_bytes(TOKENIZER))
    proof.hashes |= {
        MANIFEST: result["manifest_hash"],
        DOCUMENTS: _sha256(store.find_bytes(DOCUMENTS)),
        SOURCES: _sha256(store.find_bytes(SOURCES)),
        TOKENIZER: tokenizer,
    }
    if tokenizer != manifest.tokenizer_hash:
        proof.problems.append(
            f"{store.uri}/{TOKENIZER} is not its tokens' tokenizer: its SHA-256 is {(tokenizer or 'none')[:12]}…, "
            f"the manifest says {manifest.tokenizer_hash[:12]}…"
        )


def _set_problems(run: Storage, start: dict[str, dict[str, str]]) -> list[str]:
    """Returns what is wrong with the token stores of the sets that the run was validated on."""
    problems = []
    for name, identity in start.get("validated_on", {}).items():
        try:
            found = inspect_store.verify(find_tokens(run, identity))["manifest_hash"]
        except TokenStoreError as error:
            problems.append(f"validation set {name}: {error}")
            continue
        wanted = start.get("validation_manifests", {}).get(name, found)
        if found != wanted:
            problems.append(
                f"validation set {name}: its manifest's hash is {found[:12]}…, the run began with {wanted[:12]}…"
            )
    return problems


def base_problems(run: Storage, checkpoints: Sequence[Metadata]) -> list[str]:
    """Returns what is wrong with the frozen weights on which a run's adapter stands."""
    base = recorded_base(run)
    if base is None:
        return []
    problems = [
        f"base.json says {base.parameter_hash[:12]}…, the adapter of step {checkpoint.step} stands on {told[:12]}…"
        for checkpoint in checkpoints
        if (told := str(checkpoint.base_hash)) != base.parameter_hash
    ]
    try:
        folder = base.folder(run.uri.rpartition("/runs/")[0])
        damaged = verify_checkpoint(folder, to_train=False)
        found = stored_parameter_hash(folder)
    except CheckpointError as error:
        return [*problems, f"the base: {error}"]
    if found != base.parameter_hash:
        damaged.append(
            f"its parameters' hash is {found[:12]}…, base.json says {base.parameter_hash[:12]}…"
        )
    return problems + [f"the base {base.uri}: {problem}" for problem in damaged]


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()
