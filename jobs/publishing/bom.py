"""Writes a checkpoint's bill of materials: a CycloneDX document with the model, its files and
parameters, and what it was trained from (cyclonedx.org, ML-BOM)."""

import importlib
from pathlib import Path
from typing import Any

from model.config import Shape
from model.files.checkpoint_folder import Metadata, manifest_files
from model.tables import pip_line
from raymill.errors import UserError

FILE = "bom.cdx.json"


def bill_of_materials(
    folder: Path, *, shape: Shape, metadata: Metadata, training: dict[str, Any]
) -> str:
    """Returns the document of the checkpoint in a folder; `training` is what `training_of` states.
    Raises `UserError` where the library is not installed."""
    component, document, output = (
        _library(f"cyclonedx.{name}") for name in ("model.component", "model.bom", "output.json")
    )
    bom = document.Bom()
    kinds = component.ComponentType
    model = component.Component(
        name=metadata.run_id,
        version=f"step {metadata.step}",
        type=kinds.MACHINE_LEARNING_MODEL,
        hashes=[_sha256(metadata.parameter_hash)] if metadata.parameter_hash else [],
        description="The hash is that of the parameters, as raymill reckons it",
        properties=_properties(shape, metadata),
    )
    for name, entry in manifest_files(folder).items():
        file = component.Component(name=name, type=kinds.FILE, hashes=[_sha256(entry["sha256"])])
        model.components.add(file)
    bom.metadata.component = model
    for material in training["buildDefinition"]["resolvedDependencies"]:
        data = component.Component(
            name=material["name"], type=kinds.DATA, hashes=[_sha256(material["digest"]["sha256"])]
        )
        bom.components.add(data)
    bom.register_dependency(model, [*model.components, *bom.components])
    written: str = output.JsonV1Dot6(bom).output_as_string(indent=1)
    return written


def _properties(shape: Shape, metadata: Metadata) -> list[Any]:
    """Returns what is known of the model and its training, under names of raymill's own."""
    known = {
        "parameters": shape.num_parameters,
        "context_tokens": shape.n_positions,
        "vocabulary": shape.vocab_size,
        "tokens_seen": metadata.tokens_seen,
        "precision": metadata.precision,
        "validation_loss_nats_per_token": metadata.val_loss,
        "code_version": metadata.code_version,
    }
    property_of = _library("cyclonedx.model").Property
    return [
        property_of(name=f"raymill:{name}", value=str(value))
        for name, value in known.items()
        if value is not None
    ]


def _sha256(digest: str) -> Any:
    model = _library("cyclonedx.model")
    return model.HashType(alg=model.HashAlgorithm.SHA_256, content=digest)


def _library(name: str) -> Any:
    """Returns a module of what writes such documents, which is optional."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}: `{pip_line('sign')}` brings what writes a bill of materials"
        ) from None
