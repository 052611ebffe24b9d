"""Where a worker of the proof computes, and what carries its messages: gloo on CPUs, NCCL where each
worker has a GPU of its own, and gloo through the host's memory where several share one.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MESSAGE_LIMIT = timedelta(seconds=240)  # of a worker whose others are busy or gone


def meet(kind: str, *, rank: int, num_workers: int, store: Path) -> torch.device:
    """Has the workers of a stint meet by the file `store`. Returns this one's device, of the kind
    "cpu" or "cuda"."""
    device, backend = torch.device("cpu"), "gloo"
    if kind == "cuda":
        # Read where CUDA begins: the memory by which cuBLAS chooses algorithms, and fp32 that is fp32
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0"}
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device on this machine")
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if shares_a_gpu(kind, num_workers=num_workers):
            pass_through_the_host()
        else:
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_workers,
        timeout=_MESSAGE_LIMIT,
    )
    return device


def shares_a_gpu(kind: str, *, num_workers: int) -> bool:
    """Reports whether there are more workers than GPUs."""
    return kind == "cuda" and num_workers > torch.cuda.device_count()


def pass_through_the_host() -> None:
    """Sends a GPU's messages through the host's memory: NCCL refuses two ranks on one card, and
    gloo sends none from a GPU. All else about the exchange is the product's."""
    batch, all_to_all = dist.batch_isend_irecv, dist.all_to_all_single
    # As older versions of PyTorch call it: a machine with a GPU that is only to prove this may have
    # one.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

    def staged_batch(messages: list[dist.P2POp]) -> list[dist.Work]:
        staged: list[dist.P2POp] = []
        for message in messages:
            host = message.tensor.cpu()
            staged.append(dist.P2POp(message.op, host, message.peer, tag=message.tag))
        for work in batch(staged):
            work.wait()
        for message, arrived in zip(messages, staged, strict=True):
            if message.op is dist.irecv:
                message.tensor.copy_(arrived.tensor)
        return []

    def staged_all_to_all(
        received: Tensor, sent: Tensor, num_received: list[int], num_sent: list[int]
    ) -> None:
        staged = received.cpu()
        all_to_all(staged, sent.cpu(), num_received, num_sent)
        received.copy_(staged)

    def staged_gather(table: Tensor, own: Tensor) -> None:
        staged = table.cpu()
        gather(staged, own.cpu())
        table.copy_(staged)

    torch_distributed: Any = dist
    torch_distributed.batch_isend_irecv = staged_batch
    torch_distributed.all_to_all_single = staged_all_to_all
    torch_distributed.all_gather_single = staged_gather
