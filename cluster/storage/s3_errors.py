"""Errors of S3 and botocore as one line that names the URI and the remedy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from cluster.storage.interface import NotFoundError, StorageError

REFUSED_CONDITION = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
MISSING_KEY = ("NoSuchKey", "404")

_DENIED = "access denied ({code}); check the credentials and the bucket's policy"
_UNKNOWN_KEY = "the store does not know this access key ({code}); check AWS_ACCESS_KEY_ID, or the profile"
_OTHER_PAIR = "the secret key does not fit the access key ({code}); check AWS_SECRET_ACCESS_KEY, or the profile"
_EXPIRED = "the session token is expired or invalid ({code}); get new credentials"
_ELSEWHERE = "the bucket lies in another region ({code}); set AWS_DEFAULT_REGION to it"
_CLOCK = "refused because this machine's clock is wrong ({code}); set it"
_CHANGED = "the object changed while it was read; run again once nobody writes to it"
_BUSY = "the store is overloaded ({code}) and stayed so; run again later or with fewer workers"
_WORDLESS = "what answers does not speak as S3 does ({code}); check AWS_ENDPOINT_URL, or run again later"
_REASONS = {
    **dict.fromkeys(("403", "AccessDenied", "AllAccessDisabled"), _DENIED),
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": _OTHER_PAIR,
    "NotImplemented": "the store lacks something that raymill needs ({code}), such as conditional writes; use another",
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IncorrectEndpoint"), _ELSEWHERE),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), _CLOCK),
    **dict.fromkeys(REFUSED_CONDITION, _CHANGED),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "503"), _BUSY),
    "500": _WORDLESS,
}

_BROKEN = "the transfer broke off ({name}) each time; run again"
_FAILURES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    (
        (NoCredentialsError, PartialCredentialsError),
        "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    ),
    ((SSLError,), "no TLS with {host}; check its certificate, AWS_CA_BUNDLE, and http or https"),
    (
        (EndpointConnectionError, ConnectTimeoutError),
        "{host} cannot be reached; check AWS_ENDPOINT_URL and the network",
    ),
    ((ResponseParserError,), "what answers at {host} is no S3; check AWS_ENDPOINT_URL"),
)
"""Failures before S3 had an answer."""


def endpoint() -> str | None:
    """Returns S3's address from the environment; None means AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def code_of(error: ClientError) -> str:
    """Returns S3's own word for the error, or the status of an answer without a body."""
    return str(error.response["Error"]["Code"])


@contextmanager
def explained_errors(uri: str, bucket: str) -> Iterator[None]:
    """Raises `StorageError` and `NotFoundError` for what boto3 raises in the block."""
    try:
        yield
    except S3UploadFailedError as error:  # wraps the cause
        raise _explain(uri, bucket, error.__context__) from error
    except (ClientError, BotoCoreError, ResponseParserError) as error:
        raise _explain(uri, bucket, error) from error


def _explain(uri: str, bucket: str, error: BaseException | None) -> StorageError:
    host = (endpoint() or "AWS").rpartition("@")[2]
    if not isinstance(error, ClientError):
        name = type(error).__name__
        texts = (text for kinds, text in _FAILURES if isinstance(error, kinds))
        return StorageError(f"{uri}: {next(texts, _BROKEN).format(host=host, name=name)}")
    code = code_of(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"{uri}: there is no bucket {bucket!r} at {host}; create it or correct the URI")
    if code in MISSING_KEY:
        return NotFoundError(f"{uri} does not exist; check the URI")
    reason = _REASONS.get(code, "S3 answered {code}; run again, or see the store's own log")
    return StorageError(f"{uri}: {reason.format(code=code)}")
