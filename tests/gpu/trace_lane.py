"""Traces a lane along its CUDA branches, on tensors that have a shape and a device but no memory,
and prints what it saw.

    python -m tests.gpu.trace_lane LIBRARY

LIBRARY is `fake_cuda.cpp`, compiled. Prints a JSON object by case: see `traced`, and `planted` for
what it refuses. Attention without documents is traced as matrix products: only a PyTorch with CUDA
chooses among its fused kernels.
"""

import ctypes
import json
import sys
import weakref
from typing import Any

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before PyTorch asks which devices there are

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.settings.run import RunConfig
from jobs.exact.compute import MicroBatch, autocast, choose_operations
from jobs.exact.run_state import run_state
from model.attention import Documents
from model.gpt import GPT
from raymill.state.sharding import Sharding
from raymill.sums.lane_sums import LaneSums
from raymill.sums.step_plan import StepPlan
from tests.cuda_alerts import CudaAlerts

BATCH_SIZE, SEQ_LEN = 2, 2048

CASES: dict[str, dict[str, Any]] = {
    "whole rows": {},
    "documents": {"document_mask": True},
    "documents, recomputed": {"document_mask": True, "recompute": True},
    "documents, fp32": {"document_mask": True, "precision": "fp32"},
}
LLAMA: dict[str, Any] = {
    "architecture": "llama",
    "activation_function": "swiglu",
    "tie_word_embeddings": False,
}
LLAMA_CASES: dict[str, dict[str, Any]] = {
    "llama, 32 heads": {"n_kv_head": 32},
    "llama, 8 of 32 heads": {"n_kv_head": 8},
}
"""Of documents; the keys and values of so many heads."""


def run_config(model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Returns a run with the width of 1.3B parameters, and four of its layers."""
    sizes = {"micro_batch_size": BATCH_SIZE, "global_batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    return RunConfig.model_validate(
        {
            "model": {"preset": "gpt3-1.3b", "n_layer": 4} | (model or {}),
            # Compiled kernels compute the same operations, which the compiler is given.
            "train": {"precision": "bf16", "compute": "plain"} | sizes | train,
            "scaling": {"max_workers": 1, "use_gpu": True},
        }
    )


class Seen(TorchDispatchMode):
    """The operations that reach the device, the types of what they return, and the bytes that are
    alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.devices: set[str] = set()
        self.types: dict[str, set[str]] = {}
        self._living: set[int] = set()
        self._bytes, self.peak_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if func.namespace != "prim":
            name = func.overloadpacket.__name__
            self.operations.add(name)
            self.devices |= {
                f"{name}: {tensor.device}" for tensor in tensors if tensor.device.type != "cuda"
            }
            self.types.setdefault(name, set()).update(
                str(t.dtype) for t in tree_leaves(out) if isinstance(t, Tensor)
            )
        for tensor in tensors:
            self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Counts the tensor's memory for as long as it is used."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._living:
            self._living.add(storage._cdata)
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, data: int, num_bytes: int) -> None:
        self._living.discard(data)
        self._bytes -= num_bytes


def batch_of(config: RunConfig) -> MicroBatch:
    """Returns rows on torch's default device, in the form that `jobs.exact.compute.micro_batch` gives
    them on a GPU."""
    ids = torch.zeros(BATCH_SIZE, SEQ_LEN, dtype=torch.int64)
    if not config.train.document_mask:
        return MicroBatch(ids, ids, None, None)
    if config.model.by_transformers:
        return MicroBatch(ids, ids, ids, None)
    if config.train.numerics.has_flash_attention:
        return MicroBatch(ids, ids, ids, Documents(torch.zeros(65, dtype=torch.int32), SEQ_LEN))
    mask = torch.zeros(BATCH_SIZE, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    return MicroBatch(ids, ids, ids, mask)


def traced(config: RunConfig) -> dict[str, Any]:
    """Returns the operations of forward, loss, backward, the sum of lanes and the update; what was
    refused or not on the GPU; types; and the bytes that forward keeps for backward beside the
    parameters."""
    device, kept = torch.device("cuda"), {}
    with FakeTensorMode(), device:
        state = run_state(GPT(config.model).train(), config.train, device=device)
        choose_operations(state.model, config)
        sums = LaneSums(state, [state.gradient], lends=False, on_final=lambda bucket: None)
        batch = batch_of(config)
        own = {parameter.untyped_storage()._cdata for parameter in state.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        seen, refused = Seen(), CudaAlerts()
        for tensor in (state.values, state.gradient, *state.vectors.values()):
            seen.count(tensor)
        with refused, seen, sums.turn(StepPlan(Sharding(), num_lanes=2, num_micro_batches=1), 1):
            with (
                autocast(config, device),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                loss = state.model.loss(*batch, scale=1e-4)
            loss.backward()
        with refused, seen:
            state.apply(norm=2.0, learning_rate=1e-3)
    return {
        "operations": sorted(seen.operations),
        "refused": sorted(refused.found),
        "elsewhere": sorted(seen.devices),
        "types": {name: sorted(types) for name, types in seen.types.items()},
        "loss": str(loss.dtype),
        "kept_bytes": sum(kept.values()),
        "peak_bytes": seen.peak_bytes,
    }


def planted() -> dict[str, str]:
    """Returns what happens to operations that wait for a GPU's values, or that take place on the
    host."""
    found = {}
    with FakeTensorMode(), torch.device("cuda"):
        for name, operation in {"item": torch.Tensor.item, "nonzero": torch.Tensor.nonzero}.items():
            try:
                operation(torch.ones(1))
            except RuntimeError as error:
                found[name] = type(error).__name__
        with Seen() as seen:
            torch.ones(2).cpu()
        with CudaAlerts() as refused:
            torch.ones(2).cumsum(0)
    return found | {"elsewhere": "; ".join(seen.devices), "refused": "; ".join(refused.found)}


if __name__ == "__main__":
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_: True  # autocast asks
    torch.cuda.Stream = lambda *_: None  # for copies to the host, of which a lane takes none
    found = {name: traced(run_config(**changes)) for name, changes in CASES.items()}
    for name, heads in LLAMA_CASES.items():
        found[name] = traced(run_config(LLAMA | heads, document_mask=True))
    print(json.dumps(found | {"planted": planted()}))
