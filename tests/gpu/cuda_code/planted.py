"""Faults that the checks must find, compiled as all else is: by the compiler without deterministic
algorithms, and in kernels written here."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.cuda_code.report import Written


def not_deterministic() -> None:
    """Adds rows up by their number, and the columns of a matrix and of a transposed one, as PyTorch
    does by default."""

    def sums(table: Tensor, numbers: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return table.index_add(0, numbers, rows), (rows + rows.view(2048, 4096).T).sum(1)

    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(), torch.device("cuda"):
        table, rows = torch.empty(50257, 2048), torch.empty(4096, 2048)
        numbers = torch.empty(4096, dtype=torch.int64)
        torch.compile(sums, fullgraph=True, dynamic=False)(table, numbers, rows)


@triton.jit
def softmax_of_a_large_tile(x, y, stride, m: tl.constexpr, k: tl.constexpr):
    """Needs more values at a time than its threads have registers."""
    rows, columns = tl.arange(0, m)[:, None], tl.arange(0, k)[None, :]
    tile = tl.load(x + rows * stride + columns)
    e = tl.exp(tile - tl.max(tile, axis=1)[:, None])
    tl.store(y + rows * stride + columns, e / tl.sum(e, axis=1)[:, None] + tile)


@triton.jit
def product(a, b, c, stride, m: tl.constexpr, k: tl.constexpr, precision: tl.constexpr):
    rows, columns, inner = tl.arange(0, m), tl.arange(0, m), tl.arange(0, k)
    x = tl.load(a + rows[:, None] * stride + inner[None, :])
    y = tl.load(b + inner[:, None] * stride + columns[None, :])
    z = tl.dot(x, y, input_precision=precision)
    tl.store(c + rows[:, None] * stride + columns[None, :], z)


def written_kernels(arch: int) -> list[Written]:
    """Returns a kernel that spills, a product in fp32 without tensor cores, and one in bf16 that is
    as it should be."""
    tile = {"x": "*fp32", "y": "*fp32", "stride": "i32", "m": "constexpr", "k": "constexpr"}
    return [
        _kernel("spills", softmax_of_a_large_tile, tile, {"m": 64, "k": 1024}, arch),
        _product("product in fp32", "fp32", "ieee", arch),
        _product("product in bf16", "bf16", "tf32", arch),
    ]


def _product(name: str, dtype: str, precision: str, arch: int) -> Written:
    pointers = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32", "stride": "i32"}
    signature = pointers | dict.fromkeys(("m", "k", "precision"), "constexpr")
    return _kernel(name, product, signature, {"m": 64, "k": 64, "precision": precision}, arch)


def _kernel(
    name: str,
    function: Callable[..., None],
    signature: dict[str, str],
    constants: dict[str, object],
    arch: int,
) -> Written:
    source = ASTSource(function, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    return Written(
        name=name,
        heuristic="FIXED",
        has_product="dot" in made.asm["ttir"],
        is_settled=True,
        num_configurations=1,
        cubins=[made.asm["cubin"]],
    )
