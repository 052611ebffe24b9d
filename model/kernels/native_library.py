"""Compiles native/ for this processor, once, and loads it; or loads a library that was compiled
into an image.

    python -m model.kernels.native_library --bake FOLDER

compiles it for every processor of this machine's kind. If the environment variable RAYMILL_KERNELS
names that folder, the fastest library that the processor can run is loaded from there, and no
compiler is needed.

RAYMILL_KERNELS_MARCH replaces "native" in GCC's -march: "x86-64-v3" limits the kernels to AVX2.
"""

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from model.architecture import Activation
from model.files.durable_files import sync
from model.hardware.processor import cpu_features
from raymill.errors import UserError

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Werror=switch",
    "-ffp-contract=off",  # a * b + c is rounded twice everywhere, or once where the code says so
)
ACTIVATIONS: dict[Activation, int] = {"gelu": 0, "gelu_exact": 1, "relu": 2, "swiglu": 3}
"""Their numbers in native/shape.h."""
COMPILE_TIMEOUT_S = 300.0
NATIVE = "native"
FOLDER_VARIABLE, MARCH_VARIABLE = "RAYMILL_KERNELS", "RAYMILL_KERNELS_MARCH"

_X86_64_V3 = frozenset(["avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"])
_X86_64_V4 = _X86_64_V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_ICE_LAKE = _X86_64_V4 | {"avx512_vnni"}
_ZEN_4 = _ICE_LAKE | {"avx512_bf16"}
_SAPPHIRE_RAPIDS = _ZEN_4 | {"amx_tile", "amx_bf16", "amx_int8"}

TARGETS: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {
        "x86-64-v4+avx512vnni+avx512bf16+amx-tile+amx-bf16+amx-int8": _SAPPHIRE_RAPIDS,
        "x86-64-v4+avx512vnni+avx512bf16": _ZEN_4,
        "x86-64-v4+avx512vnni": _ICE_LAKE,
        "x86-64-v4": _X86_64_V4,
        "x86-64-v3": _X86_64_V3,
    },
    "aarch64": {"armv8-a": frozenset({"asimd"})},
}
"""By machine: the targets of `--bake`, the fastest first, and the processor features they need, as
Linux names them."""


class NoNativeLibraryError(UserError):
    """The kernels are not available here, or compute another model than the one that is asked for;
    the message says why."""


def load_library() -> ctypes.CDLL:
    """Loads the kernels. Raises `NoNativeLibraryError` for any reason that prevents it."""
    if missing := TARGETS.get(platform.machine(), {}).get(_march(), frozenset()) - cpu_features():
        raise NoNativeLibraryError(
            f"{MARCH_VARIABLE}={_march()}, but this processor has no {' '.join(sorted(missing))}"
        )
    try:
        return _load(_baked() or _compiled())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home
        raise NoNativeLibraryError(str(error)) from error


def bake(folder: Path) -> list[Path]:
    """Compiles a library for each of this machine's targets. Raises `NoNativeLibraryError`."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    paths = []
    for march in TARGETS.get(platform.machine(), {}):
        paths.append(folder / _baked_name(march))
        _compile(_compiler(), march, paths[-1])
    return paths


def _baked() -> Path | None:
    """Returns the fastest library in the image that the processor can run, or the one that is asked
    for."""
    if not (folder := os.environ.get(FOLDER_VARIABLE)):
        return None
    runs = [
        march
        for march, needs in TARGETS.get(platform.machine(), {}).items()
        if needs <= cpu_features()
    ]
    paths = (
        Path(folder) / _baked_name(march) for march in (runs if _march() == NATIVE else [_march()])
    )
    return next((path for path in paths if path.exists()), None)


def _baked_name(march: str) -> str:
    return f"decoder-{march}-{_digest(march)}.so"


def _compiled() -> Path:
    """Returns the library in this user's cache, compiled now if it is not there. Its name tells all
    that affects it, as different machines may share a home."""
    compiler = _compiler()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S
    ).stdout
    processor = " ".join((platform.machine(), *sorted(cpu_features())))
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymill" / "kernels"
    )
    path = folder / f"decoder-{_digest(_march(), version, processor.encode())}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise NoNativeLibraryError(f"{folder} is on a file system without execution (noexec)")
    if not path.exists():
        _compile(compiler, _march(), path)
    return path


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library that only this user or root can write: anybody else could run code as this
    user."""
    for place in (path.parent, path):
        status = place.stat()
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
            raise NoNativeLibraryError(
                f"{place} can be written by others (owner {status.st_uid}, mode {status.st_mode & 0o777:o}); expected "
                "a file and a folder that belong to this user or root and that group and others cannot write"
            )
    return ctypes.CDLL(str(path))


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoNativeLibraryError("there is no C++ compiler (g++, or the one that CXX names)")
    return compiler


def _march() -> str:
    return os.environ.get(MARCH_VARIABLE) or NATIVE


def flags(march: str) -> list[str]:
    """Returns GCC's flags. It accepts "armv8.2-a+dotprod" as it is, but wants a flag for each
    extension of x86."""
    if march.startswith("arm"):
        return [*FLAGS, f"-march={march}"]
    name, *more = march.split("+")
    return [*FLAGS, f"-march={name}", *(f"-m{extension}" for extension in more)]


def _digest(march: str, *more: bytes) -> str:
    return hashlib.sha256(
        b"\0".join((b"".join(_contents()), " ".join(flags(march)).encode(), *more))
    ).hexdigest()[:16]


def sources_hash() -> str:
    """Returns the hash of the kernels' sources, which decide the bits of portable results."""
    return hashlib.sha256(b"".join(_contents())).hexdigest()[:16]


def _contents() -> list[bytes]:
    return [path.read_bytes() for path in sorted(SOURCES.iterdir())]


def _compile(compiler: str, march: str, path: Path) -> None:
    """Compiles the sources. The library is written whole or not at all: one cut short could kill
    its process."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = sorted(str(source) for source in SOURCES.glob("*.cpp"))
        command = [compiler, *flags(march), *sources, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=COMPILE_TIMEOUT_S)
        if done.returncode != 0:
            output = (done.stdout + done.stderr).decode(errors="replace").strip()
            raise NoNativeLibraryError(
                f"{compiler} cannot compile {SOURCES.name}/ (exit status {done.returncode}): {output[:500]}"
            )
        sync(made)
        made.chmod(0o755)  # some umasks let the group write
        made.replace(path)  # two processes may do this at once


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bake", type=Path, required=True, metavar="FOLDER", help="folder for the libraries"
    )
    try:
        paths = bake(parser.parse_args().bake)
    except NoNativeLibraryError as error:
        sys.stderr.write(f"no kernels: {error}\n")
        return 1
    sys.stdout.writelines(f"{path}\n" for path in paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
