"""The kernels have the same bits on every processor, with any number of threads: the hashes below
are those of every machine and of every commit."""

import shutil
import subprocess
from pathlib import Path

import pytest

from model.kernels.native_library import SOURCES, flags
from tests.processors import RUNNABLE
from tests.time_limits import limit_s

LOGITS, STEPS = (Path(__file__).parent / f"portable_{name}.cpp" for name in ("logits", "steps"))
OF_LOGITS = """\
float32 0 76273e66711dd05b
float32 1 61422c7ef60063bf
float32 2 3aa95153b8ba003a
float32 3 ecc2172dc9770ba3
bfloat16 0 a8f368eb87787c4f
bfloat16 1 f3d6c39904e8d09d
bfloat16 2 3b2020804c14bacb
bfloat16 3 fa21cfd74b185562
int8 0 a799d95c462f4355
int8 1 60ac298cc9679311
int8 2 182fee07d2d6b37d
int8 3 ec0e3eed94f8f7a5
""".splitlines()
"""Of logits and log-probabilities, by kind of numbers and activation (`Activation` in shape.h)."""
OF_STEPS = """\
3 1 ceba93e1afbe64e0
3 2 943a27f12965c8c9
3 3 0b8da24401e75679
0 1 c163e5854c795653
0 2 147857bdc6cee8d4
0 3 88b05ebbd1f7e49d
1 1 8496efeb73714aa2
1 2 e02e349908240d35
1 3 de1fcf24006686c0
""".splitlines()
"""Of weights, by activation and step."""

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def printed(
    program: Path, folder: Path, march: str, *, threads: int, emulated: bool = False
) -> list[str]:
    """Returns the lines of a program, compiled for a processor, which may be an emulated one."""
    made = str(folder / f"{program.stem}-{march}-{threads}")
    compiler = ARM_COMPILER if emulated else "g++"
    command = [compiler, *flags(march), "-static", f"-I{SOURCES}", str(program), "-o", made]
    command.remove("-shared")
    subprocess.run(command, check=True, timeout=limit_s(120))
    done = subprocess.run(
        [*([ARM_EMULATOR] if emulated else []), made, str(threads)],
        check=True,
        capture_output=True,
        text=True,
        timeout=limit_s(120),
    )
    return done.stdout.splitlines()


def logits_of(march: str) -> list[str]:
    """Leaves out bf16 where the processor has products of its own for it."""
    return [line for line in OF_LOGITS if "bf16" not in march or not line.startswith("bfloat16")]


def test_kernels__for_the_least_processor_of_this_kind__have_these_hashes(tmp_path: Path) -> None:
    assert printed(LOGITS, tmp_path, RUNNABLE[-1], threads=2) == OF_LOGITS
    assert printed(STEPS, tmp_path, RUNNABLE[-1], threads=2) == OF_STEPS


@pytest.mark.more
@pytest.mark.parametrize("march", RUNNABLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels__for_every_processor_that_this_one_can_be__have_these_hashes(
    tmp_path: Path, march: str, threads: int
) -> None:
    assert printed(LOGITS, tmp_path, march, threads=threads) == logits_of(march)
    assert printed(STEPS, tmp_path, march, threads=threads) == OF_STEPS


@pytest.mark.more
@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs Debian's g++-aarch64-linux-gnu and qemu-user ({ARM_COMPILER}, {ARM_EMULATOR})",
)
def test_kernels__for_arm_by_an_emulator__have_these_hashes(tmp_path: Path) -> None:
    assert printed(LOGITS, tmp_path, "armv8-a", threads=2, emulated=True) == OF_LOGITS
    assert printed(STEPS, tmp_path, "armv8-a", threads=2, emulated=True) == OF_STEPS
