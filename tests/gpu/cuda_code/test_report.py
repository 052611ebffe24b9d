"""Machine code is read as NVIDIA's tools print it, and each fault of it has its words."""

import pytest

from tests.gpu.cuda_code.machine_code import ATOMIC, MachineCode, instructions, resources
from tests.gpu.cuda_code.report import Compiled, Kernel, differences, faults

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function triton_red_fused_sum_0:
  REG:40 STACK:16 SHARED:512 LOCAL:8 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_registers_and_local_memory_are_read() -> None:
    assert resources(USAGE) == (40, 24)
    with pytest.raises(ValueError, match="names no registers"):
        resources("cuobjdump fatal   : No device code")


LISTING = """
.text.triton_red_fused_sum_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;
        /*0020*/              @P1  RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R7 ;
        /*0030*/             @!UP0 UMOV UR4, URZ ;
.L_x_0:
        /*0040*/                   BRA `(.L_x_0);
"""


def test_instructions_are_read_without_predicates_and_operands() -> None:
    operations = ["LDC", "STL.64", "RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "UMOV", "BRA"]
    assert instructions(LISTING) == operations


@pytest.mark.parametrize(
    ("operation", "is_atomic"),
    [
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", True),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", True),
        ("ATOMG.E.ADD.BF16x2.RN.STRONG.GPU", True),
        ("ATOMS.CAS", True),
        ("ATOMS.OR", False),
        ("REDUX.SUM", False),
        ("HGMMA.64x64x16.F32.BF16", False),
    ],
)
def test_an_atomic_instruction_is_one_whose_order_matters(operation: str, is_atomic: bool) -> None:
    assert bool(ATOMIC.match(operation)) is is_atomic


GOOD = MachineCode(
    registers=32,
    local_bytes=0,
    atomics={},
    tensor_core={},
    num_instructions=100,
    sha256="a",
)
SUM = Kernel(
    name="sum",
    heuristic="PERSISTENT_REDUCTION",
    has_product=False,
    is_settled=True,
    num_configurations=1,
    code=[GOOD],
)


def compiled(kernel: Kernel) -> Compiled:
    return Compiled(
        case="made",
        arch=90,
        num_programs=1,
        others={},
        kernels=[kernel],
        processor_s=1.0,
        memory_mib=1.0,
        versions={},
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"code": []}, ["no configuration"]),
        ({"code": [GOOD.model_copy(update={"atomics": {"ATOMG.E.ADD": 2}})]}, ["ATOMG.E.ADD"]),
        ({"code": [GOOD.model_copy(update={"local_bytes": 68})]}, ["68 bytes"]),
        ({"code": [GOOD.model_copy(update={"local_bytes": 64})]}, []),
        ({"num_configurations": 2, "code": [GOOD, GOOD]}, ["2 ways"]),
        ({"num_configurations": 2, "heuristic": "POINTWISE", "code": [GOOD, GOOD]}, []),
        ({"is_settled": False}, ["in another way"]),
        ({"has_product": True}, ["tensor cores"]),
    ],
)
def test_a_fault_is_named(changes: dict[str, object], words: list[str]) -> None:
    found = faults(compiled(SUM.model_copy(update=changes)))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


def test_other_bytes_and_other_kernels_are_differences() -> None:
    other = GOOD.model_copy(update={"sha256": "b"})
    first, same = compiled(SUM), compiled(SUM)
    assert differences(first, same) == []
    assert len(differences(first, compiled(SUM.model_copy(update={"code": [other]})))) == 1
    assert len(differences(first, compiled(SUM.model_copy(update={"name": "another"})))) == 2
