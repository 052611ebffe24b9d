"""Where weights lie in memory: kernels may be chosen by that, so it is the same for any way to
share a run."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from jobs.plan.memory import layout_of
from model.gpt import GPT
from raymill.state.gathered_weights import block_homes
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from tests.jobs.lone_rank import rank_0_of
from tests.jobs.shardings import sharding
from tests.jobs.train_worlds import CPU

MODULUS = 256  # bytes: PyTorch tells cuBLASLt no more of an address


class _WeightsInUse(Exception):  # noqa: N818 (nothing is wrong)
    pass


class Rows:
    """Asked for rows, it notes where the weights lie that the model is about to compute with, and
    ends the step."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self.places: dict[str, int] = {}

    def read_ahead(self, indices: Any) -> None:
        pass

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        for name, parameter in self._model.named_parameters():
            self.places[name] = parameter.data_ptr() % MODULUS
        raise _WeightsInUse


def config_of(width: int, *, llama: bool, precision: str, compute: str) -> RunConfig:
    model = {
        "preset": "tiny",
        "n_layer": 3,
        "n_embd": 2 * width,
        "n_head": 1,
        "vocab_size": 301,
        "n_positions": 9,
    }
    if llama:
        model |= {
            "architecture": "llama",
            "activation_function": "swiglu",
            "n_inner": 3 * width + 1,
        }
    train = {
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "max_tokens": 10**6,
        "precision": precision,
        "compute": compute,
    }
    return RunConfig.model_validate({"model": model, "train": train, "scaling": {"max_workers": 1}})


def weight_places(config: RunConfig, shard: Shard, world_size: int) -> dict[str, int]:
    """Returns where each weight lies with which rank 0 computes, modulo 256 bytes."""
    with rank_0_of(world_size) as group:
        divided = sharding(shard, world_size=world_size)
        state = run_state(
            GPT(config.model), config.train, device=CPU, group=group, sharding=divided
        )
        rows = Rows(state.model)
        gradient = step_gradient(config, state, rows, group, eot_id=None)  # type: ignore[arg-type]
        for flat in (state.values, state.gradient, *state.vectors.values()):
            assert flat.data_ptr() % MODULUS == 0
        with pytest.raises(_WeightsInUse):
            gradient.of_step(1, StepTimer())
        gradient.close()
        state.close()
    return rows.places


@settings(max_examples=8)
@given(
    st.integers(1, 150),
    st.booleans(),
    st.sampled_from(["fp32", "bf16"]),
    st.randoms(use_true_random=False),
)
def test_weights_lie_at_the_same_places_modulo_256_bytes__however_a_run_is_sharded(
    width: int, llama: bool, precision: str, random: Any
) -> None:
    config = config_of(width, llama=llama, precision=precision, compute="cpu")
    expected = weight_places(config, "none", 1)
    # So that memory begins elsewhere
    rest = [bytearray(random.randrange(1, 4000)) for _ in range(20)]
    for shard in get_args(Shard):
        world_size = random.randrange(2, 5)
        assert weight_places(config, shard, world_size) == expected, (shard, world_size)
    del rest


@settings(max_examples=8)
@given(st.integers(1, 150), st.booleans())
def test_bf16_matrices_are_as_aligned_as_the_copies_that_autocast_makes(
    width: int, llama: bool
) -> None:
    config = config_of(width, llama=llama, precision="bf16", compute="plain")
    places = weight_places(config, "parameters", 3)
    layout = layout_of(config)
    for name, place in layout.places.items():
        if any(span.start <= place.start < span.stop for span in layout.decoder_blocks):
            assert places[name] == 0, name
        else:
            assert places[name] == 4 * place.start % MODULUS, (
                "autocast copies them, or they are read in fp32"
            )


def test_matrices_of_usual_widths_travel_together() -> None:
    model = {"n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 301, "n_positions": 16}
    layout = layout_of(RunConfig.model_validate({"model": model}))
    for span in layout.decoder_blocks:
        (home,) = block_homes(layout, span, torch.bfloat16, apart=True)
        assert (home.span, home.start) == (span, 0)
