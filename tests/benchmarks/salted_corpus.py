"""English text of any size from the demo's: documents of 2 to 4 kB, each with words of its own, so
none is a copy."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

_MIN_CHARS = 2000
_SALT_WORDS = 12
_FILE_BYTES = 64_000_000


def documents(texts: Path, num_bytes: int) -> Iterator[str]:
    """Yields passages in order, over and over, each time after other words; the same for the same
    texts."""
    passages = [
        passage
        for path in sorted(texts.iterdir())
        for passage in _passages(path.read_text(encoding="utf-8"))
    ]
    words = sorted({word for passage in passages for word in passage.split() if word.isalpha()})
    rng = random.Random(0)
    written = 0
    while True:
        for passage in passages:
            document = f"{' '.join(rng.choices(words, k=_SALT_WORDS))}.\n{passage}"
            yield document
            written += len(document.encode())
            if written >= num_bytes:
                return


def _passages(text: str) -> Iterator[str]:
    passage, number = "", 0
    for line in text.splitlines(keepends=True):
        passage += line
        if len(passage) >= _MIN_CHARS + number % 5 * 400:
            yield passage
            passage, number = "", number + 1


def write_corpus(folder: Path, texts: Path, num_bytes: int) -> int:
    """Writes the documents, and returns their number."""
    return write_documents(folder, documents(texts, num_bytes))


def write_documents(folder: Path, found: Iterable[str]) -> int:
    """Writes JSON lines in files of about 64 MB, and returns the number of documents."""
    folder.mkdir(parents=True)
    count, written, file = 0, 0, None
    for document in found:
        if file is None or written >= _FILE_BYTES:
            if file is not None:
                file.close()
            file, written = (folder / f"part-{count:08d}.jsonl").open("w", encoding="utf-8"), 0
        written += file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        count += 1
    assert file is not None, "there is a first document"
    file.close()
    return count
