"""The code that a GPU would run in a training step, compiled without one: no atomic instruction, one
way to divide each sum, nothing spilled, and the same bytes when it is made again.

`make test-cuda-code` runs these and prints the table. Nothing here runs on a GPU.
"""

import re
from pathlib import Path

import pytest

from tests.gpu.cuda_code.cases import CASES, MODELS, PLANTED
from tests.gpu.cuda_code.compiler_process import TRITON, compiled
from tests.gpu.cuda_code.kernels_table import store
from tests.gpu.cuda_code.report import differences, faults
from tests.gpu.cuda_code.targets import TARGETS
from tests.gpu.fake_library import fake_cuda_library
from tests.repository import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TRITON.exists(), reason="no Triton in .triton-wheel; `make test-cuda-code` installs it"
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda_library(tmp_path_factory.mktemp("cuda"))


def test_triton_is_the_one_of_the_image() -> None:
    [version] = re.findall(r"^triton==(\S+)", (REPOSITORY / ".ci/image-gpu.txt").read_text(), re.M)
    assert (TRITON / f"triton-{version}.dist-info").is_dir()


@pytest.mark.parametrize("case", CASES)
def test_the_code_of_a_step__leaves_nothing_to_timing(
    case: str, library: Path, tmp_path: Path
) -> None:
    made = compiled(case, [*TARGETS], library=library, folder=tmp_path, hash_seed=1)
    assert [one.arch for one in made] == [*TARGETS]
    assert all(any(kernel.is_reduction for kernel in one.kernels) for one in made)
    least = 3 if case.startswith(MODELS) else 1  # forward, backward and the head's loss
    assert all(one.num_programs >= least for one in made)
    store(case, made)
    assert {one.arch: found for one in made if (found := faults(one))} == {}
    again = compiled(case, [*TARGETS], library=library, folder=tmp_path, hash_seed=2)
    for first, second in zip(made, again, strict=True):
        assert differences(first, second) == [], first.arch


@pytest.mark.parametrize("arch", TARGETS)
def test_planted_faults_are_found(arch: int, library: Path, tmp_path: Path) -> None:
    [made] = compiled(PLANTED, [arch], library=library, folder=tmp_path, hash_seed=1)
    found = faults(made)
    for words in (
        r"triton_poi_fused_index_add\S*: atomic instructions.*\.ADD\.F32",
        r"triton_red_fused\S*: [2-9] ways to divide a sum",
        r"triton_red_fused\S*: a running program may divide the sum in another way",
        r"spills: \d{4} bytes of a thread spill",
        r"product in fp32: a product without tensor cores",
    ):
        assert any(re.match(words, fault) for fault in found), words
    assert not any(fault.startswith("product in bf16") for fault in found)
