"""What became of one case on one GPU, and what of it is against the promises.

A promise is one of the code alone: no order of additions is left to timing, neither by an atomic
instruction nor by a choice among several ways to divide a sum. What spills is slow, and a product
without tensor cores slower.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from tests.gpu.cuda_code.machine_code import MachineCode, inspected

MOST_LOCAL_BYTES = 64
"""Bytes of a thread that may spill from registers to memory: PyTorch's own tuner times no configuration
with more than 16 spilled registers."""


class Kernel(BaseModel):
    """A kernel that the compiler wrote, in each of the configurations that it would try."""

    model_config = ConfigDict(frozen=True)

    name: str
    heuristic: str  # by which its configurations are found: POINTWISE, REDUCTION …
    has_product: bool  # of matrices, in the kernel itself
    is_settled: bool  # a running program adds no configuration
    num_configurations: int
    code: list[MachineCode]  # of each configuration that the target has room for

    @property
    def is_reduction(self) -> bool:
        """Whether it adds up, or takes the largest: in an order that its configuration decides."""
        return "REDUCTION" in self.heuristic or "SCAN" in self.heuristic


@dataclass(frozen=True)
class Written:
    """A kernel whose machine code was not looked at yet: one file for each configuration that the
    target has room for."""

    name: str
    heuristic: str
    has_product: bool
    is_settled: bool
    num_configurations: int
    cubins: Sequence[bytes]


def inspected_kernels(written: Sequence[Written], arch: int) -> list[Kernel]:
    """Returns the kernels with what their machine code says."""
    codes = iter(inspected([cubin for one in written for cubin in one.cubins], arch))
    return [
        Kernel(
            name=one.name,
            heuristic=one.heuristic,
            has_product=one.has_product,
            is_settled=one.is_settled,
            num_configurations=one.num_configurations,
            code=[next(codes) for _ in one.cubins],
        )
        for one in written
    ]


class Compiled(BaseModel):
    """A case, compiled for one GPU."""

    model_config = ConfigDict(frozen=True)

    case: str
    arch: int
    num_programs: int
    others: dict[str, int]  # calls of what the compiler did not write, by name
    kernels: list[Kernel]
    processor_s: float  # until all is compiled, before the code is read
    memory_mib: float
    versions: dict[str, str]

    @property
    def code(self) -> list[MachineCode]:
        return [code for kernel in self.kernels for code in kernel.code]

    @property
    def most_registers(self) -> int:
        return max((code.registers for code in self.code), default=0)


def faults(compiled: Compiled) -> list[str]:
    """Returns what is against the promises, by kernel."""
    found: list[str] = []
    for kernel in compiled.kernels:
        found += [f"{kernel.name}: {fault}" for fault in _faults_of(kernel)]
    return found


def _faults_of(kernel: Kernel) -> list[str]:
    found: list[str] = []
    if not kernel.code:
        found.append("no configuration can be compiled")
    atomics: Counter[str] = Counter()
    for code in kernel.code:
        atomics.update(code.atomics)
    if atomics:
        found.append(f"atomic instructions, whose order is left to timing: {dict(atomics)}")
    spilled = max((code.local_bytes for code in kernel.code), default=0)
    if spilled > MOST_LOCAL_BYTES:
        found.append(f"{spilled} bytes of a thread spill, at most {MOST_LOCAL_BYTES} may")
    if kernel.is_reduction and kernel.num_configurations != 1:
        found.append(f"{kernel.num_configurations} ways to divide a sum, chosen by timing")
    if kernel.is_reduction and not kernel.is_settled:
        found.append("a running program may divide the sum in another way")
    if kernel.has_product and not all(code.tensor_core for code in kernel.code):
        found.append("a product without tensor cores")
    return found


def differences(first: Compiled, again: Compiled) -> list[str]:
    """Returns the kernels that did not become the same bytes."""
    ours, others = _bytes_of(first.kernels), _bytes_of(again.kernels)
    return sorted(key for key in ours.keys() | others.keys() if ours.get(key) != others.get(key))


def _bytes_of(kernels: Sequence[Kernel]) -> dict[str, str]:
    """Returns the hash of each kernel's code by its name and the number of its configuration."""
    found: dict[str, str] = {}
    for place, kernel in enumerate(kernels):
        for number, code in enumerate(kernel.code):
            found[f"{place} {kernel.name}, configuration {number}"] = code.sha256
    return found
