"""Known GPUs: their peak, memory and links, and what an hour of one is assumed to cost."""

import re
from dataclasses import dataclass

from model.processor import Precision


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheets. 1 GB is 1e9 bytes; link speeds are those of one direction.

    The peak is that of dense 16-bit matrices, without the sheets' factor 2 for sparsity: bf16, or fp16 on V100 and T4,
    which have no bf16. The network speed is a GPU's share of the links between usual servers of eight (DGX A100
    200 Gbit/s for each GPU, DGX H100 400; 12.5 for PCIe cards, an assumption). The price, in dollars on demand, is an
    assumption too: a round number in the range that clouds asked in 2024 and 2025.
    """

    device_name: str  # whole words of `torch.cuda.get_device_name()`
    peak_flops_per_s: float
    memory_bytes: float
    link_bytes_per_s: float  # between the GPUs of a node: NVLink, or PCIe where there is none
    host_bytes_per_s: float  # to the memory of its node, by PCIe
    network_bytes_per_s: float
    price_per_hour: float

    @property
    def fast_precision(self) -> Precision:
        return "fp32" if self.device_name in ("V100-SXM2", "T4") else "bf16"


_GB, _TF, _GBIT = 1e9, 1e12, 1e9 / 8

# By the name that users type.
GPUS: dict[str, Gpu] = {
    "h100-pcie": Gpu("H100 PCIe", 756 * _TF, 80 * _GB, 64 * _GB, 64 * _GB, 100 * _GBIT, 2.5),
    "h100-nvl": Gpu("H100 NVL", 835 * _TF, 94 * _GB, 300 * _GB, 64 * _GB, 100 * _GBIT, 2.8),
    "h100": Gpu("H100", 989 * _TF, 80 * _GB, 450 * _GB, 64 * _GB, 400 * _GBIT, 3.0),
    "h200": Gpu("H200", 989 * _TF, 141 * _GB, 450 * _GB, 64 * _GB, 400 * _GBIT, 3.5),
    "b200": Gpu("B200", 2250 * _TF, 180 * _GB, 900 * _GB, 64 * _GB, 400 * _GBIT, 5.0),
    "a100-40gb": Gpu("A100-SXM4-40GB", 312 * _TF, 40 * _GB, 300 * _GB, 32 * _GB, 200 * _GBIT, 1.5),
    "a100": Gpu("A100", 312 * _TF, 80 * _GB, 300 * _GB, 32 * _GB, 200 * _GBIT, 2.0),
    "a10g": Gpu("A10G", 70 * _TF, 24 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 1.0),
    "a10": Gpu("A10", 125 * _TF, 24 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 0.75),
    "l40s": Gpu("L40S", 362 * _TF, 48 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 1.5),
    "l4": Gpu("L4", 121 * _TF, 24 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 0.7),
    "v100": Gpu("V100-SXM2", 125 * _TF, 32 * _GB, 150 * _GB, 16 * _GB, 12.5 * _GBIT, 1.0),
    "t4": Gpu("T4", 65 * _TF, 16 * _GB, 16 * _GB, 16 * _GB, 12.5 * _GBIT, 0.35),
    "rtx-4090": Gpu("RTX 4090", 165 * _TF, 24 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 0.5),
    "rtx-3090": Gpu("RTX 3090", 71 * _TF, 24 * _GB, 32 * _GB, 32 * _GB, 12.5 * _GBIT, 0.3),
}

_VARIANT = re.compile(r"\b(MIG|Laptop|Max-Q|SUPER|Ti|D|NVL)\b")
"""Words that turn a name of the table into another GPU, or a part of one, with another peak."""


def gpu_of(device_name: str) -> Gpu | None:
    """Returns the GPU of that name, or None if it is not in the table: a guess would make false figures."""
    for gpu in GPUS.values():
        rest, found = re.subn(rf"(?<!\w){re.escape(gpu.device_name)}(?!\w)", "", device_name)
        if found and not _VARIANT.search(rest):
            return gpu
    return None
