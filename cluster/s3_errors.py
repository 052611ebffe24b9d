"""What S3 and botocore complain about, as one line that names the URI and the remedy."""

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
)

from cluster.storage_interface import NotFoundError, StorageError

REFUSED_CONDITION = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
MISSING_KEY = ("NoSuchKey", "404")

_DENIED = "access denied ({code}); check the credentials and the bucket's policy"
_EXPIRED = "the session token is expired or invalid ({code}); get new credentials"
_ELSEWHERE = "the bucket lies in another region ({code}); set AWS_DEFAULT_REGION to it"
_CLOCK = "refused because this machine's clock is wrong ({code}); set it"
_CHANGED = "the object changed while it was read; run again once nobody writes to it"
_BUSY = "the store is overloaded ({code}) and stayed so; run again later or with fewer workers"
_REASONS = {
    **dict.fromkeys(
        ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"), _DENIED
    ),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IncorrectEndpoint"), _ELSEWHERE),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), _CLOCK),
    **dict.fromkeys(REFUSED_CONDITION, _CHANGED),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "500", "503"), _BUSY),
}


def endpoint() -> str | None:
    """Of S3, from the environment; None is AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def code_of(error: ClientError) -> str:
    """S3's own word for it, or the status of an answer without a body."""
    return str(error.response["Error"]["Code"])


@contextmanager
def explained_errors(uri: str, bucket: str) -> Iterator[None]:
    """Raises `StorageError` and `NotFoundError` in place of what boto3 raises in the block."""
    try:
        yield
    except S3UploadFailedError as error:  # wraps what went wrong
        raise _explain(uri, bucket, error.__context__) from error
    except (ClientError, BotoCoreError) as error:
        raise _explain(uri, bucket, error) from error


def _explain(uri: str, bucket: str, error: BaseException | None) -> StorageError:
    host = (endpoint() or "AWS").rpartition("@")[2]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return StorageError(f"{uri}: {host} cannot be reached; check AWS_ENDPOINT_URL and the network")
    if not isinstance(error, ClientError):
        return StorageError(f"{uri}: the transfer broke off ({type(error).__name__}) each time; run again")
    code = code_of(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"{uri}: there is no bucket {bucket!r} at {host}; create it or correct the URI")
    if code in MISSING_KEY:
        return NotFoundError(f"{uri} does not exist; check the URI")
    reason = _REASONS.get(code, "S3 answered {code}; run again, or see the store's own log")
    return StorageError(f"{uri}: {reason.format(code=code)}")
