"""Makes the text of a rehearsal: a small corpus as it is, else a sample of each of its sources, in one file."""

import json
from pathlib import Path
from typing import Any

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from jobs.corpus.listing import list_corpus
from jobs.tokens.train_tokenizer import sample_texts

MAX_BYTES = 8 << 20


def rehearsal_corpus(config: RunConfig, path: Path) -> dict[str, Any]:
    """Returns `source`, with the bytes of the corpus and those of its sample. Raises `CorpusError`."""
    data = config.data
    listing = list_corpus(data.source)
    if listing.token_stores:
        raise ConfigError("--calibrate measures tokenizing too: name texts with --data.source, not token stores")
    total = sum(file.size for file in listing.files)
    if total <= MAX_BYTES:
        return {"source": data.source, "source_bytes": total, "rehearsed_bytes": total}
    sampled = data.model_copy(update={"tokenizer_sample_bytes": MAX_BYTES})
    with path.open("w", encoding="utf-8") as file:
        for text in sample_texts(listing.files, sampled, piece_chars=data.max_document_bytes):
            file.write(json.dumps({data.text_field: text}, ensure_ascii=False) + "\n")
    return {"source": [str(path)], "source_bytes": total, "rehearsed_bytes": path.stat().st_size}
