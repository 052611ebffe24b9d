"""Compares the workers of an attempt: bits are promised on one kind of hardware, library versions and thread count."""

import platform

import torch

from model.processor import cpu_features, cpu_field

Hardware = dict[str, str]


def hardware(device: torch.device) -> Hardware:
    """Returns what decides how this worker rounds."""
    # The name of an x86 processor leaves its matrix units open.
    units = sorted(feature for feature in cpu_features() if feature.startswith(("amx_", "avx512_bf16", "avx_vnni")))
    found = {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": " ".join([cpu_field("model name") or platform.machine(), *units]),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def differences(workers: list[Hardware]) -> list[str]:
    """Returns a line for each respect in which the workers, by rank, differ; empty where bits are promised."""
    lines = []
    for name in sorted({name for worker in workers for name in worker}):
        ranks: dict[str, list[str]] = {}
        for rank, worker in enumerate(workers):
            ranks.setdefault(worker.get(name, "none"), []).append(str(rank))
        if len(ranks) > 1:
            values = ", ".join(f"{value} (rank {' '.join(of)})" for value, of in sorted(ranks.items()))
            lines.append(f"{name}: {values}")
    return lines
