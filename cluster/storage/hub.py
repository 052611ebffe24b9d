"""Repositories of the Hugging Face Hub: hf://owner/name@revision/path is a model's,
hf://datasets/owner/name a dataset's. They are read, and only `commit_folder` writes.

The token comes from HF_TOKEN and the address from HF_ENDPOINT, as in all of Hugging Face's tools.
huggingface_hub makes the requests and retries them for a while. Its `HfFileSystem` would not do: it
lists a whole folder to open a file, keeps listings of branches that move, and accepts an answer
that ignores the range.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Never
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    errors,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    parse_hf_uri,
)
from huggingface_hub.file_download import HfFileMetadata
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from cluster.storage import interface
from cluster.storage.ranged_reader import ranged_reader

_COMMIT = re.compile("[0-9a-f]{40}")
_TIMEOUT_S = 30.0
_MISSING = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)


@dataclass(frozen=True)
class HubStorage(interface.Storage):
    """Files below a folder of one revision (a branch, a tag or a commit) of a repository."""

    repository: str  # owner/name
    revision: str = "main"
    folder: str = ""
    kind: str = "dataset"  # or model

    @classmethod
    def at(cls, uri: str) -> "HubStorage":
        """Returns the storage at a URI without a request. Raises `StorageError` for a malformed
        one."""
        with suppress(errors.HfUriError):
            parsed = parse_hf_uri(uri.rstrip("/"))
            if parsed.type in ("dataset", "model"):
                key = interface.checked_key(parsed.path_in_repo)
                return cls(parsed.id, parsed.revision or "main", key, parsed.type)
        raise interface.StorageError(
            f"cannot open {uri!r}: expected hf://owner/name@revision/path for a model, or "
            "hf://datasets/owner/name@revision/path; @revision is main unless given, with %2F for each / in it"
        )

    @property
    def uri(self) -> str:
        root = interface.HF + ("datasets/" if self.kind == "dataset" else "")
        return interface.join_uri(
            f"{root}{self.repository}@{quote(self.revision, safe='')}", self.folder
        )

    def pinned(self) -> "HubStorage":
        """Returns the same place at the revision's current commit, so that no later commit is
        seen."""
        if _COMMIT.fullmatch(self.revision):
            return self
        with _explained_errors(self):
            found = _api().repo_info(
                self.repository, revision=self.revision, repo_type=self.kind, timeout=_TIMEOUT_S
            )
        return replace(self, revision=str(found.sha))

    def child(self, key: str) -> "HubStorage":
        return replace(self, folder=self._path(key))

    def _path(self, key: str) -> str:
        return "/".join(
            part for part in (self.folder, interface.checked_key(key).strip("/")) if part
        )

    def entries(self, prefix: str = "") -> Iterator[interface.Entry]:
        folder = self._path(prefix.rpartition("/")[0]) or None
        options: dict[str, Any] = {
            "recursive": True,
            "revision": self.revision,
            "repo_type": self.kind,
        }
        with _explained_errors(self):
            try:
                found = list(_api().list_repo_tree(self.repository, folder, **options))
            except errors.EntryNotFoundError:
                return
        root = f"{self.folder}/" if self.folder else ""
        entries = [
            # The Hub's entity tag for the file too: git's hash, or the SHA-256 of large files.
            interface.Entry(
                item.path.removeprefix(root),
                item.size,
                item.lfs.sha256 if item.lfs else item.blob_id,
            )
            for item in found
            if isinstance(item, RepoFile)
        ]
        yield from sorted(
            (entry for entry in entries if entry.key.startswith(prefix)),
            key=lambda entry: entry.key,
        )

    def stat(self, key: str) -> interface.Entry | None:
        try:
            found = self._metadata(key)
        except interface.NotFoundError as error:
            if isinstance(error.__cause__, errors.EntryNotFoundError):
                return None
            raise
        if found.size is None or found.etag is None:
            raise interface.StorageError(
                f"{interface.join_uri(self.uri, key)}: the Hub names neither size nor entity tag; set HF_ENDPOINT"
            )
        return interface.Entry(key, found.size, found.etag)

    def open(self, key: str, *, listed: interface.Entry | None = None) -> BinaryIO:
        # Size and ranges of one commit, whatever happens to a branch meanwhile.
        source = replace(self, revision=self._metadata(key).commit_hash or self.revision)
        entry = source.stat(key)
        assert entry is not None, "a file of a commit stays there"
        return ranged_reader(
            entry.size, lambda start, end: source.read_bytes(key, start=start, end=end)
        )

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""  # an HTTP range cannot be empty
        headers = build_hf_headers(token=_token()) | {"Accept-Encoding": "identity"}
        is_whole = start == 0 and end is None
        if not is_whole:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        with _explained_errors(self, key):
            answer = http_backoff("GET", self._url(key), headers=headers, timeout=_TIMEOUT_S)
            hf_raise_for_status(answer)
        if not is_whole and answer.status_code != 206:
            raise interface.StorageError(
                f"{interface.join_uri(self.uri, key)}: {_endpoint()} ignores byte ranges; set HF_ENDPOINT"
            )
        return answer.content

    def commit_folder(self, folder: Path, *, message: str, creates: bool) -> str:
        """Writes a folder's files in one commit, and returns its hash; with `creates`, the
        repository too, a private one. A branch never has a part of them. Raises `StorageError`."""
        token = get_token()  # a person's login counts here too
        if token is None:
            raise interface.StorageError(
                f"{self.uri}: writing needs a token: set HF_TOKEN to one that may write "
                f"({_endpoint()}/settings/tokens), or log in with `hf auth login`"
            )
        api = HfApi(endpoint=_endpoint(), token=token)
        additions = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        with _explained_errors(self):
            try:
                if creates:
                    api.create_repo(self.repository, private=True, exist_ok=True)
                commit = api.create_commit(
                    self.repository, additions, commit_message=message, revision=self.revision
                )
            except (RuntimeError, ValueError) as error:  # of one file, or of the card
                is_of_file = isinstance(error, RuntimeError) and error.__cause__ is not None
                reason = " ".join(str(error.__cause__ if is_of_file else error).split())
                raise interface.StorageError(
                    f"{self.uri}: the upload failed, and nothing was committed: {reason}; push again"
                ) from error
        return str(commit.oid)

    def _refuse(self, *arguments: Any, **options: Any) -> Never:
        raise interface.StorageError(
            f"{self.uri} can only be read; write to a folder or to s3://bucket/prefix"
        )

    write_bytes = delete = upload_file = _refuse

    def _url(self, key: str) -> str:
        name = self._path(key)
        return hf_hub_url(
            self.repository, name, repo_type=self.kind, revision=self.revision, endpoint=_endpoint()
        )

    def _metadata(self, key: str) -> HfFileMetadata:
        ask = _file_metadata if _COMMIT.fullmatch(self.revision) else _file_metadata.__wrapped__
        with _explained_errors(self, key):
            return ask(self._url(key))


# At a commit it never changes: the Hub limits requests, and parts share a file
@lru_cache(maxsize=1 << 14)
def _file_metadata(url: str) -> HfFileMetadata:
    return get_hf_file_metadata(url, token=_token(), timeout=_TIMEOUT_S, retry_on_errors=True)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _token() -> str | bool:
    """Returns the token of the environment, as workers have no login file; False asks
    anonymously."""
    return os.environ.get("HF_TOKEN") or False


def _api() -> HfApi:
    return HfApi(endpoint=_endpoint(), token=_token())


@contextmanager
def _explained_errors(storage: HubStorage, key: str = "") -> Iterator[None]:
    try:
        yield
    # The first is the base of what its HTTP library raises, whichever that is.
    except (errors.HTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        uri = interface.join_uri(storage.uri, key)
        host = _endpoint().rpartition("@")[2]
        code = str(error.response.status_code) if isinstance(error, errors.HfHubHTTPError) else None
        is_missing = isinstance(error, _MISSING) and not isinstance(error, errors.GatedRepoError)
        kind = interface.NotFoundError if is_missing else interface.StorageError
        raise kind(f"{uri}: {interface.reason_of('hub', error, code=code, host=host)}") from error
