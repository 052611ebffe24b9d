"""A lane along its CUDA branches, without a GPU: nothing waits for its values, all of it is there,
in the right types."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jobs.plan.memory import activation_bytes, block_bytes, gpu_memory, layout_of
from tests.gpu.fake_library import fake_cuda_library
from tests.gpu.trace_lane import BATCH_SIZE, CASES, LLAMA, LLAMA_CASES, SEQ_LEN, run_config
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.more

# Operations that wait for values; a trace without values would raise for most.
WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "unique",
    "_unique2",
    "unique_dim",
    "masked_select",
    "is_nonzero",
    "equal",
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    library = fake_cuda_library(tmp_path_factory.mktemp("cuda"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.trace_lane", library],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=limit_s(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_waits_or_leaves_the_gpu_is_seen(traces: dict[str, Any]) -> None:
    """Shows that the tests below can fail."""
    planted = traces["planted"]
    assert planted["item"] == "DataDependentOutputException"
    assert planted["nonzero"] == "DynamicOutputShapeException"
    assert planted["elsewhere"] == "_to_copy: cpu"
    assert planted["refused"] == "cumsum"


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_and_all_of_it_is_on_the_gpu(traces: dict[str, Any], case: str) -> None:
    operations = set(traces[case]["operations"])
    assert {"addmm", "native_layer_norm_backward", "_log_softmax", "_fused_adamw_"} <= operations
    assert operations & WAITING == set()
    assert traces[case]["refused"] == []
    assert traces[case]["elsewhere"] == []


@pytest.mark.parametrize("case", CASES)
def test_products_are_in_the_runs_precision_and_the_rest_in_fp32(
    traces: dict[str, Any], case: str
) -> None:
    types, product = traces[case]["types"], "torch.float32" if "fp32" in case else "torch.bfloat16"
    assert types["mm"] == types["addmm"] == types["gelu"] == [product]
    for name in (
        "native_layer_norm",
        "native_layer_norm_backward",
        "_log_softmax",
        "embedding",
        "add",
        "add_",
    ):
        assert types[name] == ["torch.float32"], name
    assert traces[case]["loss"] == "torch.float32"


def test_documents_are_borders_and_no_mask_where_flash_attention_can_compute(
    traces: dict[str, Any],
) -> None:
    for case in CASES:
        has_borders = {"_varlen_attn", "_varlen_attn_backward"} <= set(traces[case]["operations"])
        assert has_borders == (case in ("documents", "documents, recomputed"))


@pytest.mark.parametrize("case", ["documents", "documents, recomputed"])
def test_a_plans_memory_is_what_the_lane_takes(traces: dict[str, Any], case: str) -> None:
    """With the width and the context of 1.3B parameters."""
    config = run_config(**CASES[case])
    model, num_tokens = config.model, BATCH_SIZE * SEQ_LEN
    head = 4 * model.vocab_size * model.n_embd  # its gradient, which the loss has made already
    if config.train.recompute:
        head -= num_tokens * block_bytes(config)
    # The matrices are bf16 parameters: autograd keeps no rounded copies of them.
    assert traces[case]["kept_bytes"] == pytest.approx(activation_bytes(config) + head, rel=1e-3)
    parts = gpu_memory(config, layout_of(config), world_size=1)
    assert 1 <= sum(parts.values()) / traces[case]["peak_bytes"] < 1.1


def test_heads_that_share_keys_and_values__keep_them_once(traces: dict[str, Any]) -> None:
    configs = {
        case: run_config(LLAMA | LLAMA_CASES[case], document_mask=True) for case in LLAMA_CASES
    }
    all_heads, few_heads = configs.values()
    width, kv_width = all_heads.model.n_embd, few_heads.model.kv_width
    assert width == 4 * kv_width
    num_tokens = BATCH_SIZE * SEQ_LEN
    kept = [traces[case]["kept_bytes"] for case in LLAMA_CASES]
    spared_values = 2 * 2 * num_tokens * (width - kv_width)  # in bf16
    num_layers = all_heads.model.n_layer
    assert kept[0] - kept[1] == pytest.approx(num_layers * spared_values, rel=0.01)
    planned = [activation_bytes(config) for config in configs.values()]
    assert planned[0] - planned[1] == num_layers * spared_values
