"""The generations of GPUs for which code is compiled, and how PyTorch's compiler takes this machine
for one of them.

The generation decides which instructions there are. The number of multiprocessors decides how
sums are split. Both are those of one card of each generation, as its maker documents them.
"""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Target:
    """A card, as a program on it would see it."""

    arch: int  # the compute capability: 90 is 9.0, compiled as sm_90a
    card: str
    num_multiprocessors: int
    threads_of_multiprocessor: int
    shared_bytes_of_block: int
    shared_bytes_of_multiprocessor: int
    l2_bytes: int
    memory_bytes: int

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.arch, 10)

    @property
    def properties(self) -> SimpleNamespace:
        """What `torch.cuda.get_device_properties` would return."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.card,
            major=major,
            minor=minor,
            multi_processor_count=self.num_multiprocessors,
            warp_size=32,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=self.threads_of_multiprocessor,
            max_threads_per_block=1024,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared_bytes_of_block,
            shared_memory_per_multiprocessor=self.shared_bytes_of_multiprocessor,
            L2_cache_size=self.l2_bytes,
            total_memory=self.memory_bytes,
            uuid="0",
            gcnArchName="",
        )


_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

TARGETS = {
    target.arch: target
    for target in (
        Target(80, "A100", 108, 2048, 163 * _KIB, 164 * _KIB, 40 * _MIB, 80 * _GIB),
        Target(90, "H100", 132, 2048, 227 * _KIB, 228 * _KIB, 50 * _MIB, 80 * _GIB),
        Target(100, "B200", 148, 2048, 227 * _KIB, 228 * _KIB, 126 * _MIB, 180 * _GIB),
        Target(120, "RTX PRO 6000", 188, 1536, 99 * _KIB, 100 * _KIB, 128 * _MIB, 96 * _GIB),
    )
}
"""By compute capability: Ampere, Hopper, and Blackwell in data centers and in workstations."""

CUDA = "13.0"
"""The version of CUDA with which PyTorch 2.13 comes from PyPI."""


def pretend(target: Target) -> None:
    """Lets PyTorch, its compiler and Triton take this process to have that GPU, for as long as it
    lives. `fake_cuda.cpp` must have been loaded before PyTorch."""
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": target.properties,
        "get_device_capability": target.capability,
        "get_device_name": target.card,
        "synchronize": None,
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answering(answer))
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.Stream = _NoStream  # for copies to the host, of which a step takes none
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.version.cuda = CUDA
    # A constant is made on the CPU, and never copied to the GPU
    FakeTensorMode.avoid_device_init = property(lambda _: True)
    _pretend_to_the_compiler(target)


class _NoStream:
    def __init__(self, *_: object) -> None:
        pass


def _answering(answer: Any) -> Any:
    return lambda *_, **__: answer


def _pretend_to_the_compiler(target: Target) -> None:
    """Tells what has kept PyTorch's functions from before."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import pad_mm
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    for place, name, answer in (
        (CudaInterface, "get_device_properties", target.properties),
        (CudaInterface, "current_device", 0),
        (CudaInterface, "get_raw_stream", 0),
        (CudaInterface, "synchronize", None),
        (CudaInterface.Worker, "get_device_properties", target.properties),
    ):
        setattr(place, name, staticmethod(_answering(answer)))
    triton_target = GPUTarget("cuda", target.arch, 32)
    memory = {"max_shared_mem": target.shared_bytes_of_block}
    active = SimpleNamespace(
        get_current_target=_answering(triton_target),
        get_current_device=_answering(0),
        utils=SimpleNamespace(get_device_properties=_answering(memory)),
    )
    driver.set_active(active)
    triton_helpers.set_driver_to_gpu = lambda: None
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_the_host(folder: Any, node: Any) -> Any:
        with _OnTheHost():
            return deduce(folder, node)

    UniformValueConstantFolder._deduce_value = deduce_on_the_host
    # What a product that may be padded would be timed with: a timing itself fails
    pad_mm.no_dispatch = FakeTensorMode


class _OnTheHost(TorchDispatchMode):
    """Makes constants, which the compiler computes as it would on the GPU, on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        host = torch.device("cpu")
        args, named = tree_map_only(torch.device, lambda _: host, (args, kwargs or {}))
        return func(*args, **named)
