"""The computations whose code is compiled: a training step's blocks and head as a run with GPUs
computes them, and beside them what updates the weights.

Each runs on tensors that have a shape and a device but no memory, with the product's own settings:
exact, with documents and recomputation. What a run does not compile (embeddings, the last norm, the
sums of lanes) is computed by PyTorch's own kernels, of which nothing is seen here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cluster.settings.run import RunConfig
from jobs.exact.compute import autocast, choose_operations
from jobs.exact.run_state import run_state
from jobs.exact.run_values import update_rule
from jobs.training.mixed_hardware import settle_rounding
from model.decoders.make import new_decoder
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.update_rule import Stretch
from raymill.sums.step_totals import FAST_NORM
from tests.foreign_models import small
from tests.gpu.trace_lane import BATCH_SIZE, LLAMA, SEQ_LEN, batch_of

FAMILIES = ("qwen3", "gemma3_text", "olmo2", "mistral", "gpt_neox")
"""With norms of queries and keys; with windows and two kinds of layers; with norms after each part;
with a window; with biases, LayerNorm and attention beside the feed-forward layer."""

PRECISIONS = ("bf16", "fp32")

_WIDE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 8192,
    "max_position_embeddings": SEQ_LEN,
    "vocab_size": 50257,
}
"""The width of 1.3B parameters; one layer, as all of a kind have the same code."""

_OF_FAMILY: Mapping[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "head_dim": 128,
        "sliding_window": 1024,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 1024},
}

_OF_OWN: Mapping[str, dict[str, Any]] = {"gpt2": {}, "llama": LLAMA | {"n_kv_head": 8}}


def _settings_of(model: str) -> dict[str, Any]:
    if model in FAMILIES:
        return {"config": small(model, **(_WIDE | _OF_FAMILY.get(model, {}))).values}
    own = {"preset": "gpt3-1.3b", "n_layer": 1}
    return own | _OF_OWN[model]


def run_config(model: str, precision: str, **train: Any) -> RunConfig:
    """Returns a run on GPUs of one micro-batch a lane."""
    sizes = {"micro_batch_size": BATCH_SIZE, "global_batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    ways = {"compute": "compiled", "document_mask": True, "recompute": True}
    return RunConfig.model_validate(
        {
            "model": _settings_of(model),
            "train": {"precision": precision} | sizes | ways | train,
            "scaling": {"max_workers": 1, "use_gpu": True},
        }
    )


@contextmanager
def _on_the_gpu(config: RunConfig) -> Any:
    """Lasts while tensors are made on the GPU, and this process rounds as a worker does."""
    settle_rounding(config)
    # Constants of transformers' modules have values
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


def lane(model: str, precision: str) -> None:
    """Computes the loss of a micro-batch and its gradient: blocks and head, forward and
    backward."""
    config = run_config(model, precision)
    with torch.device("meta"):
        decoder = new_decoder(config.model)
    with _on_the_gpu(config) as device:
        state = run_state(decoder, config.train, device=device)
        choose_operations(decoder.train(), config)
        with device:
            batch = batch_of(config)
        with autocast(config, device):
            loss = state.model.loss(*batch, scale=1e-4)
        loss.backward()


MATRIX = HiddenMatrix((2048, 6144), 1, (2048, 2048, 2048))
"""Queries, keys and values of a block, which Muon updates one by one."""


def muon(precision: str) -> None:
    """Updates a matrix. AdamW is one call of PyTorch's own kernel, which its compiler leaves
    alone."""
    config = run_config("gpt2", precision, optimizer="muon")
    rule = update_rule(config.train)

    def update(tensors: Sequence[Tensor]) -> None:
        values, gradient, momentum, count = tensors
        stretch = Stretch(values, gradient, [momentum], count, decays=True, matrix=MATRIX)
        rule.update([stretch], learning_rate=1e-3)

    with _on_the_gpu(config) as device, device:
        flat = [torch.empty(2048 * 6144) for _ in range(3)]
        _compiled(update)([*flat, torch.zeros(())])


def norm(precision: str) -> None:
    """Computes the sums of squares of which a gradient's norm is made."""
    config = run_config("gpt2", precision)
    with _on_the_gpu(config) as device, device:
        _compiled(FAST_NORM.of_blocks)(torch.empty(50_000_000))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


MODELS = (*_OF_OWN, *FAMILIES)

CASES: dict[str, Callable[[], None]] = {
    **{f"{m}, {p}": partial(lane, m, p) for m in MODELS for p in PRECISIONS},
    **{f"muon, {p}": partial(muon, p) for p in PRECISIONS},
    "gradient norm, fp32": partial(norm, "fp32"),
}

PLANTED = "planted faults"
"""The name of what must be found (`planted`)."""
