"""The repository's root folder, and what its pyproject.toml says."""

import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads(
    (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
)
BANNED_MODULES: list[str] = sorted(
    PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
)
"""Modules with private names of other packages, which ruff allows in their homes only."""
