"""Certifies that a run was trained without some documents, once it is done, and signs that."""

import tempfile
from pathlib import Path

from cluster.storage.uris import Storage
from jobs.proof.recorded.certificate import CERTIFICATE, FORGETTING, Certificate, ForgettingRecords
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.ledger_chain import chain_of
from model.signing.signature import MODEL, Signer, sign_files
from raymill.errors import UserError


def certify(run: Storage, key: Signer | None) -> Certificate:
    """Writes the certificate of a finished run that forgets, beside its checkpoints, and with a key
    its signature. One that is there already stays, unless it is to be signed. Raises
    `UserError`."""
    content = run.find_bytes(LEDGER) or b""
    lines = content.rpartition(b"\n")[0].splitlines()
    ledger = Ledger.parse(content, f"{run.uri}/{LEDGER}")
    if not ledger.is_finished:
        raise UserError(f"{run.uri} is not finished: only then can it be certified")
    if problems := chain_of(lines).problems:
        raise UserError(f"{run.uri}/{LEDGER} is not as it was written: {problems[0]}")
    place = run.child(FORGETTING)
    known = place.find_bytes(CERTIFICATE)
    if known is not None and key is None:
        return Certificate.from_json(known)
    certificate = ForgettingRecords.read(run, lines, ledger).certificate()
    with tempfile.TemporaryDirectory(prefix="raymill-certificate-") as scratch:
        (Path(scratch) / CERTIFICATE).write_bytes(certificate.to_json())
        files = [CERTIFICATE, *(sign_files(Path(scratch), key) if key else [])]
        place.delete(MODEL)  # of another certificate
        for name in files:
            place.upload_file(Path(scratch) / name, name)
    return certificate
