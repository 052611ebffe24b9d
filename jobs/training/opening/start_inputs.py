"""Says, for the ledger, what an attempt begins with: by the hashes of settings and data, a line binds
them, and `raymill verify` compares them with what is stored."""

import hashlib
from typing import Any, assert_never

from cluster.storage.uris import open_storage
from jobs.run.history import CONFIG_FILE
from jobs.run.run_plan import RunPlan, open_validation_sets
from jobs.tokens.division import HeldOut
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import SOURCES, Manifest


def inputs(plan: RunPlan, manifest: Manifest) -> dict[str, Any]:
    """Returns fields of the `start` line: the run's settings, its token store, whose manifest this
    is, and what validates it."""
    tokens = open_storage(plan.tokens_uri)
    return {
        "data_identity": manifest.identity,
        "data_manifest_hash": manifest.hash,
        "documents_hash": _sha256(tokens.find_bytes(DOCUMENTS)),
        "sources_hash": _sha256(tokens.find_bytes(SOURCES)),
        "config_hash": _sha256(plan.run.find_bytes(CONFIG_FILE)),
        **({"forgotten": plan.holes.hash} if plan.holes else {}),
        **_division(plan),
    }


def _division(plan: RunPlan) -> dict[str, Any]:
    """Returns what the ledger says of what validates the run."""
    division = plan.division
    told: dict[str, Any] = {}
    match division.held_out:
        case HeldOut.DOCUMENTS:
            pass
        case HeldOut.END:
            told = {"held_out": division.held_out.value, "end_tokens": division.end_tokens}
        case HeldOut.NOTHING:
            told = {"held_out": division.held_out.value}
        case _:
            assert_never(division.held_out)
    sets = {name: rows.manifest for name, rows in open_validation_sets(plan).items()}
    if sets:
        told["validated_on"] = {name: manifest.identity for name, manifest in sets.items()}
        told["validation_manifests"] = {name: manifest.hash for name, manifest in sets.items()}
    return told


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()
