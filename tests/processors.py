"""The processors that this one can be, by what kernels are compiled for."""

import platform

from model.hardware.processor import cpu_features
from model.kernels.native_library import TARGETS

RUNNABLE = [
    march for march, needs in TARGETS.get(platform.machine(), {}).items() if needs <= cpu_features()
]
"""GCC's names, the fastest first."""
