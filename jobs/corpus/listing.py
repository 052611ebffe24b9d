"""Lists the files of a corpus in canonical order: by the order of the sources, then by path."""

import glob
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from sys import intern
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import TOKENS
from cluster.storage.uris import Entry, absolute_uri, glob_uris, pinned
from raymill.errors import UserError

_KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
MAX_FILES = 5_000_000  # the driver takes some 500 bytes for each
_SAID_FILES = 250_000  # after which listing says how far it is
_EXPECTED = "expected .txt .jsonl .csv .parquet, .gz and .zst of the first three, or what data.text_endings names"
_NO_ENDING = "none"
_NAMED_ENDINGS = 3


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
    # Files of unknown ending; hidden and linked folders, which end with a slash; special files
    skipped: list[str]
    revisions: dict[str, str]  # hf:// source -> commit
    sources: list[str]  # absolute location of each
    # Of files of unknown ending, by ending
    skipped_bytes: Counter[str] = field(default_factory=Counter)
    # Those of the skipped that hold no bytes, whatever their names: pipes, sockets, devices, and
    # links that lead nowhere
    special: list[str] = field(default_factory=list)

    def unknown(self) -> list[str]:
        """Returns the skipped files of unknown ending."""
        special = set(self.special)
        return [uri for uri in self.skipped if not uri.endswith("/") and uri not in special]

    def identity(self) -> list[tuple[str, int, str]]:
        """Returns JSON values that change whenever a file of the corpus changes."""
        return [(file.uri, file.size, file.version) for file in self.files]

    def record(self) -> dict[str, Any]:
        """Returns the part of the listing that a token store keeps, as JSON values."""
        return {"files": self.identity(), "skipped": self.skipped, "sources": self.sources}


def list_corpus(source: str | list[str], *, text_endings: Sequence[str] = ()) -> Listing:
    """Lists the files that `data.source` names, each once. Raises `CorpusError`, also for more than
    `MAX_FILES`, and `StorageError`.

    Files of the `text_endings` are read as .txt files are. A file of unknown ending is an error
    where it is named by itself, and is skipped in a folder or pattern. So are a hidden folder, such
    as `.git`, unless the source names it, a link to a folder, which might lead round in a circle,
    and what holds no bytes, such as a pipe.
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
        for entry in glob_uris(location, names_others=True):
            if entry.key in seen:
                continue
            _take(entry, listing, hidden, source=number, text_endings=text_endings)
            num_files = len(listing.files) + len(listing.skipped)
            if num_files > MAX_FILES:
                raise CorpusError(
                    f"{name} has more than {MAX_FILES:,} files; `raymill data pack {shlex.quote(name)} DEST` "
                    "writes .txt files into a few of Parquet, lines of .jsonl and .csv can be joined: set data.source "
                    "to those"
                )
            if num_files % _SAID_FILES == 0:
                say(f"listing {name}: {num_files:,} files so far")
        seen.update(file.uri for file in listing.files[first:] if len(sources) > 1)
    if not listing.files and not listing.token_stores:
        num_files = len(listing.unknown())
        raise CorpusError(
            f"none of {counted(num_files, 'file')} at {', '.join(sources)} has a known ending; {_EXPECTED}. Skipped: "
            f"{said_skipped(listing) or 'nothing'}"
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


def _take(
    entry: Entry, listing: Listing, hidden: set[str], *, source: int, text_endings: Sequence[str]
) -> None:
    """Adds a file to the listing, or to what it skips: a hidden folder once, and not each file of a
    `.git`."""
    location = listing.sources[-1]
    folder = hidden_folder(entry.key, location)
    if folder is not None:
        if folder not in hidden:
            hidden.add(folder)
            listing.skipped.append(folder)
    elif not entry.has_bytes:
        listing.skipped.append(entry.key)
        listing.special.append(entry.key)
    elif file := corpus_file(entry, len(listing.files), source=source, text_endings=text_endings):
        listing.files.append(file)
    elif entry.key == location:
        raise CorpusError(f"{location} has an unknown ending; {_EXPECTED}")
    else:
        listing.skipped.append(entry.key)
        if not entry.key.endswith("/"):
            listing.skipped_bytes[ending_of(entry.key)] += entry.size


def said_skipped(listing: Listing) -> str:
    """Returns what a listing left out, as a part of a sentence."""
    files, special = listing.unknown(), listing.special
    hidden, linked = hidden_folders(listing.skipped), linked_folders(listing.skipped)
    parts = (
        [f"{counted(len(files), 'file')} of unknown ending, such as {files[0]!r}"] if files else []
    )
    parts += [f"{counted(len(hidden), 'hidden folder')}, such as {hidden[0]!r}"] if hidden else []
    if linked:
        parts.append(
            f"{counted(len(linked), 'linked folder')}, such as {linked[0]!r} (links may lead round in circles; name in "
            "data.source those that are to be read)"
        )
    if special:
        parts.append(
            f"{counted(len(special), 'special file')}, such as {special[0]!r} (pipes, sockets, devices and links that "
            "lead nowhere hold no text)"
        )
    return " and ".join(parts)


def endings_of(listing: Listing) -> dict[str, int]:
    """Returns how many files of each unknown ending a listing left out, the commonest first."""
    endings = Counter(map(ending_of, listing.unknown()))
    return dict(endings.most_common())


def ending_of(uri: str) -> str:
    """Returns the ending of a file's name, such as `.md` or `.md.gz`, and `none` for a name without
    one."""
    name, compression = _parts(uri.rpartition("/")[2])
    return (
        f".{name.rpartition('.')[2]}{compression}" if "." in name[1:] else compression or _NO_ENDING
    )


def _parts(name: str) -> tuple[str, str]:
    """Returns a file's name without the ending of an archive, and that ending in small letters."""
    ending = name[name.rfind(".") :].lower()
    return (name[: -len(ending)], ending) if ending in _COMPRESSIONS else (name, "")


def most_is_skipped(listing: Listing) -> str:
    """Returns a warning where most bytes of the corpus lie in files of unknown ending, and nothing
    elsewhere."""
    num_read = sum(file.size for file in listing.files)
    num_skipped = listing.skipped_bytes.total()
    if num_skipped <= num_read:
        return ""
    endings = dict.fromkeys(_parts(ending)[0] for ending, _ in listing.skipped_bytes.most_common())
    largest = " ".join(
        [ending for ending in endings if ending not in ("", _NO_ENDING)][:_NAMED_ENDINGS]
    )
    advice = (
        f"; where these are text, `--data.text-endings {largest}` reads them" if largest else ""
    )
    return (
        f"WARNING: most of the corpus is left out: {num_skipped:,} of {num_read + num_skipped:,} bytes lie in files of "
        f"unknown ending{advice}"
    )


def hidden_folder(uri: str, source: str) -> str | None:
    """Returns the hidden folder below the source in which a file lies, with a slash, and None if it
    lies in none."""
    named = (
        re.split(r"[*?[]", source, maxsplit=1)[0].rpartition("/")[0]
        if glob.has_magic(source)
        else source
    )
    if "/." in source.removeprefix(named):
        return None  # a pattern that asks for hidden folders
    *folders, _ = uri.removeprefix(named).split("/")
    for depth, name in enumerate(folders, start=1):
        # Which are names of their own in a bucket
        if name.startswith(".") and name not in (".", ".."):
            return f"{named}{'/'.join(folders[:depth])}/"
    return None


def corpus_file(
    entry: Entry, number: int, *, source: int, text_endings: Sequence[str] = ()
) -> CorpusFile | None:
    """Returns the file by its ending; None for an unknown one. Raises `CorpusError` for a key that
    no storage reads."""
    name, compression = _parts(entry.key)
    kind = _kind(name.lower(), text_endings)
    if kind is None or (compression and kind == "parquet"):
        return None
    if "//" in entry.key.partition("://")[2]:
        raise CorpusError(
            f"{entry.key} is in a folder without a name, and would be read as another; rename it"
        )
    return CorpusFile(
        number, entry.key, source, entry.size, entry.version, kind, intern(compression)
    )


def _kind(name: str, text_endings: Sequence[str]) -> str | None:
    """Returns how a file is read, by its name in small letters."""
    for ending in _KINDS:
        if name.endswith(ending):
            return intern(ending.removeprefix("."))
    return "txt" if any(name.endswith(ending.lower()) for ending in text_endings) else None
