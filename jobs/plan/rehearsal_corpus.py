"""Makes the text of a rehearsal: a small corpus as it is, else the front of each of its sources, in one folder."""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from jobs.corpus.chunks import whole_file
from jobs.corpus.listing import list_corpus
from jobs.tokens.train_tokenizer import kept_texts

MAX_BYTES = 8 << 20


def rehearsal_corpus(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Returns `source`, with the bytes of the corpus and those of its part. Raises `CorpusError`."""
    data = config.data
    listing = list_corpus(data.source)
    if listing.token_stores:
        raise ConfigError("--calibrate measures tokenizing too: name texts with --data.source, not token stores")
    total = sum(file.size for file in listing.files)
    if total <= MAX_BYTES:
        return {"source": data.source, "source_bytes": total, "rehearsed_bytes": total}
    folder.mkdir()
    groups = [list(group) for _, group in groupby(listing.files, key=lambda file: file.source)]
    written = 0
    for number, files in enumerate(groups):
        with (folder / f"source-{number}.jsonl").open("w", encoding="utf-8") as file:
            left = MAX_BYTES // len(groups)
            for text in kept_texts(map(whole_file, files), data, set(), Counter()):
                written += file.write(json.dumps({data.text_field: text}, ensure_ascii=False) + "\n")
                left -= len(text)
                if left <= 0:
                    break
    return {"source": [str(folder)], "source_bytes": total, "rehearsed_bytes": written}
