"""Recomputes the hashes of a run's checkpoints, of its data and of its ledger's lines, and names
what is not as it was recorded."""

import tempfile
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.storage.uris import Storage
from jobs.proof.sign_checkpoint import signature_problems
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.find_run import data_identity, find_tokens
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.ledger_chain import chain_of
from jobs.tokens import inspect_store
from jobs.tokens.token_store import TokenStoreError
from model.files.checkpoint import stored_parameter_hash
from model.files.checkpoint_folder import read_metadata, verify_checkpoint
from model.signing.signature import Trusted


def verify(run: Storage, *, signed_by: Trusted | None = None) -> dict[str, Any]:
    """Returns `valid`, and `problems` by file. Reads every byte of checkpoints and shards. With a
    trusted signer the newest checkpoint must be signed, and earlier ones rightly if they are."""
    written = run.find_bytes(LEDGER) or b""
    ledger, checkpoints = Ledger.parse(written, f"{run.uri}/{LEDGER}"), RunCheckpoints(run)
    saved = {event["checkpoint"].rpartition("/")[2]: event for event in ledger.events("checkpoint")}
    lines = written.rpartition(b"\n")[0].splitlines()
    chain = chain_of(lines)
    names, metadata = checkpoints.names, []
    problems = [f"{LEDGER}, {problem}" for problem in chain.problems]
    newest = max(saved, default=None)
    if newest is not None and newest not in names:
        problems.append(f"{newest}: the ledger's newest checkpoint is missing or incomplete")
    for number, name in enumerate(names, start=1):
        say(f"checkpoint {number} of {len(names)}: {name}")
        with tempfile.TemporaryDirectory(prefix="raymill-verify-") as scratch:
            folder = checkpoints.fetch(name, Path(scratch))
            found = checkpoint_problems(folder, saved.get(name))
            if signed_by:
                is_newest = number == len(names)
                found += signature_problems(folder, lines, signed_by, must=is_newest)
            problems += [f"{name}: {problem}" for problem in found]
            if not found:
                metadata.append(read_metadata(folder))
    shards = 0
    try:
        store = find_tokens(run, data_identity(ledger))
        result = inspect_store.verify(store)
        shards, found_hash = int(result["shards"]), result["manifest_hash"]
        problems += [
            f"{store.uri}: its manifest's hash is {found_hash[:12]}…, the checkpoint of step {checkpoint.step} was "
            f"trained with {wanted[:12]}…"
            for checkpoint in metadata
            if (wanted := checkpoint.data_manifest_hash) and wanted != found_hash
        ]
    except TokenStoreError as error:
        problems.append(str(error))
    verdict = f"{counted(len(names), 'checkpoint')} and {counted(shards, 'shard')} are as recorded; {chain.summary}"
    return {
        "verdict": f"{counted(len(problems), 'problem')}: {'; '.join(problems)}"
        if problems
        else verdict,
        "valid": not problems,
        "problems": problems,
        "checkpoints": len(names),
        "shards": shards,
        "ledger_lines": chain.num_lines,
        "ledger_head": chain.head,
        "chained_from": chain.first,
    }


def checkpoint_problems(folder: Path, event: Line | None) -> list[str]:
    """Returns what is wrong with a checkpoint: its files compared with its manifest, and its
    parameters' hash with what it records and with the ledger's event."""
    if altered := verify_checkpoint(folder):
        return altered
    found = stored_parameter_hash(folder)
    said = {"raymill.json": str(read_metadata(folder).parameter_hash)}
    said |= {"the ledger": event["parameter_hash"]} if event else {}
    return [
        f"its parameters' hash is {found[:12]}…, {place} says {recorded[:12]}…"
        for place, recorded in said.items()
        if recorded != found
    ]
