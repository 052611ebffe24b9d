"""Keys: made private, kept as hashes, and nothing but one right Authorization header passes."""

import hashlib
import stat
from pathlib import Path

import pytest

from model.errors import UserError
from serving.access import is_authorized, read_key_hashes


def test_a_missing_key_file_is_made_with_one_private_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys"
    hashes = read_key_hashes(path)
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) > 40
    assert hashes == (hashlib.sha256(key.encode()).hexdigest(),) == read_key_hashes(path)


def test_an_empty_key_file_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(UserError, match="empty"):
        read_key_hashes(tmp_path / "keys")


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ([b"Bearer one"], True),
        ([b"bearer two"], True),
        ([], False),
        ([b""], False),
        ([b"Bearer"], False),
        ([b"Bearer one", b"Bearer one"], False),
        ([b"Basic one"], False),
        ([b"Bearer \xff\xfe"], False),
        ([b"Bearer " + b"x" * 2**20], False),
        ([b"Bearer one,two"], False),
    ],
)
def test_only_a_known_key_passes(tmp_path: Path, values: list[bytes], passes: bool) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    headers = [(b"host", b"x"), *((b"authorization", value) for value in values)]
    assert is_authorized(headers, read_key_hashes(tmp_path / "keys")) is passes
