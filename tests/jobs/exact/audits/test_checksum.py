"""Checksums see every bit and every place, and do not depend on how the values are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.exact.audits.checksum import (
    checksum,
    checksum_of_turns,
    from_halves,
    halves_of,
    words_of,
)

SIZE = 70_000  # more than one chunk


def made_values(dtype: torch.dtype, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def number(values: Tensor, *, start: int = 5) -> int:
    [found] = from_halves(halves_of([checksum(values, start=start)]).tolist())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_sum_of_words_times_the_odd_numbers_of_their_places(dtype: torch.dtype) -> None:
    values = made_values(dtype)
    words = words_of(values).tolist()
    expected = sum(word * (2 * (5 + place) + 1) for place, word in enumerate(words))
    assert number(values) == expected % 2**64


@given(st.integers(0, SIZE))
def test_parts_have_the_sum_of_the_whole(cut: int) -> None:
    values = made_values(torch.float32)
    parts = number(values[:cut]) + number(values[cut:], start=5 + cut)
    assert parts % 2**64 == number(values)


@given(st.integers(0, SIZE - 1), st.integers(0, 31), st.integers(0, SIZE - 1))
def test_a_flipped_bit_changes_it_and_so_do_two_of_the_same_bit(
    place: int, bit: int, other: int
) -> None:
    values = made_values(torch.float32)
    before, words = number(values), words_of(values)
    mask = -(2**31) if bit == 31 else 1 << bit
    words[place] ^= mask
    assert number(values) != before
    if other != place:
        words[other] ^= mask
        assert number(values) != before


def test_values_that_changed_places_change_it() -> None:
    values = made_values(torch.float32)
    assert number(values.roll(1)) != number(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_nan_is_as_good_as_another_and_no_number(dtype: torch.dtype) -> None:
    values = made_values(dtype)
    usual = number(values)

    def of(place: int, value: float, *, flip: int = 0, one_nan: bool = True) -> int:
        changed = values.clone()
        changed[place] = value
        words_of(changed)[place] ^= flip
        total = checksum(changed, start=5, one_nan=one_nan)
        return from_halves(halves_of([total]).tolist())[0]

    nan, last = float("nan"), SIZE - 1
    assert of(last, nan) == of(last, nan, flip=1) != usual
    assert of(last, nan, one_nan=False) != of(last, nan, flip=1, one_nan=False)
    assert of(7, nan) != of(8, nan)
    assert of(7, float("inf")) not in (usual, of(7, nan), of(7, -float("inf")))
    [same] = from_halves(halves_of([checksum(values, start=5, one_nan=True)]).tolist())
    assert same == usual


def test_turns_that_changed_places_change_the_checksum_of_all_and_so_does_a_loss() -> None:
    turns = [torch.tensor(7), torch.tensor(9)]
    losses = [torch.tensor(0.5), torch.tensor(0.25)]
    usual = int(checksum_of_turns(turns, losses))
    assert int(checksum_of_turns(turns[::-1], losses)) != usual
    assert int(checksum_of_turns(turns, losses[::-1])) != usual
    assert int(checksum_of_turns(turns[:1], losses)) != usual


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_a_checksum_passes_through_float64_whole(sums: list[int]) -> None:
    halves = halves_of([torch.tensor(value) for value in sums])
    assert halves.dtype == torch.float64
    assert from_halves(halves.tolist()) == [value % 2**64 for value in sums]
