"""Known GPUs: their peak, memory and links, and what an hour of one is assumed to cost."""

import re
from dataclasses import dataclass

from model.numerics import BF16, FP32, Numerics
from model.tables import read_table


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheets. 1 GB is 1e9 bytes; link speeds are for one direction.

    The peak is that of dense 16-bit matrices, without the sheets' factor 2 for sparsity: bf16, or
    fp16 on V100 and T4, which have no bf16. The network speed is a GPU's share of the links between
    usual servers of eight (DGX A100 200 Gbit/s for each GPU, DGX H100 400; 12.5 for PCIe cards, an
    assumption). The price, in dollars on demand, is an assumption too: a round number in the range
    that clouds asked in 2024 and 2025.
    """

    device_name: str  # whole words of `torch.cuda.get_device_name()`
    peak_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float  # to its own memory
    link_bytes_per_s: float  # between the GPUs of a node: NVLink, or PCIe where there is none
    host_bytes_per_s: float  # to the memory of its node, by PCIe
    network_bytes_per_s: float
    price_per_hour: float

    @property
    def fast_numerics(self) -> Numerics:
        """The fastest of the types that raymill trains in: V100 and T4 have fp16 in place of
        bf16."""
        return FP32 if self.device_name in ("V100-SXM2", "T4") else BF16


GPUS = {name: Gpu(*row) for name, row in read_table(__file__, "gpus").items()}
"""By the name that users type."""

_VARIANT = re.compile(r"\b(MIG|Laptop|Max-Q|SUPER|Ti|D|NVL)\b")
"""Words that turn a name of the table into another GPU, or a part of one, with another peak."""


def gpu_of(device_name: str) -> Gpu | None:
    """Returns the GPU of that name, or None if it is not in the table: a guess would make false
    figures."""
    for gpu in GPUS.values():
        rest, found = re.subn(rf"(?<!\w){re.escape(gpu.device_name)}(?!\w)", "", device_name)
        if found and not _VARIANT.search(rest):
            return gpu
    return None
