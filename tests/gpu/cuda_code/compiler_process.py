"""Starts the process that compiles a case, with Triton's wheel, and reads what it made."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from tests.gpu.cuda_code.report import Compiled
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

TRITON = REPOSITORY / ".triton-wheel"
"""Where `make` puts Triton's wheel: apart from the other packages, as PyTorch chooses other ways on
CPUs too where it finds it."""

_LIST = TypeAdapter(list[Compiled])
_QUIET_S = 400.0  # more than a case takes on all targets


def compiled(
    case: str, archs: Sequence[int], *, library: Path, folder: Path, hash_seed: int
) -> list[Compiled]:
    """Compiles a case for each of the targets, one after the other, in a process. The seed is that
    of Python's hashes: sets have another order with another one. Raises `RuntimeError` with what the
    process said where it fails."""
    command = [sys.executable, "-m", "tests.gpu.cuda_code.cross_compile", str(library), str(folder)]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TRITON)]),
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        # It would load what was compiled into a GPU
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
    }
    done = subprocess.run(
        [*command, case, *map(str, archs)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=limit_s(_QUIET_S),
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{case} was not compiled:\n{done.stderr[-8000:]}")
    return _LIST.validate_json(done.stdout.splitlines()[-1])
