"""What NVIDIA's machine code says of a kernel: registers, spills, atomic and tensor-core
instructions.

The tools that read it, `cuobjdump` and `nvdisasm`, lie in Triton's wheel.
"""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_TOOL_S = 120.0
_INSTRUCTION_BYTES = 16

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
"""A line of nvdisasm: the address, perhaps the predicate under which it is done, the operation."""

ATOMIC = re.compile(
    r"^(?:ATOM|RED(?!UX)|SUATOM|SURED|U?BLKRED|UTMARED|URED(?!UX))(?!.*\.(?:AND|OR|XOR)\b)"
)
"""Of memory that other threads change too, global or shared: in which order is left to timing. It
does not matter to single bits, by which Blackwell's tensor memory is allotted. REDUX adds up a
warp's own integers."""

_TENSOR_CORE = re.compile(r"^\w*MMA")


class MachineCode(BaseModel):
    """A kernel, compiled for one GPU in one configuration."""

    model_config = ConfigDict(frozen=True)

    registers: int  # of a thread
    local_bytes: int  # of a thread: what spilled from registers to memory, or was put there
    atomics: dict[str, int]  # instructions by their name
    tensor_core: dict[str, int]
    num_instructions: int
    sha256: str  # of the whole file


def inspected(cubins: Sequence[bytes], arch: int) -> list[MachineCode]:
    """Returns what the tools say of compiled kernels. Raises `ValueError` where they do not say it
    of each instruction."""
    codes = [b"".join(_texts(cubin)) for cubin in cubins]
    listed = instructions(_listing(b"".join(codes), arch))
    if len(listed) * _INSTRUCTION_BYTES != sum(map(len, codes)):
        raise ValueError(
            f"nvdisasm lists {len(listed)} instructions of {sum(map(len, codes))} bytes"
        )
    found: list[MachineCode] = []
    start = 0
    for cubin, code in zip(cubins, codes, strict=True):
        stop = start + len(code) // _INSTRUCTION_BYTES
        found.append(_inspected(cubin, Counter(listed[start:stop])))
        start = stop
    return found


def _inspected(cubin: bytes, counts: Counter[str]) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, local_bytes = resources(_said("cuobjdump", "-res-usage", file.name))
    return MachineCode(
        registers=registers,
        local_bytes=local_bytes,
        atomics=_named(counts, ATOMIC),
        tensor_core=_named(counts, _TENSOR_CORE),
        num_instructions=counts.total(),
        sha256=hashlib.sha256(cubin).hexdigest(),
    )


def _listing(code: bytes, arch: int) -> str:
    """Returns the instructions of several kernels: nvdisasm needs half a second to begin with
    each."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        return _said("nvdisasm", "--no-dataflow", "--binary", f"SM{arch}", file.name)


def _texts(cubin: bytes) -> Iterator[bytes]:
    """Yields the code of each function in an ELF file of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, sections + place * size) for place in range(number)
    ]
    names = headers[of_names][4]
    for name, _, _, _, offset, length in headers:
        if cubin.startswith(b".text.", names + name):
            yield cubin[offset : offset + length]


def resources(usage: str) -> tuple[int, int]:
    """Returns the most registers of a function, and the bytes of local memory of all of them, from
    the words of `cuobjdump -res-usage`."""
    registers = [int(number) for number in re.findall(r"\bREG:(\d+)", usage)]
    if not registers:
        raise ValueError(f"cuobjdump names no registers: {usage[:200]!r}")
    return max(registers), sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def instructions(listing: str) -> list[str]:
    """Returns the operations in order, from the words of `nvdisasm`."""
    return _INSTRUCTION.findall(listing)


def _named(counts: Counter[str], names: re.Pattern[str]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if names.match(name)}


def _said(tool: str, *words: str) -> str:
    from triton.backends import nvidia

    path = Path(str(nvidia.__file__)).parent / "bin" / tool
    done = subprocess.run(
        [str(path), *words], capture_output=True, text=True, check=False, timeout=_TOOL_S
    )
    if done.returncode != 0:
        raise ValueError(f"{tool} failed: {done.stderr[:400]}")
    return done.stdout
