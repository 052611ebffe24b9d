"""Copies a checkpoint without its training state: a smaller checkpoint, and a folder that
transformers reads, or one GGUF file."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.storage.bases import find_base
from cluster.storage.registry import find_checkpoint, resolve_checkpoint
from cluster.storage.uris import Storage, absolute_uri, open_storage, split_uri
from jobs.publishing.bom import FILE as BOM
from jobs.publishing.bom import bill_of_materials
from jobs.run.training_statement import training_of
from model.config import Shape
from model.files.bounded_text import require_bounded_text
from model.files.checkpoint import (
    load_decoder,
    stored_weights,
    write_checkpoint,
)
from model.files.checkpoint_folder import (
    MANIFEST,
    Metadata,
    StoredModel,
    fingerprint,
    verify_checkpoint,
)
from model.files.gguf_file import write_gguf
from model.files.hf_config import read_shape
from model.files.stored_tokenizer import load_tokenizer
from model.signing.signature import SigningKey, sign
from raymill.errors import CheckpointError


def export_gguf(checkpoint: str, destination: str, *, storage_uri: str) -> dict[str, Any]:
    """Writes the verified checkpoint's model and tokenizer as one GGUF file, local or remote.

    Raises `CheckpointError`, or `GgufError` for what such a file does not hold.
    """
    if not destination.endswith(".gguf"):
        raise CheckpointError(f"{destination}: expected the name of a file that ends in .gguf")
    parent, name = split_uri(destination)
    if parent.exists(name):
        raise CheckpointError(f"{destination} exists; name a new file")
    source = resolve_checkpoint(checkpoint, storage_uri)
    require_bounded_text(source)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(f"{source} has no tokenizer.json, which a GGUF file needs")
    base = find_base(source, storage_uri)
    model = load_decoder(source, base=base, verify=False)  # `resolve_checkpoint` has verified it
    with tempfile.TemporaryDirectory(prefix="raymill-export-") as scratch:
        file = Path(scratch) / name
        written = write_gguf(
            file,
            name=name.removesuffix(".gguf"),
            shape=model.config,
            weights=dict(model.named_parameters()),
            tokenizer=tokenizer,
        )
        sha256 = fingerprint(file)["sha256"]
        parent.upload_file(file, name)
    metadata = StoredModel(source).metadata
    return {
        "file": absolute_uri(destination),
        "parameter_hash": metadata and metadata.parameter_hash,
        "sha256": sha256,
        **written,
    }


def _merged(adapter: Path, storage_uri: str) -> tuple[Shape, dict[str, Tensor]]:
    """Returns the shape of an adapter's base, and its weights with the adapter."""
    model = load_decoder(adapter, base=find_base(adapter, storage_uri), verify=False)
    return model.config, {name: values.detach() for name, values in model.named_parameters()}


def _require_free(target: Storage) -> None:
    local = target.local_path("")
    occupied = (
        target.list()
        if local is None
        else local.is_file() or (local.is_dir() and any(local.iterdir()))
    )
    if occupied:
        raise CheckpointError(f"{target.uri} exists and is not empty; name a new folder")


def _require_valid(copy: Path, copied: Metadata, wanted: Metadata | None, *, source: Path) -> None:
    problems = verify_checkpoint(copy)
    if wanted and copied != wanted:
        problems.append(
            f"its weights have the hash {copied.parameter_hash}, {source} records {wanted.parameter_hash}"
        )
    if problems:
        raise CheckpointError(f"the copy {copy} is not valid: {'; '.join(problems)}; export again")


def _add_proofs(
    copy: Path,
    shape: Shape,
    metadata: Metadata,
    training: dict[str, Any],
    *,
    key: SigningKey | None,
    has_bom: bool,
) -> None:
    if has_bom:
        bom = bill_of_materials(copy, shape=shape, metadata=metadata, training=training)
        (copy / BOM).write_text(bom, encoding="utf-8")
    if key:
        sign(copy, key, training)


def export(
    checkpoint: str,
    destination: str,
    *,
    storage_uri: str,
    merge: bool = False,
    is_public: bool = False,
    key: SigningKey | None = None,
    has_bom: bool = False,
) -> dict[str, Any]:
    """Writes the verified checkpoint to a new or empty folder, local or remote, and verifies the
    copy. An adapter stays one, which PEFT loads, unless `merge` adds it to its base's weights. What
    is public names no place of one's own. With a key the copy is signed, and `has_bom` adds its
    bill of materials. An adapter's result has the `base` for PEFT; None where strangers find none.

    Raises `CheckpointError`.
    """
    target = open_storage(destination)
    local = target.local_path("")
    _require_free(target)
    uri, source = find_checkpoint(checkpoint, storage_uri)
    metadata = StoredModel(source).metadata
    if metadata is None:
        raise CheckpointError(f"{source} is a plain Hugging Face folder already; copy it as it is")
    require_bounded_text(source)
    if merge and not StoredModel(source).is_adapter:
        raise CheckpointError(
            f"{source} is a whole model, and --merge is for adapters: leave it out"
        )
    with tempfile.TemporaryDirectory(prefix="raymill-export-") as scratch:
        folder = local or Path(scratch) / "checkpoint"
        tokenizer = load_tokenizer(source)
        assert tokenizer is not None, "only plain Hugging Face folders may lack one"
        metadata = metadata.public if is_public else metadata
        shape, weights = read_shape(source), stored_weights(source)
        if merge:
            shape, weights = _merged(source, storage_uri)
            metadata = metadata.merged
        copied = write_checkpoint(
            folder,
            config=shape,
            state=weights,
            tokenizer=tokenizer,
            metadata=metadata,
            train_state=None,
        )
        _require_valid(folder, copied, None if merge else metadata, source=source)
        if key or has_bom:
            training = training_of(uri, source)
            _add_proofs(folder, shape, copied, training, key=key, has_bom=has_bom)
        if local is None:
            parent, name = split_uri(destination)
            parent.upload_folder(folder, name, last=MANIFEST)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        base = {"base": copied.base_source or copied.base} if shape.adapter else {}
    return {
        "checkpoint": absolute_uri(destination),
        "parameter_hash": copied.parameter_hash,
        "files": files,
    } | base
