"""Opens a token store with its trace index, its tokenizer, and its document map if it has one."""

from dataclasses import dataclass
from itertools import chain

import numpy as np

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage
from jobs.corpus.text_borders import cut_text
from jobs.tokens.document_map import DocumentMap, MappedDocument, read_map
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import TOKENIZER, Manifest, read_manifest
from jobs.trace.trace_index import TraceIndex
from jobs.trace.windows import Ids
from model.text.bulk_encoder import PlainEncoder
from model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class IndexedStore:
    """A token store in which texts can be found."""

    store: Storage
    manifest: Manifest
    index: TraceIndex
    mapped: DocumentMap | None
    tokenizer: Tokenizer

    @classmethod
    def open(cls, store: Storage, *, near: FileCache | None = None) -> "IndexedStore":
        """`near` has copies of a remote index. Raises `TraceIndexError` for a store without an
        index of its own."""
        manifest = read_manifest(store)
        index = TraceIndex(store, manifest, near=near)
        tokenizer = Tokenizer.from_json(store.read_bytes(TOKENIZER))
        return cls(store, manifest, index, read_map(store, manifest), tokenizer)

    def encoded(self, text: str) -> Ids:
        """Returns the ids of a text (N,) as a document has them, without its borders."""
        pieces = PlainEncoder(self.tokenizer).encode_pieces(cut_text(text))
        return np.fromiter(chain.from_iterable(pieces), np.uint64)

    def document(self, piece: Piece) -> MappedDocument | None:
        """Returns the document that holds a piece; without a map, none is known."""
        documents = self.mapped and self.mapped.documents_of(piece.shard.file)
        return documents.document(documents.number_at(piece.start)) if documents else None

    def file(self, document: MappedDocument) -> str:
        """Returns the URI of a document's file, as the corpus had it."""
        assert self.mapped is not None, "it came from the map"
        return self.mapped.files[document.file][0]
