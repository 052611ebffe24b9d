"""Loads the corpus's tokenizer where one is named, or else trains and stores one on a sample of the
corpus."""

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import DataConfig
from cluster.settings.run import RunConfig
from cluster.settings.setting import Shapes, names_shaping
from cluster.storage.uris import NotFoundError, join_uri, open_storage, split_uri
from jobs.cleaning.why_dropped import why_dropped
from jobs.corpus.chunks import Chunk, Part, whole_file
from jobs.corpus.documents import Document, Drop, read_documents
from jobs.corpus.empty_corpus import empty_corpus
from jobs.corpus.listing import CorpusFile, Listing, list_corpus
from jobs.corpus.ray_data_tasks import Runner, run_tasks
from jobs.corpus.sample_places import sample_places
from jobs.corpus.text_borders import cut_text
from jobs.corpus.text_hashes import document_hash, normalized
from jobs.tokens.token_store import canonical_json
from model.files.bounded_text import TEXT_FILES, TextError, bounded_probe, has_strange_programs
from model.text.tokenizer import Tokenizer, chat_format, train_bpe

TOKENIZER_FILE = "tokenizer.json"
TRAINING_PIECE_CHARS = 1024
_MOST_READ = 8  # times the text wanted from a place is read there at most, however much is dropped


def ensure_tokenizer(
    config: RunConfig, listing: Listing | None = None, *, run: Runner = run_tasks
) -> tuple[Tokenizer, str]:
    """Returns the tokenizer and the URI of its tokenizer.json; trains one only if none is named or
    stored. Needs Ray.

    The tokenizer is stored under a key of the settings and files that shape it, so a changed corpus
    gets a new one.
    """
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer)
    listing = listing or list_corpus(config.data.source, text_endings=config.data.text_endings)
    if listing.token_stores:
        return load_tokenizer(next(iter(listing.token_stores.values())))
    shape = config.data.model_dump(mode="json", include=names_shaping(DataConfig, Shapes.TOKENIZER))
    shape |= {"format": "chat"} if config.data.format == "chat" else {}
    key = hashlib.sha256(canonical_json([shape, listing.identity()])).hexdigest()[:12]
    folder = open_storage(config.storage.uri).child(f"tokenizers/{key}")
    uri = join_uri(folder.uri, TOKENIZER_FILE)
    if not folder.exists(TOKENIZER_FILE):
        say(
            f"training a tokenizer of up to {config.data.vocab_size} ids on {counted(len(listing.files), 'file')}"
        )
        corpus = Chunk(0, 0, list(map(whole_file, listing.files)))
        (trained,) = run([corpus], partial(train_tokenizer, data=config.data))
        folder.write_bytes(TOKENIZER_FILE, trained.content)
    tokenizer = Tokenizer.from_json(folder.read_bytes(TOKENIZER_FILE))
    if tokenizer.vocab_size < config.data.vocab_size:
        say(
            f"the corpus is small: its tokenizer has {tokenizer.vocab_size} ids, not {config.data.vocab_size}"
        )
    return tokenizer, uri


def load_tokenizer(uri: str) -> tuple[Tokenizer, str]:
    """Returns the tokenizer at the location of a tokenizer.json or of its folder, with the chat
    template beside it, and the file's URI."""
    file_uri = uri if uri.endswith(".json") else join_uri(uri.rstrip("/"), TOKENIZER_FILE)
    storage, name = split_uri(file_uri)
    try:
        files = {TOKENIZER_FILE: storage.read_bytes(name)}
    except NotFoundError as error:
        raise NotFoundError(f"{error}; data.tokenizer and tokens:// sources need one") from error
    beside = {other: storage.find_bytes(other) for other in TEXT_FILES if other != TOKENIZER_FILE}
    files |= {other: content for other, content in beside.items() if content is not None}
    try:
        _require_bounded(tuple(files.items()))
    except TextError as error:
        raise TextError(
            f"{file_uri}: {error}. Name a tokenizer without this template, or put another one, or none, beside it "
            "(chat_template.jinja, or chat_template in tokenizer_config.json)"
        ) from None
    return Tokenizer.from_json(files[TOKENIZER_FILE], chat_format(files.get)), join_uri(
        storage.uri, name
    )


@lru_cache(4)
def _require_bounded(files: tuple[tuple[str, bytes], ...]) -> None:
    """Raises `TextError` for a stranger's tokenizer or chat template that does not end: training
    would run both in processes that a whole run waits for."""
    content = dict(files)
    if not has_strange_programs(content.get):
        return
    with tempfile.TemporaryDirectory(prefix="raymill-tokenizer-") as scratch:
        for name, data in content.items():
            (Path(scratch) / name).write_bytes(data)
        bounded_probe(Path(scratch))


def train_tokenizer(corpus: Chunk, *, data: DataConfig) -> bytes:
    """Returns the tokenizer.json of a corpus."""
    sample = sample_texts([part.file for part in corpus.parts], data)
    return train_bpe(sample, vocab_size=data.vocab_size, normalize=data.normalize).to_json()


def sample_texts(files: Sequence[CorpusFile], data: DataConfig) -> Iterator[str]:
    """Yields up to `data.tokenizer_sample_bytes` of the kept documents, an equal share from each
    source: all of a small source, or else text from places all over it.

    The text is cut into pieces of `TRAINING_PIECE_CHARS` to twice as many, because training takes
    time in the square of a word's length, and DNA is one word of a megabyte. The last document of a
    place may be cut. The next place makes up for one where much is dropped. Raises `CorpusError`
    when no document is kept.
    """
    share_bytes = max(1, data.tokenizer_sample_bytes // len({file.source for file in files}))
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    for _, group in groupby(files, key=lambda file: file.source):
        remaining = 0
        for num_bytes, parts in sample_places(list(group), data, share_bytes=share_bytes):
            remaining += num_bytes
            for text in kept_texts(parts, data, seen, dropped, most_bytes=_MOST_READ * remaining):
                encoded = text.encode()
                yield from cut_text(
                    encoded[:remaining].decode(errors="ignore"), piece_chars=TRAINING_PIECE_CHARS
                )
                remaining -= min(len(encoded), remaining)
                if not remaining:
                    break
    if not seen:
        raise empty_corpus(files, dropped)


def kept_texts(
    parts: Iterable[Part],
    data: DataConfig,
    seen: set[bytes],
    dropped: Counter[str],
    *,
    most_bytes: float = math.inf,
) -> Iterator[str]:
    """Yields the texts of kept documents that were not `seen` before, in order; counts the
    `dropped` ones by reason.

    Ends after reading `most_bytes`, if anything was seen by then.
    """
    num_bytes = 0
    for part in parts:
        for document, drop in judged(part, data, seen):
            if drop:
                dropped[drop] += 1
            else:
                yield document.text
            num_bytes += document.size
            if num_bytes > most_bytes and seen:
                return


def judged(
    part: Part, data: DataConfig, seen: set[bytes]
) -> Iterator[tuple[Document, Drop | None]]:
    """Yields the documents of a part, each with the reason to drop it, if any; what is kept is
    `seen` from then on."""
    for document in read_documents(part, data):
        drop = why_dropped(document, data)
        if drop is None:
            digest = document_hash(normalized(document.text))
            drop = Drop.DUPLICATE if data.dedup and digest in seen else None
            seen.add(digest)
        yield document, drop


def text_sample(listing: Listing, data: DataConfig) -> list[str]:
    """Returns a few texts from the front of the corpus, each cut to some kilobytes."""
    texts = kept_texts(map(whole_file, listing.files), data, set(), Counter())
    return [text[:8192] for text in islice(texts, 20)]
