"""The engine gives the same answers on every processor, with any number of threads."""

import os
from typing import Any

import pytest

from model.kernels.native_library import MARCH_VARIABLE
from model.rotary import exact_frequencies, frequencies
from tests.json_program import last_line_of
from tests.processors import RUNNABLE
from tests.serving.engine.portable_answers import MODELS


def answers_of(march: str, threads: int, **more: str) -> dict[str, Any]:
    environment = os.environ | {MARCH_VARIABLE: march} | more
    program = ("-m", "tests.serving.engine.portable_answers", str(threads))
    return last_line_of(*program, env=environment)


@pytest.mark.more
def test_an_engines_answers__whatever_the_processor_and_pytorchs_kernels__are_the_same() -> None:
    least = answers_of(RUNNABLE[-1], 1, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    most = answers_of(RUNNABLE[0], 3)
    assert len(least) == 6
    for name, (is_portable, events) in most.items():
        assert len(events) == 160
        assert is_portable == (not name.endswith("bfloat16") or "bf16" not in RUNNABLE[0])
        if is_portable:
            assert events == least[name][1], name


def test_exact_frequencies__are_those_that_models_train_with_to_a_rounding() -> None:
    for config in MODELS.values():
        assert exact_frequencies(config).tolist() == pytest.approx(
            frequencies(config).tolist(), rel=3e-7
        )
