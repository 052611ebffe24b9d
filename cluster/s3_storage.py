"""Storage in S3 or a store that speaks its protocol; credentials and endpoint come from the environment."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from cluster.storage_interface import (
    AlreadyExistsError,
    Entries,
    Entry,
    NotFoundError,
    Storage,
    StorageError,
    checked_key,
    join_uri,
)

_READ_BLOCK_BYTES = 8 << 20
_MAX_ATTEMPTS = 4

_DENIED = "access denied ({code}); check the credentials and the bucket's policy"
_ELSEWHERE = "the bucket lies in another region ({code}); set AWS_DEFAULT_REGION to it"
_REASONS = {
    "PreconditionFailed": "the object changed while it was read; run again once nobody writes to it",
    "RequestTimeTooSkewed": "refused because this machine's clock is wrong; set it",
    **dict.fromkeys(("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"), _DENIED),
    **dict.fromkeys(("ExpiredToken", "InvalidToken"), _DENIED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed"), _ELSEWHERE),
}


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@cache
def _client(endpoint: str | None) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        connect_timeout=5,
        read_timeout=60,
        # Stores other than AWS rarely have a DNS name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.client("s3", endpoint_url=endpoint, config=config)


@dataclass(frozen=True)
class S3Storage(Storage):
    """Objects below a prefix of a bucket."""

    bucket: str
    prefix: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", self.bucket):
            shown = self.bucket.rpartition("@")[2]  # never a key that was put into the URI
            raise StorageError(f"{shown!r} is no bucket name; expected s3://bucket/prefix, keys in the environment")

    @property
    def uri(self) -> str:
        return join_uri(f"s3://{self.bucket}", self.prefix)

    def local_path(self, key: str) -> None:
        return None

    def child(self, key: str) -> "S3Storage":
        return S3Storage(self.bucket, self._object_key(key))

    def _object_key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, checked_key(key).strip("/")) if part)

    def _explained(self, key: str) -> AbstractContextManager[None]:
        return _explained_errors(join_uri(self.uri, key), self.bucket)

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""  # an HTTP range cannot be empty
        whole = not start and end is None
        return self.get(key, {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"})

    def get(self, key: str, arguments: dict[str, str]) -> bytes:
        """The body of a GetObject call with more arguments, such as `Range`."""
        attempts = 0
        with self._explained(key):
            while True:
                answer = _client(_endpoint()).get_object(Bucket=self.bucket, Key=self._object_key(key), **arguments)
                try:
                    return cast("bytes", answer["Body"].read())
                except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError):
                    # botocore retries requests, not bodies that break off.
                    attempts += 1
                    if attempts == _MAX_ATTEMPTS:
                        raise

    def write_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._explained(key):
            try:
                _client(_endpoint()).put_object(Bucket=self.bucket, Key=self._object_key(key), Body=data, **condition)
            except ClientError as error:
                if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                    raise AlreadyExistsError(f"{join_uri(self.uri, key)} exists already") from error
                raise

    def list(self, prefix: str = "") -> Entries:
        root = f"{self.prefix}/" if self.prefix else ""
        with self._explained(prefix):
            pages = _client(_endpoint()).get_paginator("list_objects_v2")
            return [
                Entry(item["Key"].removeprefix(root), item["Size"], item["ETag"].strip('"'))
                for page in pages.paginate(Bucket=self.bucket, Prefix=root + prefix)
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # the "folders" that web consoles make
            ]

    def stat(self, key: str) -> Entry | None:
        # A listing rather than HEAD, whose bare 404 does not tell a missing object from a missing bucket.
        name = self._object_key(key)
        with self._explained(key):
            answer = _client(_endpoint()).list_objects_v2(Bucket=self.bucket, Prefix=name, MaxKeys=1)
        found = [item for item in answer.get("Contents", []) if item["Key"] == name]
        return Entry(key, found[0]["Size"], found[0]["ETag"].strip('"')) if found else None

    def delete(self, key: str) -> None:
        with self._explained(key):
            _client(_endpoint()).delete_object(Bucket=self.bucket, Key=self._object_key(key))

    def open(self, key: str) -> BinaryIO:
        entry = self.stat(key)
        if entry is None:
            raise NotFoundError(f"{join_uri(self.uri, key)} does not exist; check the URI")
        reader = _RangedReader(self, entry)
        return cast("BinaryIO", io.BufferedReader(reader, buffer_size=_READ_BLOCK_BYTES))

    def upload_file(self, source: Path, key: str) -> None:
        with self._explained(key):
            _client(_endpoint()).upload_file(str(source), self.bucket, self._object_key(key))

    def download_file(self, key: str, target: Path) -> None:
        with self._explained(key):
            _client(_endpoint()).download_file(self.bucket, self._object_key(key), str(target))


class _RangedReader(io.RawIOBase):
    """An object read by ranges, all of the version that was there when it was opened."""

    def __init__(self, storage: S3Storage, entry: Entry) -> None:
        self._storage = storage
        self._entry = entry
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._entry.size)
        if end <= self._position:
            return 0
        wanted = {"Range": f"bytes={self._position}-{end - 1}", "IfMatch": f'"{self._entry.version}"'}
        data = self._storage.get(self._entry.key, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextmanager
def _explained_errors(uri: str, bucket: str) -> Iterator[None]:
    try:
        yield
    except S3UploadFailedError as error:  # wraps what went wrong
        raise _explain(uri, bucket, error.__context__) from error
    except (ClientError, BotoCoreError) as error:
        raise _explain(uri, bucket, error) from error


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def _explain(uri: str, bucket: str, error: BaseException | None) -> StorageError:
    host = (_endpoint() or "AWS").rpartition("@")[2]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return StorageError(f"{uri}: {host} cannot be reached; check AWS_ENDPOINT_URL and the network")
    if not isinstance(error, ClientError):
        return StorageError(f"{uri}: the transfer broke off ({type(error).__name__}) each time; run again")
    code = _code(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"{uri}: there is no bucket {bucket!r} at {host}; create it or correct the URI")
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{uri} does not exist; check the URI")
    reason = _REASONS.get(code, "S3 answered {code}; run again, or see the store's own log")
    return StorageError(f"{uri}: {reason.format(code=code)}")
