"""Lists the files of a corpus in canonical order: by the order of the sources, then by path."""

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sys import intern
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import TOKENS
from cluster.storage.uris import Entry, absolute_uri, glob_uris, pinned, split_uri
from model.errors import UserError

_ENDINGS = re.compile(r"\.(txt|jsonl|csv)(\.gz|\.zst)?$|\.(parquet)$", re.IGNORECASE)
_FRONT_BYTES = 64 << 10
MAX_FILES = 5_000_000  # the driver takes some 500 bytes for each
_SAID_FILES = 250_000  # after which listing says how far it is
_EXPECTED = "expected .txt .jsonl .csv .parquet, .gz and .zst of the first three"


class CorpusError(UserError):
    """The corpus cannot be used as it is; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    number: int  # in the listing
    uri: str
    source: int  # index in data.source
    size: int  # bytes
    version: str  # changes with the bytes
    kind: str  # txt, jsonl, csv or parquet
    compression: str = ""  # "", ".gz" or ".zst"


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, the finished token stores among its sources, and what is skipped."""

    files: list[CorpusFile]
    token_stores: dict[int, str]  # source -> location
    skipped: list[str]  # files of unknown ending; hidden and linked folders, which end with a slash
    revisions: dict[str, str]  # hf:// source -> commit
    sources: list[str]  # absolute location of each

    def identity(self) -> list[tuple[str, int, str]]:
        """Returns JSON values that change whenever a file of the corpus changes."""
        return [(file.uri, file.size, file.version) for file in self.files]

    def record(self) -> dict[str, Any]:
        """Returns the part of the listing that a token store keeps, as JSON values."""
        return {"files": self.identity(), "skipped": self.skipped, "sources": self.sources}


def list_corpus(source: str | list[str]) -> Listing:
    """Lists the files that `data.source` names, each once. Raises `CorpusError`, also for more than `MAX_FILES`, and
    `StorageError`.

    A file of unknown ending is an error where it is named by itself, and is skipped in a folder or pattern. So are a
    hidden folder, such as `.git`, unless the source names it, and a link to a folder, which might lead round in a
    circle.
    """
    sources = [source] if isinstance(source, str) else source
    if not sources:
        raise CorpusError("data.source is empty; name the corpus by a path or URI, globs allowed")
    seen: set[str] = set()
    listing = Listing([], {}, [], {}, [])
    for number, name in enumerate(sources):
        if name.startswith(TOKENS):
            listing.token_stores[number] = absolute_uri(name.removeprefix(TOKENS))
            listing.sources.append(f"{TOKENS}{listing.token_stores[number]}")
            continue
        location, revision = pinned(name)
        listing.sources.append(absolute_uri(location))
        if revision:
            listing.revisions[name] = revision
        first, hidden = len(listing.files), set[str]()
        for entry in glob_uris(location, names_links=True):
            if entry.key in seen:
                continue
            _take(entry, listing, hidden, source=number)
            num_files = len(listing.files) + len(listing.skipped)
            if num_files > MAX_FILES:
                raise CorpusError(
                    f"{name} has more than {MAX_FILES:,} files; `raymill data pack {name} DEST` writes .txt files into "
                    "a few of Parquet, lines of .jsonl and .csv can be joined: set data.source to those"
                )
            if num_files % _SAID_FILES == 0:
                say(f"listing {name}: {num_files:,} files so far")
        seen.update(file.uri for file in listing.files[first:] if len(sources) > 1)
    if not listing.files and not listing.token_stores:
        num_files = sum(not uri.endswith("/") for uri in listing.skipped)
        raise CorpusError(
            f"none of the {num_files} files at {', '.join(sources)} has a known ending; {_EXPECTED}. Skipped: "
            f"{said_skipped(listing.skipped) or 'nothing'}"
        )
    return listing


def hidden_folders(skipped: Sequence[str]) -> list[str]:
    """Returns the folders among what a listing left out that are hidden."""
    return [uri for uri in _folders(skipped) if _name(uri).startswith(".")]


def linked_folders(skipped: Sequence[str]) -> list[str]:
    """Returns the folders among what a listing left out that are links."""
    return [uri for uri in _folders(skipped) if not _name(uri).startswith(".")]


def _folders(skipped: Sequence[str]) -> list[str]:
    return [uri for uri in skipped if uri.endswith("/")]


def _name(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2]


def _take(entry: Entry, listing: Listing, hidden: set[str], *, source: int) -> None:
    """Adds a file to the listing, or to what it skips: a hidden folder once, and not each file of a `.git`."""
    location = listing.sources[-1]
    folder = hidden_folder(entry.key, location)
    if folder is not None:
        if folder not in hidden:
            hidden.add(folder)
            listing.skipped.append(folder)
    elif file := corpus_file(entry, len(listing.files), source=source):
        listing.files.append(file)
    elif entry.key == location:
        raise CorpusError(f"{location} has an unknown ending; {_EXPECTED}")
    else:
        listing.skipped.append(entry.key)


def said_skipped(skipped: Sequence[str]) -> str:
    """Returns what a listing left out, as a part of a sentence."""
    files = [uri for uri in skipped if not uri.endswith("/")]
    hidden, linked = hidden_folders(skipped), linked_folders(skipped)
    parts = [f"{counted(len(files), 'file')} of unknown ending, such as {files[0]!r}"] if files else []
    parts += [f"{counted(len(hidden), 'hidden folder')}, such as {hidden[0]!r}"] if hidden else []
    if linked:
        parts.append(
            f"{counted(len(linked), 'linked folder')}, such as {linked[0]!r} (links may lead round in circles; name in "
            "data.source those that are to be read)"
        )
    return " and ".join(parts)


def endings_of(skipped: Sequence[str]) -> dict[str, int]:
    """Returns how many files of each ending a listing left out, the commonest first."""
    names = [uri.rpartition("/")[2] for uri in skipped if not uri.endswith("/")]
    endings = Counter(f".{name.rpartition('.')[2]}" if "." in name[1:] else "none" for name in names)
    return dict(endings.most_common())


def hidden_folder(uri: str, source: str) -> str | None:
    """Returns the hidden folder below the source in which a file lies, with a slash, and None if it lies in none."""
    named = re.split(r"[*?[]", source, maxsplit=1)[0].rpartition("/")[0] if glob.has_magic(source) else source
    if "/." in source.removeprefix(named):
        return None  # a pattern that asks for hidden folders
    *folders, _ = uri.removeprefix(named).split("/")
    for depth, name in enumerate(folders, start=1):
        if name.startswith(".") and name not in (".", ".."):  # which are names of their own in a bucket
            return f"{named}{'/'.join(folders[:depth])}/"
    return None


def corpus_file(entry: Entry, number: int, *, source: int) -> CorpusFile | None:
    """Returns the file by its ending; None for an unknown one. Raises `CorpusError` for a key that no storage reads."""
    ending = _ENDINGS.search(entry.key)
    if ending is None:
        return None
    if "//" in entry.key.partition("://")[2]:
        raise CorpusError(f"{entry.key} is in a folder without a name, and would be read as another; rename it")
    kind, compression, parquet = (intern(part.lower()) if part else "" for part in ending.groups())
    return CorpusFile(number, entry.key, source, entry.size, entry.version, kind or parquet, compression)


def empty_corpus(files: Sequence[CorpusFile], dropped: Mapping[str, int]) -> CorpusError:
    """Returns the error for a corpus of which nothing is left, with the fields of its first line if it lacks the one
    that was asked for."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    fields = _fields_of_first_line(files) if dropped.get("missing_text") else []
    return CorpusError(
        f"the corpus is empty: {len(files)} files, {sum(dropped.values())} documents dropped"
        + (f" ({reasons})" if reasons else "")
        + "; check data.source and data.text_field"
        + (f", which may be one of {', '.join(fields)}" if fields else "")
    )


def _fields_of_first_line(files: Sequence[CorpusFile]) -> list[str]:
    """Returns the fields with text in the first line of the first file of JSON lines that is not compressed."""
    file = next((file for file in files if file.kind == "jsonl" and not file.compression), None)
    if file is None:
        return []
    folder, name = split_uri(file.uri)
    line = folder.read_bytes(name, start=0, end=min(file.size, _FRONT_BYTES)).partition(b"\n")[0]
    try:
        value = json.loads(line)
    except ValueError:  # also one that is longer than what was read
        return []
    return [key for key, item in value.items() if isinstance(item, str)] if isinstance(value, dict) else []
