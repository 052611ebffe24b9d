"""Asks a time stamp authority when a signature was there, and checks what it answered (RFC 3161)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from model.signing.optional import library
from raymill.errors import UserError

QUERY_TYPE = "application/timestamp-query"
MAX_ANSWER_BYTES = 1 << 20  # a stamp with its certificates has 2 to 8 kB
TIMEOUT_S = 30
CLOCK_TOLERANCE = timedelta(minutes=5)
MAX_STAMPS = 32
"""The most stamps of a signature, as for Sigstore's own verifiers: each costs an RSA operation."""
_OTHER_ORDER = "InvalidSetOrdering"  # in the library's errors
_REASON = re.compile(r'data: "([^"]+)"')  # in a stack of OpenSSL's errors


class TimeStampError(UserError):
    """A signature has no time stamp that counts; the text continues the signature's name."""


def request_stamp(signature: bytes, url: str, *, with_certificates: bool = True) -> bytes:
    """Returns the answer of an authority (a TimeStampResp in DER), once it is about this signature
    and of now. Whether the authority may be trusted is for those who verify. Raises `UserError`.

    An authority that sends its certificates in another order than DER's is asked again without
    them: neither the library nor Sigstore's verifiers read the first answer.
    """
    tsp = library("rfc3161_client")
    sha256 = tsp.HashAlgorithm.SHA256
    builder = tsp.TimestampRequestBuilder(
        data=signature, hash_algorithm=sha256, cert_req=with_certificates
    )
    query = builder.build()
    answer = _asked(url, query.as_bytes())
    try:
        stamp = tsp.decode_timestamp_response(answer)
        if stamp.status != tsp.PKIStatus.GRANTED:
            raise _unusable(
                url, f"refused (status {stamp.status}: {', '.join(stamp.status_string)})"
            )
        info = stamp.tst_info
    except ValueError as error:
        if with_certificates and _OTHER_ORDER in str(error):
            return request_stamp(signature, url, with_certificates=False)
        raise _unusable(url, f"answered with what is no time stamp ({error})") from None
    is_of_query = info.message_imprint.message == query.message_imprint.message
    if info.nonce != query.nonce or not is_of_query:
        raise _unusable(
            url, "answered with the time stamp of another request, perhaps a former one"
        )
    now = datetime.now(UTC)
    if abs(info.gen_time - now) > CLOCK_TOLERANCE:
        raise UserError(
            f"{url} stamps {info.gen_time:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}: "
            "set the clock, or name another time stamp authority; nothing was signed"
        )
    return answer


def _asked(url: str, query: bytes) -> bytes:
    httpx = library("httpx")
    try:
        asking = httpx.stream(
            "POST", url, content=query, headers={"Content-Type": QUERY_TYPE}, timeout=TIMEOUT_S
        )
        with asking as response:
            if response.status_code != httpx.codes.OK:
                raise _unusable(url, f"answered with HTTP {response.status_code}")
            answer = b""
            for piece in response.iter_bytes():
                answer += piece
                if len(answer) > MAX_ANSWER_BYTES:
                    raise _unusable(url, f"answered with over {MAX_ANSWER_BYTES:,} bytes")
            return answer
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unusable(url, f"cannot be asked ({error or type(error).__name__})") from None


def _unusable(url: str, what: str) -> UserError:
    return UserError(
        f"{url} {what}: expected the URL of a time stamp authority (RFC 3161) that can be reached from here; "
        "nothing was signed"
    )


def stamped_time(stamps: Sequence[bytes], signature: bytes, authority: Path) -> datetime:
    """Returns when the signature was there at the latest: the earliest time that was stamped by an
    authority below a root certificate in the PEM file `authority`.

    Raises `TimeStampError`, and `UserError` for a file without certificates.
    """
    trusted = _Authorities.in_file(authority)
    if not stamps:
        raise TimeStampError(
            "has no time stamp: sign again with --timestamp, or verify it without an authority"
        )
    if len(stamps) > MAX_STAMPS:
        raise TimeStampError(f"has {len(stamps)} time stamps: expected at most {MAX_STAMPS}")
    times: list[datetime] = []
    problems: list[TimeStampError] = []
    for stamp in stamps:
        try:
            times.append(_time_of(stamp, signature, trusted))
        except TimeStampError as problem:
            problems.append(problem)
    if not times:
        raise problems[0]
    return min(times)


def _time_of(stamp: bytes, signature: bytes, trusted: "_Authorities") -> datetime:
    tsp = library("rfc3161_client")
    try:
        answer = tsp.decode_timestamp_response(stamp)
        trusted.verifier(answer).verify_message(answer, signature)
        time: datetime = answer.tst_info.gen_time
    except tsp.VerificationError as error:
        if "Mismatch between messages" in str(error):
            raise TimeStampError("has the time stamp of another signature: sign again") from None
        reason = _REASON.search(str(error))
        raise TimeStampError(
            f"has a time stamp that no authority in {trusted.file} made, or that was altered "
            f"({reason[1] if reason else error}): name the file with its root certificate"
        ) from None
    except ValueError as error:
        raise TimeStampError(
            f"has a time stamp that cannot be read ({error}): sign again"
        ) from None
    if time > datetime.now(UTC) + CLOCK_TOLERANCE:
        raise TimeStampError(
            f"has a time stamp of {time:%Y-%m-%d %H:%M} UTC, which is still to come by this machine's clock: set it, "
            "or sign again"
        )
    return time


@dataclass(frozen=True)
class _Authorities:
    """The certificates in a file: roots, and those that they may lead to."""

    file: Path
    roots: list[Any]
    others: list[Any]

    @classmethod
    def in_file(cls, file: Path) -> Self:
        """Raises `UserError` for a file without a root certificate."""
        try:
            certificates = library("cryptography.x509").load_pem_x509_certificates(
                file.read_bytes()
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} has no certificates of a time stamp authority: expected a PEM file with its root certificate, "
                f"and those between ({error})"
            ) from None
        roots = [known for known in certificates if known.issuer == known.subject]
        if not roots:
            raise UserError(
                f"{file} has no root certificate, which is its own issuer: add that of the time stamp authority"
            )
        return cls(file, roots, [known for known in certificates if known not in roots])

    def verifier(self, answer: Any) -> Any:
        """Returns what verifies an answer. One without certificates was signed by one of the file.
        Raises `TimeStampError` where that lacks it."""
        leaf = None if answer.signed_data.certificates else self._signer(answer)
        builder = library("rfc3161_client").VerifierBuilder(
            roots=self.roots, intermediates=self.others, tsa_certificate=leaf
        )
        return builder.build()

    def _signer(self, answer: Any) -> Any:
        named = {(info.issuer, info.serial_number) for info in answer.signed_data.signer_infos}
        for certificate in self.others:
            if (certificate.issuer, certificate.serial_number) in named:
                return certificate
        raise TimeStampError(
            f"has a time stamp that does not show its authority's own certificate: add that to {self.file}"
        )
