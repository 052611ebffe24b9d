"""Products in pieces have the bits of products in one: each number is one chain of fused operations
along the inner dimension."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels import portable

DEEP, WIDE = 700, 1700  # more than a piece has, in depth, and in rows and columns


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def numbers(rows: int, columns: int, *, is_transposed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 10_000 + columns)
    if is_transposed:
        return torch.randn(columns, rows, generator=generator).T
    return torch.randn(rows, columns, generator=generator)


def in_order(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product by chains. float64 holds each product of two numbers whole, so a sum of
    both is rounded once, but in one of 2^29 cases."""
    sums = np.zeros((len(a), b.shape[1]), dtype=np.float32)
    for k in range(a.shape[1]):
        outer = np.outer(a[:, k].double().numpy(), b[k].double().numpy())
        sums = (outer + sums).astype(np.float32)
    return torch.from_numpy(sums)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (7, DEEP, 5), (50, 257, 49), (9, 31, WIDE), (WIDE, 17, 3)],
)
def test_a_product_is_one_chain_for_each_number(
    rows: int, depth: int, columns: int, *, is_transposed: bool
) -> None:
    a = numbers(rows, depth, is_transposed=is_transposed)
    b = numbers(depth, columns, is_transposed=is_transposed)
    assert torch.equal(portable.product(a, b), in_order(a, b))


@pytest.mark.usefixtures("threads")
def test_a_bias_and_what_is_there_are_added_to_the_whole_sum() -> None:
    a, b, bias = numbers(20, DEEP), numbers(DEEP, 60), numbers(1, 60)[0]
    there = numbers(20, 60)
    whole = in_order(a, b)
    assert torch.equal(portable.product(a, b, bias), whole + bias)
    assert torch.equal(portable.product(a, b, added_to=there.clone()), there + whole)


@pytest.mark.usefixtures("threads")
def test_a_number_is_the_same_in_a_large_product_as_in_a_small_one() -> None:
    a, b = numbers(WIDE, 300), numbers(300, WIDE)
    large = portable.product(a, b)
    for at in (0, 509, 1690):
        some = slice(at, at + 10)
        assert torch.equal(large[some, some], portable.product(a[some], b[:, some]))
