"""Shards written in parallel, each by one task: read its documents, encode them, store them, vouch for them.

A shard's sidecar (`shard-00000.json`) says what it was made of and what its bytes are. A shard whose sidecar agrees
with the plan and with the bytes is not written again; that is how a killed job goes on.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby

import numpy as np

from cluster.config import DataConfig
from cluster.progress import progress
from cluster.storage import NotFoundError, Storage
from jobs.data_tasks import Task, run_tasks
from jobs.documents import CorpusError, read_documents
from jobs.packing import ShardPlan
from jobs.token_store import Shard, canonical_json, token_dtype
from model.tokenizer import Tokenizer

_PIECE_CHARS = 1 << 18
_BATCH_CHARS = 1 << 20  # text encoded at once
_BORDER = re.compile(r"(?<=[^\W\d_])(?=\s)")


def write_shards(
    store: Storage, plans: Sequence[ShardPlan], uris: Sequence[str], *, tokenizer: Tokenizer, data: DataConfig
) -> list[Shard]:
    """Writes those that are missing; returns all of them, in the order of the plans."""
    tasks = [_task(plan, uris) for plan in plans]
    work = partial(write_shard, store=store, tokenizer_json=tokenizer.to_json(), data=data)
    shards: dict[int, Shard] = {}
    with progress("tokenizing", total_bytes=sum(task["bytes"] for task in tasks)) as advance:
        for number, _, result in run_tasks(tasks, work):
            shards[number] = Shard(**json.loads(result))
            advance(tasks[number]["bytes"])
    return [shards[number] for number in range(len(tasks))]


def _task(plan: ShardPlan, uris: Sequence[str]) -> Task:
    pairs = zip(plan.documents["file"].tolist(), plan.documents["offset"].tolist(), strict=True)
    return {
        "file": plan.file,
        "split": plan.split,
        "bytes": int(plan.documents["size"].sum()),
        "text_hash": hashlib.sha256(plan.documents["hash"].tobytes()).hexdigest(),
        "pieces": [(uris[file], [offset for _, offset in group]) for file, group in groupby(pairs, lambda p: p[0])],
    }


def write_shard(task: Task, *, store: Storage, tokenizer_json: bytes, data: DataConfig) -> Iterator[bytes]:
    """Yields the shard's `Shard` as JSON once its bytes and then its sidecar are stored."""
    tokenizer = _tokenizer(tokenizer_json)
    made_of = {"text_hash": task["text_hash"], "tokenizer_hash": tokenizer.hash}
    shard = _finished(store, task["file"], made_of)
    if shard is None:
        shard, content = _encoded(task, tokenizer, data)
        store.write_bytes(shard.file, content)
        store.write_bytes(_sidecar(shard.file), canonical_json(made_of | {"shard": dataclasses.asdict(shard)}))
    yield json.dumps(dataclasses.asdict(shard)).encode()


@cache
def _tokenizer(content: bytes) -> Tokenizer:
    return Tokenizer.from_json(content)


def _sidecar(file: str) -> str:
    return f"{file.removesuffix('.bin')}.json"


def _finished(store: Storage, file: str, made_of: dict[str, str]) -> Shard | None:
    try:
        sidecar = json.loads(store.read_bytes(_sidecar(file)))
        content_hash = hashlib.sha256(store.read_bytes(file)).hexdigest()
    except NotFoundError:
        return None
    same = {name: sidecar[name] for name in made_of} == made_of and sidecar["shard"]["sha256"] == content_hash
    return Shard(**sidecar["shard"]) if same else None


def _encoded(task: Task, tokenizer: Tokenizer, data: DataConfig) -> tuple[Shard, bytes]:
    dtype = token_dtype(tokenizer.vocab_size)
    content = bytearray()
    text_hashes = hashlib.sha256()
    documents = 0
    for batch in _batches(_texts(task, data, text_hashes)):
        for (_, is_last), ids in zip(batch, tokenizer.encode_batch([piece for piece, _ in batch]), strict=True):
            content += np.array(ids + [tokenizer.eot_id] * is_last, dtype=dtype).tobytes()
            documents += is_last
    if text_hashes.hexdigest() != task["text_hash"]:
        names = ", ".join(uri for uri, _ in task["pieces"])
        raise CorpusError(f"the corpus changed while it was tokenized (one of {names}); run again")
    tokens = len(content) // dtype.itemsize
    sha256 = hashlib.sha256(content).hexdigest()
    return Shard(task["file"], task["split"], tokens, documents, task["bytes"], sha256), bytes(content)


def _texts(task: Task, data: DataConfig, text_hashes: "hashlib._Hash") -> Iterator[str]:
    for uri, offsets in task["pieces"]:
        for document in read_documents(uri, data, offsets=offsets):
            text_hashes.update(hashlib.sha256(document.text).digest())
            yield document.text.decode()


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, and whether each ends its document, in batches that bound the encoder's memory."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        pieces = list(cut_text(text))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def cut_text(text: str, *, piece_chars: int = _PIECE_CHARS) -> Iterator[str]:
    """A long text in pieces: the encoder takes about 130 times a text's size in memory.

    A piece ends where a letter is followed by a blank. The patterns of GPT-2's tokenizer and of its followers never
    join these two, so the pieces' ids, end to end, are the text's. Only a text without such a place is cut anywhere.
    """
    start = 0
    while len(text) - start > 2 * piece_chars:
        border = _BORDER.search(text, start + piece_chars, start + 2 * piece_chars)
        end = border.start() if border else start + 2 * piece_chars
        yield text[start:end]
        start = end
    yield text[start:]
