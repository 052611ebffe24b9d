"""Stage: the corpus's tokenizer, loaded where one is named, else trained on the front of the corpus and kept."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.config import DataConfig, RunConfig
from cluster.progress import say
from cluster.stage import stage_main
from cluster.storage import NotFoundError, join_uri, open_storage, split_uri
from jobs.documents import Listing, empty_corpus, list_corpus, read_documents
from jobs.token_store import canonical_json
from model.errors import UserError
from model.tokenizer import Tokenizer, train_bpe

TOKENIZER_FILE = "tokenizer.json"

_SHAPING = {
    "text_field",
    "vocab_size",
    "normalize",
    "tokenizer_sample_bytes",
    "invalid_utf8",
    "max_document_bytes",
    "dedup",
}


def ensure_tokenizer(config: RunConfig, listing: Listing | None = None) -> tuple[Tokenizer, str]:
    """The tokenizer and the URI of its tokenizer.json; trained only if neither named nor stored. Needs Ray.

    It is stored under a key of the settings and files that shape it, so a changed corpus gets a new one.
    """
    if config.data.tokenizer is not None:
        return _load(config.data.tokenizer)
    listing = listing or list_corpus(config.data.source)
    shaping = [config.data.model_dump(mode="json", include=_SHAPING), listing.identity()]
    key = hashlib.sha256(canonical_json(shaping)).hexdigest()[:12]
    folder = open_storage(config.storage.uri).child(f"tokenizers/{key}")
    uri = join_uri(folder.uri, TOKENIZER_FILE)
    if not folder.exists(TOKENIZER_FILE):
        say(f"training a tokenizer of up to {config.data.vocab_size} ids on {len(listing.files)} files")
        task = ray.remote(num_cpus=1)(_train)
        try:
            trained = ray.get(task.remote([entry.key for entry in listing.files], config.data))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        folder.write_bytes(TOKENIZER_FILE, trained)
    tokenizer = Tokenizer.from_json(folder.read_bytes(TOKENIZER_FILE))
    if tokenizer.vocab_size < config.data.vocab_size:
        say(f"the corpus is small: its tokenizer has {tokenizer.vocab_size} ids, not {config.data.vocab_size}")
    return tokenizer, uri


def _load(uri: str) -> tuple[Tokenizer, str]:
    file_uri = uri if uri.endswith(".json") else join_uri(uri.rstrip("/"), TOKENIZER_FILE)
    storage, name = split_uri(file_uri)
    try:
        return Tokenizer.from_json(storage.read_bytes(name)), join_uri(storage.uri, name)
    except NotFoundError as error:
        raise NotFoundError(f"data.tokenizer={uri!r}: {error}") from error


def _train(uris: list[str], data: DataConfig) -> bytes:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the task owns one CPU
    sample = sample_texts(uris, data)
    return train_bpe(sample, vocab_size=data.vocab_size, normalize=data.normalize).to_json()


def sample_texts(uris: list[str], data: DataConfig) -> Iterator[str]:
    """The first `data.tokenizer_sample_bytes` of the kept documents in canonical order; the last may be cut."""
    remaining = data.tokenizer_sample_bytes
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    for uri in uris:
        for document in read_documents(uri, data):
            digest = hashlib.sha256(document.text).digest()
            if document.drop:
                dropped[document.drop] += 1
            elif not (data.dedup and digest in seen):
                seen.add(digest)
                yield document.text[:remaining].decode(errors="ignore")
                remaining -= len(document.text)
                if remaining <= 0:
                    return
    if not seen:
        raise empty_corpus(len(uris), dropped)


def run(config: RunConfig) -> dict[str, Any]:
    tokenizer, uri = ensure_tokenizer(config)
    return {"tokenizer": uri, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}


if __name__ == "__main__":
    sys.exit(stage_main(run))
