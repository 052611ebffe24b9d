"""Says in a sentence why a self-test could not be taken at all: no memory left, a compiler that fails,
an operation that has no deterministic form. Whether a gradient is right is then not known."""

import torch

from model.kernels.native_library import NoNativeLibraryError
from model.operations import is_of_compiler, is_out_of_memory
from raymill.errors import UserError

_NOT_DETERMINISTIC = " does not have a deterministic implementation"  # torch's words
_OF_THIS_PROCESS = 2 << 30
"""Bytes that a process takes of a GPU beside what PyTorch counts, such as for kernels; at most."""

_NOTHING = "nothing was trained"


class UntestedError(UserError):
    """The self-test could not be taken."""

    def __init__(self, text: str, *, may_pass: bool = False) -> None:
        """`may_pass` tells that another try may have what this one lacked."""
        super().__init__(text)
        self.may_pass = may_pass


def why_untested(error: Exception, device: torch.device) -> UntestedError | None:
    """Returns None for an error that says nothing of that: a device may have failed."""
    is_gpu, text = device.type == "cuda", str(error)
    where = f"the self-test on {torch.cuda.get_device_name(device) if is_gpu else 'this processor'}"
    if is_out_of_memory(error) and is_gpu:
        free, total = torch.cuda.mem_get_info(device)
        return no_memory(where, free=free, total=total, own=torch.cuda.memory_reserved(device))
    if is_out_of_memory(error):
        return UntestedError(
            f"{where} needs more memory than there is ({_first_line(error)}): {_NOTHING}. Lower "
            "--train.micro-batch-size, or start workers with more memory"
        )
    if isinstance(error, NoNativeLibraryError):
        return UntestedError(
            f"{where} needs the kernels of train.compute=portable, and {error}: {_NOTHING}. Install g++, or leave "
            "--train.compute out"
        )
    if _NOT_DETERMINISTIC in text:
        operation = text.partition(_NOT_DETERMINISTIC)[0].split()[-1]
        return UntestedError(
            f"{where} needs {operation}, which has no deterministic form there: {_NOTHING}. Try --train.compute plain, "
            "or --train.exact false without equal bits"
        )
    if is_of_compiler(error):
        return UntestedError(
            f"{where} cannot compile its kernels ({_first_line(error)}): {_NOTHING}. Set --train.compute plain, or "
            "install what PyTorch's compiler misses, such as a C++ compiler"
        )
    return None


def no_memory(where: str, *, free: int, total: int, own: int) -> UntestedError:
    """Returns why a GPU with so many bytes has none left. Where other processes hold much of them,
    such as a worker that is just ending, another try may find more."""
    held = max(0, total - free - own)
    is_held = held > _OF_THIS_PROCESS
    advice = "end those, or " if is_held else ""
    return UntestedError(
        f"{where} needs more than its {total / 2**30:.1f} GiB of memory: this worker has {own / 2**30:.1f} GiB and "
        f"other processes hold {held / 2**30:.1f} GiB: {_NOTHING}. To need less, {advice}lower "
        "--train.micro-batch-size, set --train.recompute true, or --scaling.shard parameters",
        may_pass=is_held,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
