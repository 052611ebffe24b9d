"""Storage in S3 or a store with its protocol; credentials and endpoint come from the
environment."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from cluster.storage import interface
from cluster.storage.ranged_reader import ranged_reader

_log = logging.getLogger(__name__)

_LISTING = "s3:ListBucketMultipartUploads"
_PIECE_BYTES = 256 << 10
_MAX_ATTEMPTS = 4

_BROKEN_OFF = (
    exceptions.ResponseStreamingError,
    exceptions.IncompleteReadError,
    exceptions.ReadTimeoutError,
)
_REFUSED_CONDITION = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_MISSING_KEY = ("NoSuchKey", "404")


def _client() -> Any:
    return _client_at(_endpoint())


@cache
def _client_at(url: str | None) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        connect_timeout=5,
        # Without a byte; a store that swallows requests must not delay recovery by a minute
        read_timeout=15,
        # Stores other than AWS rarely have a DNS name for each bucket.
        s3={"addressing_style": "path" if url else "auto"},
    )
    return boto3.client("s3", endpoint_url=url, config=config)


@dataclass(frozen=True)
class S3Storage(interface.Storage):
    """Objects below a prefix of a bucket."""

    bucket: str
    prefix: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", self.bucket):
            shown = self.bucket.rpartition("@")[2]  # never a key that was put into the URI
            raise interface.StorageError(
                f"{shown!r} is no bucket name; expected s3://bucket/prefix, keys in the environment"
            )

    @property
    def uri(self) -> str:
        return interface.join_uri(f"s3://{self.bucket}", self.prefix)

    def child(self, key: str) -> "S3Storage":
        return S3Storage(self.bucket, self._object_key(key))

    def _object_key(self, key: str) -> str:
        return "/".join(
            part for part in (self.prefix, interface.checked_key(key).strip("/")) if part
        )

    @contextmanager
    def _explained(
        self, key: str, *, if_absent: bool = False, if_version: str | None = None
    ) -> Iterator[None]:
        """Raises `StorageError` of the fitting kind for what boto3 raises in the block, by the
        request's condition."""
        uri = interface.join_uri(self.uri, key)
        try:
            yield
        except S3UploadFailedError as error:  # wraps the cause
            raise _explain(uri, self.bucket, error.__context__) from error
        except RetriesExceededError as error:  # of a download; boto3's stubs lack the cause
            cause: Exception = error.last_exception  # type: ignore[attr-defined]
            raise _explain(uri, self.bucket, cause) from error
        # HTTPError: botocore neither retries nor wraps it where what a refused GetObject answers
        # breaks off.
        except (ClientError, exceptions.BotoCoreError, ResponseParserError, HTTPError) as error:
            code = _code_of(error)
            if if_absent and code in _REFUSED_CONDITION:
                raise interface.AlreadyExistsError(f"{uri} exists already") from error
            if if_version is not None and code in (*_REFUSED_CONDITION, *_MISSING_KEY):
                raise interface.ConflictError(
                    f"{uri} was changed or removed by another process; run again"
                ) from error
            raise _explain(uri, self.bucket, error) from error

    def read_bytes(
        self, key: str, *, start: int = 0, end: int | None = None, version: str | None = None
    ) -> bytes:
        """Returns bytes [start, end) of one version. botocore retries failed requests, but not a
        body that breaks off or is short: it is continued where it ended, until it brought less than
        a piece four times in a row. Of a body that does not match its checksum nothing is kept, as
        any of its bytes may be wrong."""
        if end is not None and end <= start:
            return b""  # an HTTP range cannot be empty
        content, tries = bytearray(), 0
        with self._explained(key, if_version=version):
            while tries < _MAX_ATTEMPTS:
                position = start + len(content)
                answer = self._get(key, position, end, version)
                version = answer["ETag"]
                total = int(
                    answer.get("ContentRange", f"/{answer['ContentLength']}").rpartition("/")[2]
                )
                try:
                    with suppress(*_BROKEN_OFF):
                        for piece in answer["Body"].iter_chunks(_PIECE_BYTES):
                            content += piece
                except exceptions.FlexibleChecksumError:
                    del content[position - start :]
                    tries += 1
                    if tries == _MAX_ATTEMPTS:
                        raise
                    continue
                if start + len(content) >= (total if end is None else min(end, total)):
                    return bytes(content)
                tries = 0 if start + len(content) - position >= _PIECE_BYTES else tries + 1
        raise interface.StorageError(
            f"{interface.join_uri(self.uri, key)}: the transfer broke off {tries} times; run again"
        )

    def _get(self, key: str, position: int, end: int | None, version: str | None) -> dict[str, Any]:
        """Returns the answer to GetObject for the bytes [position, end) of a version."""
        wanted: dict[str, str] = {} if version is None else {"IfMatch": version}
        if position or end is not None:
            wanted["Range"] = f"bytes={position}-{'' if end is None else end - 1}"
        answer: dict[str, Any] = _client().get_object(
            Bucket=self.bucket, Key=self._object_key(key), **wanted
        )
        if "Range" in wanted and not answer.get("ContentRange", "").startswith(
            f"bytes {position}-"
        ):
            raise interface.StorageError(
                f"{interface.join_uri(self.uri, key)}: the store ignores byte ranges; copy the file elsewhere"
            )
        return answer

    def write_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else _if_match(if_version)
        with self._explained(key, if_absent=if_absent, if_version=if_version):
            answer = _client().put_object(
                Bucket=self.bucket, Key=self._object_key(key), Body=data, **condition
            )
        return str(answer["ETag"]).strip('"')

    def entries(self, prefix: str = "") -> Iterator[interface.Entry]:
        root = f"{self.prefix}/" if self.prefix else ""
        with self._explained(prefix):
            for page in (
                _client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.bucket, Prefix=root + prefix)
            ):
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # "folders" that web consoles create
                        key = item["Key"].removeprefix(root)
                        yield interface.Entry(key, item["Size"], item["ETag"].strip('"'))

    def stat(self, key: str) -> interface.Entry | None:
        # A listing, as HEAD's bare 404 does not tell a missing object from a missing bucket.
        name = self._object_key(key)
        with self._explained(key):
            answer = _client().list_objects_v2(Bucket=self.bucket, Prefix=name, MaxKeys=1)
        found = [item for item in answer.get("Contents", []) if item["Key"] == name]
        return (
            interface.Entry(key, found[0]["Size"], found[0]["ETag"].strip('"')) if found else None
        )

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        with self._explained(key, if_version=if_version):
            _client().delete_object(
                Bucket=self.bucket, Key=self._object_key(key), **_if_match(if_version)
            )

    def open(self, key: str, *, listed: interface.Entry | None = None) -> BinaryIO:
        entry = listed or self.stat(key)
        if entry is None:
            raise interface.NotFoundError(
                f"{interface.join_uri(self.uri, key)} does not exist; check the URI"
            )
        version = f'"{entry.version}"'
        return ranged_reader(
            entry.size,
            lambda start, end: self.read_bytes(key, start=start, end=end, version=version),
        )

    def upload_file(self, source: Path, key: str) -> None:
        with self._explained(key):
            _client().upload_file(str(source), self.bucket, self._object_key(key))

    def abort_uploads(self) -> None:
        name = {"Bucket": self.bucket}
        with self._explained(""):
            pages = _client().get_paginator("list_multipart_uploads")
            try:
                found = pages.paginate(
                    **name, Prefix=f"{self.prefix}/" if self.prefix else ""
                ).build_full_result()
            except ClientError as error:
                if _code_of(error) != "AccessDenied":
                    raise
                _log.warning("%s: what killed uploads left stays; allow %s", self.uri, _LISTING)
                return
            for upload in found.get("Uploads", []):
                _client().abort_multipart_upload(
                    **name, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def download_file(self, key: str, target: Path) -> None:
        """Copies the object to a local file. boto3 retries a body that breaks off, but not one that
        does not match its checksum."""
        with self._explained(key):
            for tries_left in reversed(range(_MAX_ATTEMPTS)):
                try:
                    _client().download_file(self.bucket, self._object_key(key), str(target))
                    return
                except exceptions.FlexibleChecksumError:
                    if not tries_left:
                        raise


def _if_match(version: str | None) -> dict[str, str]:
    return {} if version is None else {"IfMatch": f'"{version}"'}


def _endpoint() -> str | None:
    """Returns S3's address from the environment; None means AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _code_of(error: BaseException | None) -> str | None:
    """Returns S3's own word for the error, or the status of an answer without a body; None if it
    gave no answer."""
    return str(error.response["Error"]["Code"]) if isinstance(error, ClientError) else None


def _explain(uri: str, bucket: str, error: BaseException | None) -> interface.StorageError:
    host = (_endpoint() or "AWS").rpartition("@")[2]
    code = _code_of(error)
    if code == "NoSuchBucket":
        return interface.NotFoundError(
            f"{uri}: there is no bucket {bucket!r} at {host}; create it or correct the URI"
        )
    if code in _MISSING_KEY:
        return interface.NotFoundError(f"{uri} does not exist; check the URI")
    return interface.StorageError(
        f"{uri}: {interface.reason_of('s3', error, code=code, host=host)}"
    )
