"""A Ray cluster's token is found where Ray itself finds it, and its value is never shown."""

from pathlib import Path

import pytest

from cluster.local.jobs_api import ClusterError, ray_token


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder where `ray get-auth-token --generate` was called."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("rays\n")
    return tmp_path


def value() -> str | None:
    token = ray_token()
    return token and token.value


def test_the_environment_is_asked_first_and_then_rays_own_place(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert value() == "rays"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment".replace(" ", "-"))
    assert value() == "of-the-environment"
    (home / "file").write_text("of-a-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file"))
    assert value() == "of-a-file"


def test_without_a_file_there_is_none_and_an_empty_one_is_refused(home: Path) -> None:
    (home / ".ray/auth_token").write_text("")
    with pytest.raises(ClusterError, match=r"auth_token, which Ray names, holds no token"):
        ray_token()
    (home / ".ray/auth_token").unlink()
    assert ray_token() is None
