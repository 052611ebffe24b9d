"""The precision a processor computes at speed: bf16 on GPUs from Ampere on and CPUs with bf16
products, else fp32; and the GPUs of this machine.

All others emulate bf16: on a CPU with AVX2 only, training in bf16 took eleven times as long as in
fp32.
"""

import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Literal

from model.numerics import BF16, FP32, NUMERICS, Numerics, Precision
from raymill.phases import COMPUTING

Device = Literal["cpu", "cuda"]

_ARM_FEATURES = frozenset(("bf16",))
_BF16_FEATURES = frozenset(("avx512_bf16", "amx_bf16")) | _ARM_FEATURES
"""Linux's names in /proc/cpuinfo."""

_AMPERE = (8, 0)  # the first CUDA capability with bf16 products

# Environment variables that hold PyTorch's two halves to older instructions, and their values
# without those for bf16 (oneDNN has AVX2's conversions to bf16 in AVX2_VNNI_2, but no products).
_OLDER_ISA = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_HELD_TO = {
    "ONEDNN_MAX_CPU_ISA": _OLDER_ISA,
    "ATEN_CPU_CAPABILITY": ("DEFAULT", "AVX2"),
}


def fast_precision(device: Device) -> Precision:
    """Returns the precision that this machine's CPU, or its current GPU, computes fastest without
    emulating it."""
    if device == "cpu":
        return cpu_precision(cpu_features(), os.environ)
    import torch  # noqa: PLC0415  (takes seconds, which a command that asks about a CPU need not wait)

    return (BF16 if torch.cuda.get_device_capability() >= _AMPERE else FP32).name


def cpu_precision(features: Set[str], environment: Mapping[str, str]) -> Precision:
    """Returns the same for a CPU with those features, in a process with those environment
    variables."""
    found = _BF16_FEATURES & features
    if found == _ARM_FEATURES:
        return BF16.name  # the variables only know x86
    is_held = any(environment.get(name, "").upper() in older for name, older in _HELD_TO.items())
    return (BF16 if found and not is_held else FP32).name


def emulates(numerics: Numerics) -> bool:
    """Tells whether this machine's CPU has no units for such products, and is slow at them."""
    return numerics.needs_units and NUMERICS[fast_precision("cpu")] != numerics


def cpu_features() -> frozenset[str]:
    """Returns the names of this CPU's features; none where the system does not list them as Linux
    does."""
    return frozenset((cpu_field("flags|Features") or "").split())


def cpu_field(name: str) -> str | None:
    """Returns the first field of this name, a pattern, that Linux lists of its CPUs; None
    elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    found = (
        re.search(rf"^(?:{name})\s*:(.*)", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.exists()
        else None
    )
    return found[1].strip() if found else None


_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # NVIDIA's, and that of Windows under WSL


def num_gpus_here() -> int:
    """Returns the number of this machine's GPUs that PyTorch sees. Without a driver PyTorch is not
    imported, which takes seconds."""
    if not any(driver.exists() for driver in _DRIVERS):
        return 0
    import torch  # noqa: PLC0415

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def processor_share(processor_s: float | None, seconds: Mapping[str, float]) -> float:
    """Returns which share of a processor a worker's thread had while it computed, from what it used
    of one and its seconds by phase: all of it where that is not known."""
    computing_s = sum(seconds.get(phase, 0.0) for phase in COMPUTING)
    if processor_s is None or not computing_s:
        return 1.0
    return min(1.0, processor_s / computing_s)
