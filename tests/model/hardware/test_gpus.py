"""GPUs are found by the names that they report and the names that users type."""

import pytest

from model.hardware.gpus import GPUS, gpu_of


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_gpu_is_known_by_its_device_name(device_name: str, name: str) -> None:
    assert gpu_of(device_name) is GPUS[name]


@pytest.mark.parametrize(
    "device_name",
    [
        "AMD EPYC",
        "NVIDIA L40",
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA A100X",
        "NVIDIA A10M",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H200 NVL",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla V100-PCIE-16GB",
        "NVIDIA T4G",
        "NVIDIA T400",
    ],
)
def test_no_peak_is_guessed(device_name: str) -> None:
    assert gpu_of(device_name) is None


def test_peaks_are_the_dense_ones_of_the_data_sheets() -> None:
    assert GPUS["h100"].peak_flops_per_s == 989e12
    assert GPUS["a100"].peak_flops_per_s == 312e12
    assert GPUS["v100"].peak_flops_per_s == 125e12
