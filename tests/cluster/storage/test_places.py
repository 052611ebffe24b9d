"""A place has one text, however a location is written, and is known by what leads to it."""

from pathlib import Path

import pytest

from cluster.storage.uris import place_of, places_to


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders and links whose places are known."""
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name, target in (
        ("absolute", tmp_path / "real"),
        ("relative", "real/deep"),
        ("up", "other/../real/./deep"),
        ("chain", "real/onward"),
        ("real/onward", "../other"),
        ("loop", "loop"),
        ("slashes", f"/{tmp_path}/real"),
    ):
        (tmp_path / name).symlink_to(target)
    return tmp_path.resolve()


@pytest.mark.parametrize(
    ("way", "place"),
    [
        ("real/deep", "real/deep"),
        ("real/deep/", "real/deep"),
        ("real//deep", "real/deep"),
        ("other/../real/deep", "real/deep"),
        ("absolute/deep", "real/deep"),
        ("slashes/deep", "real/deep"),
        ("relative", "real/deep"),
        ("up/a/file", "real/deep/a/file"),
        ("chain/b", "other/b"),
        ("missing/c", "missing/c"),
        ("loop", "loop"),
        ("real/*.txt", "real/*.txt"),
    ],
)
def test_a_path_means_the_place_where_the_kernel_arrives(
    root: Path, way: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    for uri in (way, f"{root}/{way}", f"file://{root}/{way}", f"/{root}/{way}"):
        assert place_of(uri) == f"{root}/{place}"


def test_folders_through_which_only_links_lead_are_on_the_way(root: Path) -> None:
    assert f"{root}/real" in places_to(f"{root}/chain/b")
    assert places_to(f"{root}/chain/b")[-2:] == [f"{root}/other", f"{root}/other/b"]
    assert f"{root}/real" not in places_to(f"{root}/other/b")
    assert f"{root}/re" not in places_to(f"{root}/real")


def test_a_place_elsewhere_is_its_uri_without_what_does_not_matter() -> None:
    assert places_to("s3://bucket/a/b/") == ["s3://bucket", "s3://bucket/a", "s3://bucket/a/b"]
    assert place_of("s3://bucket//a") == place_of("s3://bucket/a") != place_of("s3://bucket/b")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert place_of("hf://datasets/o/n/a") == place_of(f"hf://datasets/o/n@{commit}/a/")
    assert place_of("hf://datasets/o/n") != place_of("hf://o/n")
