"""The JSON-Schema-Test-Suite, which the source package of `jsonschema` has."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

DRAFT = "json/tests/draft2020-12/"


@dataclass(frozen=True)
class SuiteSchema:
    """One schema of the suite."""

    name: str
    schema: dict[str, Any]


def fetched_suite(folder: Path) -> list[SuiteSchema] | None:
    """Returns the schemas of draft 2020-12 that every validator must know, without those that are
    true or false; None where the package cannot be fetched."""
    package = f"jsonschema=={version('jsonschema')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", "jsonschema", "--dest", str(folder), package]
    subprocess.run(command, check=False)
    archive = next(folder.glob("*.tar.gz"), None)
    return None if archive is None else [*_schemas(archive)]


def _schemas(archive: Path) -> Iterator[SuiteSchema]:
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            _, is_there, name = member.name.partition(DRAFT)
            if not is_there or "/" in name or not name.endswith(".json"):
                continue
            file = tar.extractfile(member)
            assert file is not None
            for group in json.load(file):
                if isinstance(group["schema"], dict):
                    title = f"{name.removesuffix('.json')}: {group['description']}"
                    yield SuiteSchema(title, group["schema"])
