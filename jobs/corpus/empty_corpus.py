"""Says why nothing of a corpus is left, by the reasons to drop documents and by the first line of
JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.output.result_text import counted
from cluster.storage.uris import split_uri
from jobs.corpus.conversations import FORMS
from jobs.corpus.decompression import decompressed
from jobs.corpus.listing import CorpusError, CorpusFile

_LINE_BYTES = 64 << 10  # of a line that is looked at; the fields of a longer one stay unnamed


def empty_corpus(files: Sequence[CorpusFile], dropped: Mapping[str, int]) -> CorpusError:
    """Returns the error for a corpus of which nothing is left. It names the fields of the first
    line of JSON where documents lack the field that was asked for, or have no messages."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return CorpusError(
        f"the corpus is empty: {counted(len(files), 'file')}, {counted(sum(dropped.values()), 'document')} dropped"
        + (f" ({reasons})" if reasons else "")
        + f"; {_what_to_check(files, dropped)}"
    )


def _what_to_check(files: Sequence[CorpusFile], dropped: Mapping[str, int]) -> str:
    if dropped.get("no_messages"):
        fields = ", ".join(_fields_of_first_line(files))
        return f"data.format=chat reads lines with {FORMS}" + (
            f", and the first line has {fields}" if fields else ""
        )
    to_check = "check data.source and data.text_field"
    if not dropped.get("missing_text"):
        return to_check
    texts = [name for name, value in _fields_of_first_line(files).items() if isinstance(value, str)]
    return to_check + (f", which may be one of {', '.join(texts)}" if texts else "")


def _fields_of_first_line(files: Sequence[CorpusFile]) -> dict[str, Any]:
    """Returns the first line of the first file of JSON lines, where it is a short object."""
    file = next((file for file in files if file.kind == "jsonl"), None)
    if file is None:
        return {}
    storage, name = split_uri(file.uri)
    with storage.open(name) as raw:
        line = decompressed(raw, file, max_ratio=1.0).readline(_LINE_BYTES)
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
