"""What the tests of signatures sign."""

from pathlib import Path

import pytest

from model.files.checkpoint_folder import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "checkpoint" / MANIFEST).write_text('{"format_version": 1, "files": {}}')
    return tmp_path / "checkpoint"
