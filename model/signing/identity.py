"""Signs as an identity at an identity provider, without a key of one's own, and checks such
signatures, by Sigstore: an authority certifies the identity of a token for ten minutes, a log that
everybody can read keeps the signature, and an authority stamps its time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from model.signing.floor import NO_FLOOR, Floor
from model.signing.optional import library
from raymill.errors import UserError

_FIELDS = {"identity", "identity_provider", "trust_config"}


class IdentityError(UserError):
    """No trusted identity has made a signature; the text continues the signature's name."""


@dataclass(frozen=True)
class SigningIdentity:
    """Somebody, or a job, to whom an identity provider gives tokens."""

    token: Path | None = None  # a file with one; what the CI lends a job where it is None
    trust_config: Path | None = None  # of a private Sigstore instance; the public one if None

    def signing(self, config: Any) -> Any:
        """Returns the library's settings with this signer. Raises `UserError`."""
        return config.use_sigstore_signer(
            identity_token=self._token(), trust_config=_readable(self.trust_config)
        )

    def _token(self) -> str:
        if self.token is None:
            lent: str | None = library("sigstore.oidc").detect_credential()
            if lent is None:
                raise UserError(
                    "nobody lends this process an identity: name a file with a token of your identity provider with "
                    "--identity-token, or sign in a job of a CI that lends one, such as GitHub Actions"
                )
            return lent
        try:
            return self.token.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.token}: expected a file with an identity token ({error})"
            ) from None


@contextmanager
def failures_named() -> Iterator[None]:
    """Raises `UserError` for what Sigstore's parts refuse, or where they are away."""
    oidc = library("sigstore.oidc")
    failures = (
        library("sigstore.errors").Error,
        oidc.IssuerError,
        oidc.ExpiredIdentity,
        library("sigstore._internal.fulcio.client").FulcioClientError,
        library("sigstore._internal.rekor").RekorClientError,
        library("requests").RequestException,
    )
    try:
        yield
    except failures as error:
        raise UserError(
            f"Sigstore gives no signature ({_reason(error)}): expected a token that holds, with the audience sigstore, "
            "and an instance that can be reached (--trust-config names a private one); nothing was signed"
        ) from None


def _reason(error: BaseException) -> str:
    """Returns what failed: some of these errors say it in their cause alone."""
    return str(error) or str(error.__cause__ or "") or type(error).__name__


def _readable(trust_config: Path | None) -> Path | None:
    """Returns the same file. Raises `UserError` for one that is no trust configuration."""
    if trust_config is None:
        return None
    try:
        library("sigstore.models").ClientTrustConfig.from_json(trust_config.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{trust_config} is no trust configuration of a Sigstore instance: expected the file (JSON) that its "
            f"operator gives clients ({str(error).splitlines()[0]})"
        ) from None
    return trust_config


@dataclass(frozen=True)
class TrustedIdentity:
    """An identity whose signatures count."""

    name: str  # such as an address, or a workflow's URL
    provider: str  # the URL of the identity provider that vouches for it
    trust_config: Path | None = None
    floor: Floor = NO_FLOOR  # below which its signatures do not count

    @classmethod
    def in_file(cls, file: Path) -> Self | None:
        """Returns the identity that a file of JSON names; None for another file, or none. Raises
        `UserError` for JSON that names no identity."""
        if not file.is_file() or not (content := file.read_bytes()).lstrip().startswith(b"{"):
            return None
        try:
            fields = json.loads(content)
            name, provider = fields["identity"], fields["identity_provider"]
            config = fields.get("trust_config", "")
            texts = (name, provider, config)
            if fields.keys() - _FIELDS or not all(isinstance(text, str) for text in texts):
                raise ValueError("other fields, or other values than text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} names no identity: expected JSON with identity, identity_provider (a URL) and, for a private "
                f"Sigstore instance, trust_config, a file beside it ({error})"
            ) from None
        return cls(name, provider, file.parent / config if config else None)

    @property
    def shown(self) -> str:
        return f"{self.name} at {self.provider}"

    def verifying(self, config: Any) -> Any:
        """Returns the library's settings that verify such signatures. Raises `UserError`."""
        trust_config = _readable(self.trust_config)
        try:
            return config.use_sigstore_verifier(
                identity=self.name, oidc_issuer=self.provider, trust_config=trust_config
            )
        except library("sigstore.errors").Error as error:
            raise UserError(
                f"what Sigstore's public instance is trusted by cannot be fetched ({_reason(error)}): run again where "
                "it is reached, or name a private instance's with trust_config"
            ) from None

    def payload(self, verifying: Any, path: Path) -> bytes:
        """Returns what a bundle signs, once this identity has signed it, and the log has it. Raises
        `IdentityError`."""
        try:
            signature = library("model_signing._signing.sign_sigstore").Signature.read(path)
            _, content = verifying._verifier._verify_signed_content(signature)
        except library("sigstore.errors").Error as error:
            raise IdentityError(f"was not signed by {self.shown} ({_reason(error)})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IdentityError(f"is no signature ({type(error).__name__})") from None
        signed: bytes = content
        return signed
