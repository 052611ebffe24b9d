"""What a worker of `bench_sharded` holds and sends, read from within: resident memory, tensors, the
bytes of its sockets."""

import ctypes
import gc
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_BYTES_SENT = 200  # the place of tcpi_bytes_sent in Linux's struct tcp_info, since 4.19
_OWN_CODE = ("jobs", "model", "tests")
MENTIONED_BYTES = 1 << 20  # smaller tensors are not worth a line


class Held(NamedTuple):
    """One storage, and a tensor that lies in it."""

    num_bytes: int
    tensor: Tensor

    def __str__(self) -> str:
        shape, dtype = tuple(self.tensor.shape), str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.num_bytes / 1e6:.1f} MB {dtype} {shape}"


def give_back() -> None:
    """Returns memory that was freed to the system, so that what comes next is not hidden in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    return _status("VmRSS:")


def peak_bytes() -> int:
    """Returns the most that was resident since `reset_peak`."""
    return _status("VmHWM:")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(field)[2].split()[0])


def socket_bytes() -> int:
    """Returns the bytes that this process has sent over its open TCP connections, as the kernel
    counts them."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            own = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # the descriptor of the listing itself
            continue
        with own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total


def key(tensor: Tensor) -> int:
    """Returns what tensors with the same storage have in common."""
    return tensor.untyped_storage()._cdata


def storages(tensors: Iterable[Tensor]) -> dict[int, Held]:
    """Returns each storage of these once, by its key, with its largest tensor; a released one has
    no bytes."""
    found: dict[int, Held] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor) or tensor.device.type != "cpu":
            continue  # a DTensor's part is a tensor of its own
        known = found.get(key(tensor))
        if known is None or tensor.numel() > known.tensor.numel():
            found[key(tensor)] = Held(tensor.untyped_storage().nbytes(), tensor)
    return found


def held_by_process() -> dict[int, Held]:
    """Returns the storages of all tensors that Python knows, and of gradients."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    gradients = [value.grad for value in tensors if value.is_leaf and value.grad is not None]
    return storages([*tensors, *gradients])


def num_bytes(held: dict[int, Held]) -> int:
    return sum(each.num_bytes for each in held.values())


def named_tensors(**roots: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that objects of raymill's own code keep, with the way to each through
    their attributes."""
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = list(roots.items())
    while queue:
        name, value = queue.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, DTensor):
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            queue += [(f"{name}.{each}", parameter) for each, parameter in value.named_parameters()]
        elif isinstance(value, dict):
            queue += [(f"{name}[{key!r:.40}]", each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            queue += [(f"{name}[{k}]", each) for k, each in enumerate(value)]
        elif type(value).__module__.partition(".")[0] in _OWN_CODE:
            queue += [
                (f"{name}.{key}", each) for key, each in getattr(value, "__dict__", {}).items()
            ]


class NewMemory(TorchDispatchMode):
    """Sees each storage that this thread makes, with the operation that made it, or that gets its
    memory back."""

    def __init__(self, before: dict[int, Held], names: dict[int, str]) -> None:
        super().__init__()
        self._before, self._names = before, names
        self._released = {
            place: held.tensor for place, held in before.items() if not held.num_bytes
        }
        # bytes, by what it is; the tensors themselves must go when the step is done
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            key(tensor) for tensor in _tensors((*args, *(kwargs or {}).values()))
        } | self._before.keys()
        for tensor in _tensors([made]):
            if key(tensor) not in given:  # else it is a view, or written in place
                self._see(tensor, f"by {func.__name__}")
        for place, tensor in list(self._released.items()):
            if tensor.untyped_storage().nbytes():
                self._see(
                    self._released.pop(place), f"filled again: {self._names.get(place, 'unnamed')}"
                )
        return made

    def _see(self, tensor: Tensor, text: str) -> None:
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes >= MENTIONED_BYTES:
            self.seen[f"{Held(num_bytes, tensor)} {text}"] = num_bytes


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and not isinstance(value, DTensor):
            yield value
