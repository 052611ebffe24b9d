"""The token store that a run was trained on, found again by its identity."""

from cluster.storage import Storage, open_storage
from jobs.ledger import Ledger
from jobs.token_store import MANIFEST, Manifest, TokenStoreError


def data_identity(ledger: Ledger) -> str | None:
    """Of the token store, as the run's last attempt recorded it."""
    starts = ledger.events("start")
    return starts[-1].get("data_identity") if starts else None


def find_tokens(run: Storage, identity: str | None) -> Storage:
    """The finished token store with this identity, in the storage that the run is in. Raises `TokenStoreError`."""
    root = open_storage(run.uri.rpartition("/runs/")[0])
    found = []
    for entry in root.list("tokens/"):
        folder, _, name = entry.key.rpartition("/")
        if name != MANIFEST:
            continue
        found.append(root.child(folder))
        try:
            if Manifest.from_json(root.read_bytes(entry.key)).identity == identity:
                return found[-1]
        except (ValueError, KeyError, TypeError, TokenStoreError):
            continue  # the manifest of a store that is damaged or in another format is not the one that is looked for
    raise TokenStoreError(
        f"none of the {len(found)} token stores under {root.uri}/tokens is the one that {run.uri} was trained on, of "
        f"identity {(identity or 'unknown')[:12]}…; put it back there, or tokenize again with the run's settings"
    )
