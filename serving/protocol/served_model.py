"""A served checkpoint as its replica knows it: name, shape, vocabulary and lineage, but no
weights."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.adapters.lora import Adapter
from model.config import Shape, shape_differences
from model.files.checkpoint_folder import (
    ADAPTER_CONFIG,
    Metadata,
    StoredModel,
    read_json,
)
from model.files.hf_config import shape_from_hf
from model.files.stored_tokenizer import load_tokenizer
from model.text.token_bytes import TokenizerError
from model.text.tokenizer import PLAIN_ENCODING, PromptEncoding, Tokenizer
from raymill.errors import CheckpointError
from serving.protocol.errors import ApiError, error_of

_VERSION_CHARS = 16  # of a hash


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint without its weights."""

    name: str
    created: int  # when the checkpoint was written, unix seconds
    config: Shape
    tokenizer: Tokenizer | None  # a folder saved by transformers may have none
    metadata: Metadata | None  # only in raymill's own checkpoints
    version: str  # a hash of the weights
    rank: int = 0  # of an adapter
    # Of its training, where the endpoint asks for signatures
    statement: dict[str, Any] | None = None

    @property
    def base_hash(self) -> str | None:
        """The parameter hash of the weights that an engine is started with: an adapter's base."""
        if self.metadata is None:
            return None
        return self.metadata.base_hash or self.metadata.parameter_hash

    @property
    def eos_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eot_id

    @property
    def is_chat_tuned(self) -> bool:
        """Whether it has a chat template of its own."""
        return self.tokenizer is not None and self.tokenizer.chat is not None

    def prompt_ids(
        self,
        prompt: str | list[int],
        *,
        max_tokens: int,
        param: str = "prompt",
        how: PromptEncoding = PLAIN_ENCODING,
    ) -> list[int]:
        """Returns the tokens of a prompt, the request's field `param`. A text that is empty and
        gets no BOS has the end-of-text token. Raises `ApiError` (400) for ids outside the
        vocabulary and for a prompt that leaves no room for `max_tokens`."""
        if isinstance(prompt, str):
            tokenizer = self.require_tokenizer()
            token_ids = tokenizer.encode_prompt(prompt, how) or [tokenizer.eot_id]
        else:
            token_ids = self.checked_ids(prompt, param=param)
        if len(token_ids) + max_tokens > self.config.n_positions:
            raise error_of(
                "context_length_exceeded",
                param="max_tokens" if len(token_ids) < self.config.n_positions else param,
                context_tokens=self.config.n_positions,
                requested_tokens=len(token_ids) + max_tokens,
                prompt_tokens=len(token_ids),
                prompt_field=param,
                max_tokens=max_tokens,
            )
        return token_ids

    def checked_ids(self, token_ids: list[int], *, param: str) -> list[int]:
        for token_id in token_ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise ApiError(
                    f"{param}: {token_id} is not a token id of this model; expected 0 to {self.config.vocab_size - 1}",
                    param=param,
                    code="invalid_value",
                )
        return token_ids

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise error_of("no_tokenizer", param="prompt", name=self.name)
        return self.tokenizer

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """Returns what a token adds to a text, perhaps as its first; nothing for an id that the
        tokenizer lacks, since a model's vocabulary may be padded."""
        if self.tokenizer is None:
            return b""
        bytes_of = self.tokenizer.first_bytes if is_first else self.tokenizer.token_bytes
        try:
            return bytes_of(token_id)
        except TokenizerError:
            return b""

    def text_bytes(
        self, token_id: int, *, stop: Sequence[str] = (), is_first: bool = False
    ) -> bytes:
        """Returns what a drawn token adds to a text: nothing if it is a special one, unless it is a
        stop string or a tool's mark."""
        if not is_first and (known := self._plain_bytes.get(token_id)) is not None:
            return known
        token = self.token_bytes(token_id, is_first=is_first)
        if token_id in self._special_ids:
            return token if token.decode() in stop else b""
        if not is_first:
            self._plain_bytes[token_id] = token
            with suppress(UnicodeDecodeError):  # a part of a character
                self.plain_texts[token_id] = token.decode()
        return token

    def has_text(self, token_ids: Sequence[int]) -> bool:
        """Whether there is more among the tokens than special ones."""
        return not self._special_ids.issuperset(token_ids)

    @cached_property
    def _plain_bytes(self) -> dict[int, bytes]:
        """Of tokens that are not special, as `text_bytes` has come to know them."""
        return {}

    @cached_property
    def plain_texts(self) -> dict[int, str]:
        """The tokens that are whole characters, as texts."""
        return {}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return (
            frozenset()
            if self.tokenizer is None
            else frozenset(self.tokenizer.special_ids.values())
        )

    def token_name(self, token_id: int) -> str:
        """Returns a token's name in log-probabilities: its text, its bytes if they are not whole
        characters, or its id."""
        if not (token := self.token_bytes(token_id)):
            return f"token_id:{token_id}"
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    def card(self) -> dict[str, Any]:
        """Returns the entry under /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "raymill",
            "max_model_len": self.config.n_positions,
            "version": self.version,
            "chat_tuned": self.is_chat_tuned,
            "lineage": self.lineage,
            **({"statement": self.statement} if self.statement else {}),
        }

    @property
    def lineage(self) -> dict[str, Any] | None:
        """The run, step, data, tokenizer and code; None for a checkpoint that is not raymill's
        own."""
        if self.metadata is None:
            return None
        tokenizer_hash = None if self.tokenizer is None else self.tokenizer.hash
        return self.metadata.fields | {"tokenizer_hash": tokenizer_hash}


def read_served_model(
    folder: Path, *, name: str | None, max_context: int | None = None
) -> ServedModel:
    """Reads a folder. With `max_context` the model is known by this shorter context. Raises
    `CheckpointError` if it cannot be served, and `UnsupportedModelError` for another model."""
    config_file = folder / "config.json"
    config = shape_from_hf(json.loads(config_file.read_bytes()))
    stored, rank = StoredModel(folder), 0
    if stored.is_adapter:
        rank = Adapter.from_peft(read_json(folder / ADAPTER_CONFIG)).rank
    if max_context is not None:
        config = config.with_context(max_context)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}: "
            "they do not belong together"
        )
    metadata = stored.metadata
    version = (
        _files_version(sorted(folder.glob("*.safetensors")))
        if metadata is None
        else version_of_weights(metadata)
    )
    return ServedModel(
        name=name or (folder.name if metadata is None else metadata.run_id),
        created=int(config_file.stat().st_mtime),
        config=config,
        tokenizer=tokenizer,
        metadata=metadata,
        version=version,
        rank=rank,
    )


def misfit(live: ServedModel, candidate: ServedModel) -> str:
    """Returns why clients would notice if `candidate` replaced `live`; empty if they would not."""
    if candidate.version == live.version:
        return f"has the weights that are served now ({live.version})"
    if (size := candidate.config.vocab_size) != live.config.vocab_size:
        return f"has a vocabulary of {size} ids, the live version one of {live.config.vocab_size}"
    hashes = [
        None if model.tokenizer is None else model.tokenizer.hash for model in (live, candidate)
    ]
    if hashes[0] != hashes[1]:
        named = ["none" if found is None else found[:12] for found in hashes]
        return f"has another tokenizer ({named[1]}) than the live version ({named[0]})"
    if candidate.config.n_positions < live.config.n_positions:
        return f"has a context of {candidate.config.n_positions} tokens, the live version {live.config.n_positions}"
    return ""


def is_of_one_kind(one: ServedModel, other: ServedModel) -> bool:
    """Returns whether an engine that was started with `one` computes `other` once it has its
    weights."""
    of_training_only = {"dropout", "initializer_range"}
    if shape_differences(one.config, other.config).keys() - of_training_only:
        return False

    def kind(model: ServedModel) -> tuple[Any, ...]:
        return model.eos_id, model.metadata and model.metadata.precision

    return kind(one) == kind(other)


def version_of_weights(metadata: Metadata) -> str:
    """Returns the version by which a replica knows a checkpoint's weights."""
    return str(metadata.parameter_hash)[:_VERSION_CHARS]


def _files_version(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:_VERSION_CHARS]
