"""The kernels are compiled, kept, baked into an image and loaded; where they cannot be had, PyTorch
computes."""

import logging
import os
import platform
import shutil
import time
from pathlib import Path

import psutil
import pytest

from cluster.settings.serve import EngineConfig
from model.gpt import GPT
from model.kernels import native_library
from model.kernels.native_library import TARGETS, NoNativeLibraryError, bake, load_library
from raymill.errors import UserError
from serving.engine_process.run_engine import build_engine
from tests.time_limits import limit_s

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the compiled libraries; their source is one function, which takes a third of a
    second."""
    for variable in (native_library.MARCH_VARIABLE, native_library.FOLDER_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_library, "SOURCES", tmp_path / "native")
    write_source(tmp_path, answer=42)
    return tmp_path / "cache" / "raymill" / "kernels"


def write_source(tmp_path: Path, *, answer: int) -> None:
    (tmp_path / "native").mkdir(exist_ok=True)
    (tmp_path / "native" / "decoder.cpp").write_text(SOURCE % answer)


def compiler(path: Path, script: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o755)
    return str(path)


def noexec_folder() -> Path | None:
    places = (
        Path(p.mountpoint)
        for p in psutil.disk_partitions(all=True)
        if "noexec" in p.opts.split(",")
    )
    return next(
        (place for place in places if place.parts[1:2] != ("proc",) and os.access(place, os.W_OK)),
        None,
    )


def test_a_library_is_kept_in_a_folder_of_ones_own_and_compiled_anew_for_another_source(
    cache: Path, tmp_path: Path
) -> None:
    assert load_library().answer() == 42
    assert cache.stat().st_mode & 0o777 == 0o700
    [kept] = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert load_library().answer() == 42
    assert kept.stat().st_mtime_ns == before
    write_source(tmp_path, answer=43)
    assert load_library().answer() == 43


def test_a_library_is_loaded_whatever_the_umask(cache: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)  # of a user with a group of its own, as on Ubuntu
    try:
        assert load_library().answer() == 42
        [baked, *_] = bake(tmp_path / "kernels")
        native_library._load(baked)
    finally:
        os.umask(before)


def test_a_library_that_was_cut_short_is_never_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "CXX", compiler(tmp_path / "cxx", 'for made; do :; done; echo half > "$made"; kill -9 $$')
    )
    with pytest.raises(NoNativeLibraryError, match="cannot compile native/ \\(exit status -9\\)"):
        load_library()
    assert list(cache.iterdir()) == []
    monkeypatch.delenv("CXX")
    assert load_library().answer() == 42


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_library_that_others_may_write_is_not_loaded(cache: Path, place: str) -> None:
    load_library()
    [kept] = cache.iterdir()
    (kept if place == "file" else cache).chmod(0o777)
    with pytest.raises(NoNativeLibraryError, match="can be written by others"):
        load_library()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("home", "Not a directory"),
        ("noexec", "without execution"),
        ("none", "no C\\+\\+ compiler"),
        ("dies", "cannot compile"),
        ("hangs", "timed out"),
        ("lies", "No such file"),
        ("march", "cannot compile"),
    ],
)
def test_pytorch_computes_where_the_kernels_cannot_be_had(
    model: GPT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
    said: str,
) -> None:
    match trouble:
        case "home":
            (tmp_path / "cache").write_text("no folder")
        case "noexec":
            if (folder := noexec_folder()) is None:
                pytest.skip("no file system here is mounted noexec")
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder / f"cache-{os.getpid()}"))
        case "none":
            monkeypatch.setenv("CXX", "no-such-compiler")
        case "dies":
            monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "kill -9 $$"))
        case "hangs":
            monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", f"sleep {limit_s(60):.0f}"))
            monkeypatch.setattr(native_library, "COMPILE_TIMEOUT_S", 1.0)
        case "lies":
            monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "exit 0"))
        case "march":
            monkeypatch.setenv(native_library.MARCH_VARIABLE, "no-such-processor")
    start_s = time.monotonic()
    try:
        with caplog.at_level(logging.WARNING):
            build_engine(model, EngineConfig(), eos_id=None, threads=1)
        with pytest.raises(UserError, match=f"(?s)engine.kernels=native, but .*{said}"):
            build_engine(model, EngineConfig(kernels="native"), eos_id=None, threads=1)
        with pytest.raises(
            UserError, match=f"(?s)engine.dtype=int8 needs the native kernels, but .*{said}"
        ):
            build_engine(model, EngineConfig(dtype="int8"), eos_id=None, threads=1)
    finally:
        if trouble == "noexec":
            shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    # A quarter of what the one that hangs would take once
    assert time.monotonic() - start_s < limit_s(15)
    [warning] = caplog.messages
    assert warning.startswith("PyTorch computes")


def test_an_image_has_a_library_for_each_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, folder = TARGETS[platform.machine()], tmp_path / "baked"
    paths = bake(folder)
    assert len(paths) == len(targets) == len(list(folder.iterdir()))
    monkeypatch.setenv(native_library.FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv("CXX", "no-such-compiler")  # a pod has none
    for path, (march, needs) in zip(paths, targets.items(), strict=True):
        monkeypatch.setattr(native_library, "cpu_features", lambda needs=needs: needs | {"fpu"})
        assert f"decoder-{march}-" in path.name
        assert load_library()._name == str(path)
    monkeypatch.setattr(native_library, "cpu_features", lambda: frozenset({"fpu"}))
    with pytest.raises(NoNativeLibraryError, match="no C\\+\\+ compiler"):
        load_library()
    monkeypatch.setenv(native_library.MARCH_VARIABLE, march)
    with pytest.raises(
        NoNativeLibraryError, match=f"RAYMILL_KERNELS_MARCH={march}, but this processor has no "
    ):
        load_library()


def test_what_was_baked_from_other_sources_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bake(tmp_path / "baked")
    monkeypatch.setenv(native_library.FOLDER_VARIABLE, str(tmp_path / "baked"))
    write_source(tmp_path, answer=43)
    assert load_library().answer() == 43
