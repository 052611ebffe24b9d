"""Compiles native/ for the processor at hand, once, and loads it.

The environment variable RAYMILL_KERNELS_MARCH takes the place of "native" in GCC's -march: "x86-64-v3" holds the
kernels to AVX2.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
COMPILE_TIMEOUT_S = 300.0


class NoNativeLibraryError(Exception):
    """The kernels cannot be had here; the message says why."""


def load_library() -> ctypes.CDLL:
    """Raises `NoNativeLibraryError` without a C++ compiler, or where it fails."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoNativeLibraryError("there is no C++ compiler (g++, or what CXX names)")
    path = _cache_folder() / f"decoder-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _flags() -> list[str]:
    return [*FLAGS, f"-march={os.environ.get('RAYMILL_KERNELS_MARCH') or 'native'}"]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymill"


def _key(compiler: str) -> str:
    """Of the sources and all that decides what becomes of it: a home may be shared by unlike machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S).stdout
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    parts = (sources, " ".join(_flags()).encode(), version, _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Its instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {flags}"


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(
            [compiler, *_flags(), str(SOURCES / "decoder.cpp"), "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise NoNativeLibraryError(f"{compiler} cannot compile {SOURCES.name}/: {done.stderr.strip()[:500]}")
        made.replace(path)  # two processes may do this at once
