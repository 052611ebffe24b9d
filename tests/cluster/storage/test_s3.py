"""Reading from S3 through a proxy that misbehaves: the bytes come back whole, or one line says what
to do."""

from pathlib import Path

import boto3
import pytest

from cluster.storage import s3
from cluster.storage.uris import NotFoundError, StorageError, open_storage
from tests.cluster.fault_proxy import Altered, Cut, FaultProxy, Refused

DATA = bytes(range(251)) * 5000  # 1.2 MiB
KIB = 1 << 10


@pytest.fixture
def uri(proxy: FaultProxy, s3_bucket: str) -> str:
    open_storage(f"s3://{s3_bucket}").write_bytes("file", DATA)
    return f"s3://{s3_bucket}"


@pytest.mark.parametrize("kind", ["closed", "reset"])
def test_a_body_that_breaks_off_is_continued(proxy: FaultProxy, uri: str, kind: str) -> None:
    proxy.script = [Cut(600 * KIB, kind), Cut(300 * KIB, kind)]
    assert open_storage(uri).read_bytes("file") == DATA
    assert len(proxy.ranges) == 3
    if kind == "closed":  # a reset may take bytes along that were on their way
        assert proxy.ranges == [None, f"bytes={600 * KIB}-", f"bytes={900 * KIB}-"]
    proxy.script = [Cut(600 * KIB, kind)]
    with open_storage(uri).open("file") as file:
        file.seek(1000)
        assert file.read(900_000) == DATA[1000:901_000]


def test_a_range_answered_short_is_continued(proxy: FaultProxy, uri: str) -> None:
    proxy.script = [Cut(100, "lied"), Cut(200, "lied")]
    assert open_storage(uri).read_bytes("file", start=10, end=1010) == DATA[10:1010]
    assert proxy.ranges == ["bytes=10-1009", "bytes=110-1009", "bytes=310-1009"]


def test_a_body_that_always_breaks_off_ends_in_one_line(proxy: FaultProxy, uri: str) -> None:
    proxy.script = [Cut(5)] * 9
    with pytest.raises(
        StorageError, match=f"{uri}/file: the transfer broke off 4 times; run again"
    ):
        open_storage(uri).read_bytes("file")
    assert proxy.ranges == [None, "bytes=5-", "bytes=10-", "bytes=15-"]


WRONG_BYTES = (Altered(0), Altered(len(DATA) - 1), Cut(600 * KIB, "lied"), Cut(0, "lied"))
WRONG_CHECKSUM = r"file: what arrived does not match the object's checksum .*; run again, and write"


@pytest.mark.parametrize("fault", WRONG_BYTES, ids=str)
def test_a_body_that_does_not_match_its_checksum_is_read_again(
    proxy: FaultProxy, uri: str, fault: Altered | Cut, tmp_path: Path
) -> None:
    storage = open_storage(uri)
    proxy.script = [fault] * 3
    assert storage.read_bytes("file") == DATA
    assert proxy.ranges == [None] * 4, "none of the bytes that arrived is kept"
    proxy.script = [None, fault] * 3  # each download asks for the size first
    storage.download_file("file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert proxy.ranges == [None] * 8


def test_a_body_whose_checksum_stays_wrong_ends_in_one_line(
    proxy: FaultProxy, uri: str, tmp_path: Path
) -> None:
    storage = open_storage(uri)
    proxy.script = [Altered(KIB)] * 9
    with pytest.raises(StorageError, match=WRONG_CHECKSUM):
        storage.read_bytes("file")
    assert len(proxy.ranges) == 4
    proxy.script = [None, Altered(KIB)] * 9
    with pytest.raises(StorageError, match=WRONG_CHECKSUM):
        storage.download_file("file", tmp_path / "copy")
    assert len(proxy.ranges) == 8
    assert not (tmp_path / "copy").exists()


def test_a_download_that_always_breaks_off_ends_in_one_line(
    proxy: FaultProxy, uri: str, tmp_path: Path
) -> None:
    proxy.script = [None] + [Cut(5)] * 9
    with pytest.raises(StorageError, match=r"file: the transfer broke off \(.*\) each time"):
        open_storage(uri).download_file("file", tmp_path / "copy")
    assert len(proxy.ranges) == 5


def test_a_refusal_that_breaks_off_ends_in_one_line(proxy: FaultProxy, uri: str) -> None:
    """botocore reads such an answer after its own handling of errors: that of its HTTP library
    comes through, unless the reset overtakes the whole answer, which is then asked for again."""
    found = set()
    for _ in range(20):
        proxy.script = [Cut(50, "reset")]
        with pytest.raises(StorageError) as caught:
            open_storage(uri).read_bytes("missing")
        found.add(str(caught.value).removeprefix(f"{uri}/missing"))
    assert found <= {
        ": an answer broke off (ProtocolError); run again",
        " does not exist; check the URI",
    }


def test_an_object_replaced_between_two_attempts_is_noticed(proxy: FaultProxy, uri: str) -> None:
    storage = open_storage(uri)
    with storage.open("file") as file:
        storage.write_bytes("file", DATA[::-1])
        proxy.script = [Cut(600 * KIB)]
        with pytest.raises(
            StorageError, match=f"{uri}/file was changed or removed by another process"
        ):
            file.read()


def test_overload_is_waited_out_and_named_when_it_stays(proxy: FaultProxy, uri: str) -> None:
    proxy.script = [Refused(503, "SlowDown"), Refused(503, "SlowDown")]
    assert open_storage(uri).read_bytes("file") == DATA
    proxy.script = [Refused(503, "SlowDown")] * 9
    with pytest.raises(
        StorageError, match=r"overloaded \(SlowDown\) and stayed so; run again later"
    ):
        open_storage(uri).read_bytes("file")


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (404, "NoSuchBucket", r"there is no bucket '.*' at http://.*; create it"),
        (403, "AccessDenied", r"access denied \(AccessDenied\); check the credentials"),
        (
            403,
            "InvalidAccessKeyId",
            r"does not know this access key \(InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID",
        ),
        (403, "SignatureDoesNotMatch", r"secret key does not fit .*; check AWS_SECRET_ACCESS_KEY"),
        (501, "NotImplemented", r"the store lacks something .* conditional writes; use another"),
        (
            400,
            "ExpiredToken",
            r"the session token is expired or invalid \(ExpiredToken\); get new credentials",
        ),
        (403, "RequestTimeTooSkewed", "clock is wrong .*; set it"),
        (301, "PermanentRedirect", "the bucket lies in another region .*; set AWS_DEFAULT_REGION"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "the bucket lies in another region .*; set AWS_DEFAULT_REGION",
        ),
        (418, "Teapot", "S3 answered Teapot; run again, or see the store's own log"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(
    proxy: FaultProxy, uri: str, status: int, code: str, text: str
) -> None:
    proxy.script = [Refused(status, code)] * 9
    with pytest.raises(StorageError, match=text) as caught:
        open_storage(uri).read_bytes("file")
    assert str(caught.value).startswith(f"{uri}/file: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, NotFoundError) == (code == "NoSuchBucket")


def test_uploads_that_may_not_be_listed_stay_and_stop_nothing(
    proxy: FaultProxy, uri: str, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket=s3_bucket, Key="begun")
    refused = Refused(403, "AccessDenied")
    proxy.spoil = lambda method, path: refused if path.startswith(f"/{s3_bucket}?uploads") else None
    open_storage(uri).abort_uploads()
    proxy.spoil = None
    assert "allow s3:ListBucketMultipartUploads" in caplog.text
    assert len(client.list_multipart_uploads(Bucket=s3_bucket)["Uploads"]) == 1
    open_storage(uri).abort_uploads()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3_bucket)


def test_a_proxy_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, s3_bucket: str
) -> None:
    """botocore says of it only that a connection failed."""
    monkeypatch.setattr(s3, "_MAX_ATTEMPTS", 1)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example")
    with pytest.raises(
        StorageError, match="the proxy that HTTPS_PROXY or HTTP_PROXY names does not answer"
    ):
        open_storage(f"s3://{s3_bucket}").list()
