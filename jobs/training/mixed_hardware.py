"""Settles how a worker rounds, and compares the workers of an attempt with one another and with
earlier ones.

Bits are promised on one kind of hardware, library versions and thread count.
"""

import os
import platform
from collections.abc import Sequence

import torch

from cluster.settings.run import RunConfig, way_to_compute
from jobs.run.ledger import Ledger
from model.hardware.processor import cpu_features, cpu_field
from model.kernels.native_library import sources_hash

Hardware = dict[str, str]

_READ_BY_CUDA = {
    # cuBLAS chooses its algorithm by the memory that it may use, and torch's default differs from
    # GPU to GPU.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # In no library. TF32 drops 13 of a factor's 23 bits: a run in fp32 would differ from the same
    # run on CPUs in the fourth digit of each product. Speed is what `train.precision: bf16` is for,
    # which has twice that of TF32.
    "NVIDIA_TF32_OVERRIDE": "0",
}


def settle_rounding(config: RunConfig) -> None:
    """Makes this process compute the bits that any other one does on like hardware. CUDA must not
    have computed yet."""
    torch.set_num_threads(config.scaling.threads_per_worker)
    torch.set_float32_matmul_precision("highest")
    if config.scaling.use_gpu:
        os.environ |= _READ_BY_CUDA
        torch.use_deterministic_algorithms(config.train.exact)
    else:
        # The same but for the compiler's choices, whose import takes a second of each start: CPUs
        # compile nothing.
        torch.set_deterministic_debug_mode("error" if config.train.exact else "default")
    # Its debugging aid, NaN in all fresh memory, costs a pass over each activation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_here(config: RunConfig) -> torch.device:
    """Returns the device that this worker computes on, and settles its rounding."""
    settle_rounding(config)
    if not config.scaling.use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_of_worker(device: torch.device) -> dict[str, str]:
    """Returns which GPU a worker computes on, by its name and by the UUID under which `nvidia-smi`
    and a datacenter's tools know it; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    return {"device": f"{torch.cuda.get_device_name(device)} GPU-{uuid}"}


def hardware(config: RunConfig, device: torch.device) -> Hardware:
    """Returns what decides how this worker rounds: with portable kernels nothing but these."""
    if way_to_compute(config) == "portable":
        return {"portable_kernels": sources_hash()}
    found = {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }
    # Beside a GPU, a processor only draws the first weights, by its capability
    if device.type == "cpu":
        # The name of an x86 processor leaves its matrix units open.
        units = sorted(
            feature
            for feature in cpu_features()
            if feature.startswith(("amx_", "avx512_bf16", "avx_vnni"))
        )
        found["cpu"] = " ".join([cpu_field("model name") or platform.machine(), *units])
    if device.type == "cuda":
        found |= {name: os.environ.get(name, "none") for name in _READ_BY_CUDA}
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "multiprocessors": str(torch.cuda.get_device_properties(device).multi_processor_count),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "fp32_products": torch.get_float32_matmul_precision(),
            "compiler_deterministic": str(torch._inductor.config.deterministic),
        }
    return found


def differences(workers: Sequence[Hardware], *, nodes: Sequence[str]) -> list[str]:
    """Returns a line for each respect in which the workers, by rank, differ; empty where bits are
    promised. `nodes` has the name of each rank's node."""
    lines = []
    for name in sorted({name for worker in workers for name in worker}):
        ranks: dict[str, list[int]] = {}
        for rank, worker in enumerate(workers):
            ranks.setdefault(worker.get(name, "none"), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(
                f"{value} ({_places(having, nodes)})" for value, having in sorted(ranks.items())
            )
            lines.append(f"{name}: {values}")
    return lines


def _places(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    names = dict.fromkeys(nodes[rank] for rank in ranks)
    return f"rank {' '.join(map(str, ranks))} on {' '.join(names)}"


def changes(before: Ledger, now: Hardware) -> list[str]:
    """Returns a line for each respect in which rank 0 differs from the last attempt's. Respects
    that were not recorded then, by an earlier version, are left out."""
    starts = [start for start in before.events("start") if "hardware" in start]
    if not starts:
        return []
    recorded: Hardware = starts[-1]["hardware"]
    lines = []
    for name in sorted({*recorded, "gpu"}):
        earlier, later = recorded.get(name, "none"), now.get(name, "none")
        if earlier != later:
            lines.append(f"{name}: {earlier} until now, {later} from here on")
    return lines


def why_refused(config: RunConfig, before: Ledger, reasons: Sequence[str]) -> str | None:
    """Returns why the run must not go on, where the `reasons` would end its promise and nobody has
    agreed to that; else None. A run that trained so before has no promise left."""
    is_promised = config.train.exact and not before.events("tolerance_mode")
    if not reasons or not is_promised or config.scaling.mixed_hardware == "allow":
        return None
    return (
        f"the same bits are promised on one kind of hardware, and the workers' differs: {'; '.join(reasons)}. Give "
        "the run workers that are alike, or set scaling.mixed_hardware=allow to train without that promise; the same "
        "--run-id continues the run"
    )
