"""Which parts of FSDP2 run over gloo on CPUs, and how: each is tried in two processes."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cluster.settings.run import RunConfig
from model.gpt import GPT
from tests.benchmarks.stock_steps import Loss, fsdp2
from tests.benchmarks.worker_memory import socket_bytes

_SIZE = 1 << 20  # values of a whole tensor


def tried(rank: int, world_size: int, store: str) -> dict[str, str]:
    """Returns what was found of each part; all ranks call together."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    op = dist.ReduceOp
    parts: dict[str, Callable[[], str]] = {
        "all-gather, fp32": partial(_gather, torch.float32),
        "all-gather, bf16": partial(_gather, torch.bfloat16),
        "reduce-scatter, fp32, SUM": partial(_reduce, torch.float32, op.SUM),
        "reduce-scatter, fp32, AVG (FSDP2's default)": partial(_reduce, torch.float32, op.AVG),
        "reduce-scatter, fp32, PREMUL_SUM": lambda: _reduce(torch.float32, op.PREMUL_SUM(0.5)),
        "reduce-scatter, bf16, SUM": partial(_reduce, torch.bfloat16, op.SUM),
        "mixed precision: bf16, reduced in fp32": partial(_mixed, torch.float32),
        "mixed precision: bf16, reduced in bf16": partial(_mixed, torch.bfloat16),
        "prefetch, as FSDP2 does it": partial(_asynchronous_gathers, prefetches=False),
        "prefetch, by unshard(async_op=True)": partial(_asynchronous_gathers, prefetches=True),
    }
    found = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            found[name] = f"does not run: {str(error).splitlines()[0]}"
    dist.destroy_process_group()
    return found


def _gather(dtype: torch.dtype) -> str:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = torch.full((_SIZE // world_size,), float(rank + 1), dtype=dtype)
    whole = torch.empty(_SIZE, dtype=dtype)
    sent = _sent(lambda: dist.all_gather_single(whole, own))
    right = all(bool((part == n + 1).all()) for n, part in enumerate(whole.chunk(world_size)))
    return _verdict(right, sent / ((world_size - 1) * own.nbytes))


def _reduce(dtype: torch.dtype, op: Any) -> str:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = torch.full((_SIZE,), float(rank + 1), dtype=dtype)
    own = torch.empty(_SIZE // world_size, dtype=dtype)
    sent = _sent(lambda: dist.reduce_scatter_single(own, whole, op=op))
    total = world_size * (world_size + 1) / 2
    expected = total if op == dist.ReduceOp.SUM else total / world_size
    if expected != total and bool((own == total).all()):
        return "returns the sum, without an error"
    return _verdict(
        bool((own == expected).all()),
        sent / ((world_size - 1) / world_size * own.nbytes * world_size),
    )


def _verdict(is_right: bool, ratio: float) -> str:
    return f"{'runs' if is_right else 'returns something else'}; {ratio:.2f} times the bytes that it needs"


def _sent(call: Callable[[], object]) -> int:
    dist.barrier()
    before = socket_bytes()
    call()
    dist.barrier()
    return socket_bytes() - before


def _tiny_loss() -> tuple[Loss, Tensor]:
    config = RunConfig.model_validate({"model": {"preset": "tiny", "vocab_size": 101}}).model
    model = GPT(config)
    model.init_weights(0)
    return Loss(model), torch.arange(2 * (config.n_positions + 1)).view(2, -1) % config.vocab_size


def _backward(loss: Loss, rows: Tensor) -> Tensor:
    value: Tensor = loss(rows[:, :-1], rows[:, 1:])
    value.backward()
    return value


def _mixed(reduce_dtype: torch.dtype) -> str:
    loss, rows = _tiny_loss()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*loss.model.transformer.h, loss]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = _backward(loss, rows)
    gradients = [parameter.grad for parameter in loss.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return f"runs; the gradient is kept in {_dtypes(gradients)}, the loss is {value.item() / rows[:, 1:].numel():.3f}"


def _dtypes(tensors: list[Any]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _asynchronous_gathers(*, prefetches: bool) -> str:
    """Counts the gathers of a forward and a backward pass that return before they are done."""
    loss, rows = _tiny_loss()
    module, gather, seen = fsdp2(loss, prefetches=prefetches).module, dist.all_gather_single, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(bool(kwargs.get("async_op")))
        return gather(*args, **kwargs)

    dist.all_gather_single = counted
    try:
        assert isinstance(module, Loss)
        _backward(module, rows)
    finally:
        dist.all_gather_single = gather
    return f"{sum(seen)} of {len(seen)} gathers of a micro-batch run beside other work"
