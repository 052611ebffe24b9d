"""What documents a corpus holds: place, size, hash and reason to drop of each, read in parallel, file by file."""

import hashlib
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import DataConfig
from cluster.progress import progress
from cluster.storage import Entry
from jobs.data_tasks import Task, run_tasks
from jobs.documents import Drop, read_documents

INDEX_DTYPE = np.dtype(
    [
        ("file", "<i4"),  # place in the listing
        ("offset", "<i8"),  # as in `Document.offset`
        ("size", "<i8"),  # bytes of text; 0 when dropped
        ("drop", "u1"),  # drop code
        ("replaced", "u1"),  # 1 when bytes that were not UTF-8 became U+FFFD
        ("hash", "u1", 32),  # SHA-256 of the text
    ]
)
"""A document in the index (N,), which is in canonical order: order of the sources, path, place in the file."""

_PACKED = struct.Struct("<iqqBB")  # one record before its hash, five times as fast as NumPy's own conversion

CorpusIndex = npt.NDArray[Any]

DROP_CODES = [None, *Drop]
"""A drop code is a place in this list; 0 is kept."""

_GROUP_BYTES = 16 << 20  # small files are read together: a task costs about 10 ms
_GROUP_FILES = 256
_PART_DOCUMENTS = 1 << 15  # a file's index travels in parts, so that no worker holds a large one


def index_corpus(files: list[Entry], data: DataConfig) -> CorpusIndex:
    """The same index for any number of workers."""
    tasks = list(_file_groups(files))
    parts: dict[tuple[int, int], CorpusIndex] = {}
    with progress("indexing documents", total_bytes=sum(entry.size for entry in files)) as advance:
        for number, part, result in run_tasks(tasks, partial(index_files, data=data)):
            if result:
                parts[number, part] = np.frombuffer(result, dtype=INDEX_DTYPE)
            else:
                advance(tasks[number]["bytes"])
    return np.concatenate([np.empty(0, INDEX_DTYPE), *(parts[key] for key in sorted(parts))])


def _file_groups(files: list[Entry]) -> Iterator[Task]:
    first, size = 0, 0
    for end, entry in enumerate(files, start=1):
        size += entry.size
        if end == len(files) or end - first == _GROUP_FILES or size >= _GROUP_BYTES:
            yield {"first": first, "uris": [member.key for member in files[first:end]], "bytes": size}
            first, size = end, 0


def index_files(task: Task, *, data: DataConfig) -> Iterator[bytes]:
    """Parts of the index of a group of files; an empty one says that the group is done."""
    part = bytearray()
    for file, uri in enumerate(task["uris"], start=task["first"]):
        for document in read_documents(uri, data):
            code = DROP_CODES.index(document.drop)
            part += _PACKED.pack(file, document.offset, len(document.text), code, document.replaced)
            part += hashlib.sha256(document.text).digest()
            if len(part) == _PART_DOCUMENTS * INDEX_DTYPE.itemsize:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)
    yield b""


def source_hash(index: CorpusIndex) -> str:
    """The same for the same documents in the same order, whatever files and places hold them."""
    return hashlib.sha256(index["drop"].tobytes() + index["hash"].tobytes()).hexdigest()
