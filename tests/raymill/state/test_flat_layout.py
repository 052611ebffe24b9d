"""The flat layout: parts of whole blocks that cover each value once, buckets in the order of
backward."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import GPTConfig, preset_fields
from model.gpt import GPT
from model.shapes import parameter_shapes
from raymill.state.flat_layout import BLOCK, PIECE_VALUES, FlatLayout, part_of
from raymill.state.span import Span
from raymill.sums.step_totals import block_square_sums, norm_of


@given(st.integers(1, 3_000_000), st.integers(1, 9))
def test_parts_cover_each_value_once_in_whole_blocks(num_values: int, world_size: int) -> None:
    layout = FlatLayout({}, 0, -(-num_values // BLOCK) * BLOCK)
    ends = [0, *(bucket.stop for bucket in layout.buckets)]
    assert [bucket.start for bucket in layout.buckets] == ends[:-1]
    assert sum(map(len, layout.buckets)) == layout.size
    for bucket in layout.buckets:
        parts = [part_of(bucket, rank, world_size=world_size) for rank in range(world_size)]
        assert parts[0].start == bucket.start
        assert parts[-1].stop == bucket.stop
        assert all(before.stop == after.start for before, after in itertools.pairwise(parts))
        assert all(len(part) % BLOCK == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= BLOCK


def test_buckets_of_real_shapes() -> None:
    """A few for a small model, 4 to 25 MB for larger ones, and powers of two divide all but the
    last evenly."""
    sizes = {}
    for preset in ("small-10m", "gpt2-124m"):
        layout = FlatLayout.of(parameter_shapes(GPTConfig(**preset_fields({"preset": preset}))))
        sizes[preset] = 4 * len(layout.buckets[0])
        assert all(len(bucket) % (16 * BLOCK) == 0 for bucket in layout.buckets[:-1])
        assert len(layout.buckets) >= 8
    assert 4e6 < sizes["small-10m"] < sizes["gpt2-124m"] < 25.2e6


@pytest.mark.parametrize(("num_blocks", "num_buckets"), [(6144, 1), (6145, 2)])
def test_a_bucket_has_25_megabytes_at_most(num_blocks: int, num_buckets: int) -> None:
    assert len(FlatLayout({}, 0, num_blocks * BLOCK).buckets) == num_buckets


def test_64_mebibytes_are_copied_at_a_time() -> None:
    assert 4 * PIECE_VALUES == 64 << 20


def test_the_matrices_of_a_decoder_block_lie_end_to_end() -> None:
    """In the order of backward: the last block first."""
    blocks = {
        f"h.{number}.{name}": shape
        for number in range(2)
        for name, shape in {"q": (4, 4), "k": (4, 8), "v": (4, 12), "bias": (4,)}.items()
    }
    layout = FlatLayout.of(blocks)
    assert layout.decoder_blocks == [Span(96, 192), Span(0, 96)]
    assert layout.boundary == 192, "the last matrix ends there"


def test_vectors_alone_have_no_decay() -> None:
    assert FlatLayout.of({"weight": (5,), "bias": (5,)}).boundary == 0


def test_backward_finishes_matrices_in_the_order_of_the_buffer() -> None:
    model = GPT(GPTConfig(**preset_fields({"preset": "tiny"})))
    model.init_weights(0)
    layout, finished = FlatLayout.of(parameter_shapes(model.config)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: finished.append(name))
    tokens = torch.randint(0, 300, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    blocks = [name.split(".")[2] for name in finished if name.endswith("c_fc.weight")]
    assert blocks == sorted(blocks, reverse=True)
    places = [layout.places[name].start for name in finished if name.endswith("c_fc.weight")]
    assert places == sorted(places)
    # The vectors come last, so that only the last bucket waits for all blocks.
    assert all(
        (layout.places[name].start < layout.boundary) == (p.dim() > 1)
        for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_blocks_sum_does_not_depend_on_its_neighbours(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    vector = torch.randn(300 * BLOCK, generator=torch.Generator().manual_seed(0))
    whole = block_square_sums(vector)
    for first, end in [(0, 1), (299, 300), (17, 19), (100, 257), (1, 300)]:
        assert torch.equal(block_square_sums(vector[first * BLOCK : end * BLOCK]), whole[first:end])
    torch.set_num_threads(before)
    assert norm_of(block_square_sums(vector)) == pytest.approx(
        float(vector.double().norm()), rel=1e-6
    )
