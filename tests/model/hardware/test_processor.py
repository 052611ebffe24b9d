"""A processor's fast precision is known from its features."""

import os

import pytest

from model.hardware.processor import cpu_features, cpu_precision, fast_precision

ZEN_4 = frozenset(("avx2", "avx512f", "avx512_bf16"))
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_bf16", "amx_tile"}
GRAVITON_3 = frozenset(("asimd", "sve", "bf16"))


@pytest.mark.parametrize(
    ("features", "environment", "precision"),
    [
        (ZEN_4, {}, "bf16"),
        (SAPPHIRE_RAPIDS, {}, "bf16"),
        (GRAVITON_3, {}, "bf16"),
        (frozenset(("avx2", "fma")), {}, "fp32"),
        (frozenset(("avx2", "avx512f", "avx512_vnni")), {}, "fp32"),
        (frozenset(), {}, "fp32"),
        (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32"),
        (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "fp32"),
        (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16"),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "bf16"),
        (SAPPHIRE_RAPIDS, {"ATEN_CPU_CAPABILITY": "avx2"}, "fp32"),
        (SAPPHIRE_RAPIDS, {"ATEN_CPU_CAPABILITY": "avx512"}, "bf16"),
        (GRAVITON_3, {"ATEN_CPU_CAPABILITY": "default"}, "bf16"),
    ],
)
def test_a_cpu_computes_bf16_at_speed_where_it_has_products_of_it_and_may_use_them(
    features: frozenset[str], environment: dict[str, str], precision: str
) -> None:
    assert cpu_precision(features, environment) == precision


def test_this_machine_is_asked() -> None:
    assert cpu_features(), "no features in /proc/cpuinfo"
    assert fast_precision("cpu") == cpu_precision(cpu_features(), os.environ)
