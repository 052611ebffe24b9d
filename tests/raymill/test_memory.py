"""Memory that training lends the model changes no bits, and no new memory is needed after the first
step."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from model.cpu_ops.operations import cross_entropy
from model.linear_cross_entropy import IGNORE_INDEX
from raymill.loans import Scratch, lent, scratch_memory
from raymill.memory import large_zeros

VOCAB_SIZE, WIDTH, NUM_TOKENS, CHUNK_TOKENS = 307, 32, 100, 48  # the last chunk is a smaller one

FAULTS_OF_ALLOCATIONS = """
import resource, torch
from model.hardware.memory import keep_freed_memory
if {keeps}:
    keep_freed_memory()
def use() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(1 << 22) for _ in range(8)]  # 16 MiB each
    del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(sum(use() for _ in range(6)))
"""


def loss_and_gradients(precision: torch.dtype, scratch: Scratch | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    targets[::7] = IGNORE_INDEX
    is_rounded = precision == torch.bfloat16
    with (
        lent(scratch_memory, scratch),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_rounded),
    ):
        loss = cross_entropy(hidden, weight, targets, scale=1 / 64, chunk_tokens=CHUNK_TOKENS)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_scratch_leaves_the_bits_as_they_are(precision: torch.dtype) -> None:
    scratch = Scratch()
    without = loss_and_gradients(precision, None)
    for _ in range(2):  # the second time on what the first one left
        for ours, expected in zip(loss_and_gradients(precision, scratch), without, strict=True):
            assert torch.equal(ours, expected)


def test_scratch_holds_the_scores_of_the_largest_chunk_and_is_used_again() -> None:
    scratch = Scratch()
    loss_and_gradients(torch.float32, scratch)
    before = scratch.piece("scores", (VOCAB_SIZE, CHUNK_TOKENS), torch.float32)
    before.fill_(float("nan"))
    loss_and_gradients(torch.float32, scratch)
    after = scratch.piece("scores", (VOCAB_SIZE, CHUNK_TOKENS), torch.float32)
    assert after.data_ptr() == before.data_ptr() and after.isfinite().all()


@pytest.mark.more
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    faults = {
        keeps: int(
            subprocess.check_output(
                [sys.executable, "-c", FAULTS_OF_ALLOCATIONS.format(keeps=keeps)]
            )
        )
        for keeps in (False, True)
    }
    # Not 0: the pieces that are free must first grow to fit
    assert faults[True] < faults[False] / 4


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (1 << 21) + 3])
def test_large_zeros_are_zeros_whichever_pages_they_lie_in(size: int) -> None:
    values = large_zeros(size, dtype=torch.bfloat16)
    assert values.shape == (size,) and values.dtype == torch.bfloat16 and values.eq(0).all()
    values.fill_(1)  # every byte is there
    assert values.sum(dtype=torch.float64) == size
