"""The engine's arithmetic has the same bits on every processor, with any number of threads: the
hashes below are those of every machine and of every commit."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model.hardware.processor import cpu_features
from model.kernels.native_library import MARCH_VARIABLE, SOURCES, TARGETS, flags
from model.rotary import exact_frequencies, frequencies
from tests.json_program import last_line_of
from tests.repository import REPOSITORY
from tests.serving.engine.portable_answers import MODELS
from tests.time_limits import limit_s

PROGRAM = REPOSITORY / "tests/model/kernels/portable_logits.cpp"
HASHES = """\
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

RUNNABLE = [
    march for march, needs in TARGETS.get(platform.machine(), {}).items() if needs <= cpu_features()
]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def hashes(
    folder: Path, march: str, *, threads: int, compiler: str = "g++", emulator: tuple[str, ...] = ()
) -> list[str]:
    """Returns what the program says, compiled for a processor."""
    program = str(folder / f"{march}-{threads}")
    command = [compiler, *flags(march), "-static", f"-I{SOURCES}", str(PROGRAM), "-o", program]
    command.remove("-shared")
    subprocess.run(command, check=True, timeout=limit_s(120))
    done = subprocess.run(
        [*emulator, program, str(threads)],
        check=True,
        capture_output=True,
        text=True,
        timeout=limit_s(120),
    )
    return done.stdout.splitlines()


def expected(march: str) -> list[str]:
    """Leaves out bf16 where the processor has products of its own for it."""
    return [line for line in HASHES if "bf16" not in march or not line.startswith("bfloat16")]


def test_kernels__for_the_least_processor_of_this_kind__have_these_hashes(tmp_path: Path) -> None:
    assert hashes(tmp_path, RUNNABLE[-1], threads=2) == HASHES


@pytest.mark.more
@pytest.mark.parametrize("march", RUNNABLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels__for_every_processor_that_this_one_can_be__have_these_hashes(
    tmp_path: Path, march: str, threads: int
) -> None:
    assert hashes(tmp_path, march, threads=threads) == expected(march)


@pytest.mark.more
@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs Debian's g++-aarch64-linux-gnu and qemu-user ({ARM_COMPILER}, {ARM_EMULATOR})",
)
def test_kernels__for_arm_by_an_emulator__have_these_hashes(tmp_path: Path) -> None:
    found = hashes(tmp_path, "armv8-a", threads=2, compiler=ARM_COMPILER, emulator=(ARM_EMULATOR,))
    assert found == HASHES


def answers_of(march: str, threads: int, **more: str) -> dict[str, Any]:
    environment = os.environ | {MARCH_VARIABLE: march} | more
    program = ("-m", "tests.serving.engine.portable_answers", str(threads))
    return last_line_of(*program, env=environment)


@pytest.mark.more
def test_an_engines_answers__whatever_the_processor_and_pytorchs_kernels__are_the_same() -> None:
    least = answers_of(RUNNABLE[-1], 1, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    most = answers_of(RUNNABLE[0], 3)
    assert len(least) == 6
    for name, (is_portable, events) in most.items():
        assert len(events) == 160
        assert is_portable == (not name.endswith("bfloat16") or "bf16" not in RUNNABLE[0])
        if is_portable:
            assert events == least[name][1], name


def test_exact_frequencies__are_those_that_models_train_with_to_a_rounding() -> None:
    for config in MODELS.values():
        assert exact_frequencies(config).tolist() == pytest.approx(
            frequencies(config).tolist(), rel=3e-7
        )
