"""Reads which version of a model a request names: `NAME@VERSION` instead of `NAME` asks for this
version, and not for the one whose turn it is."""

from collections.abc import Collection
from dataclasses import dataclass

SEPARATOR = "@"


@dataclass(frozen=True)
class AskedModel:
    """The meaning of the field `model` of a request."""

    name: str | None
    version: str | None = None  # None: the one that the route says


def read_asked_model(model: str | None, served: Collection[str]) -> AskedModel:
    """Returns what `model` asks for. A name that is served as it stands may have an @ in it, and
    names no version."""
    if model is None or model in served or SEPARATOR not in model:
        return AskedModel(model)
    name, _, version = model.rpartition(SEPARATOR)
    return AskedModel(name, version)
