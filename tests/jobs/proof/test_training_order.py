"""The steps of a document by arithmetic are those that a scan of every step finds."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings.batch_schedule import BatchSchedule
from jobs.proof.training_order import TrainingOrder
from jobs.tokens.batch_plan import SampleOrder
from jobs.tokens.division import BY_DOCUMENTS, Division, HeldOut, texts_of
from jobs.tokens.token_store import Manifest, Shard
from tests.jobs.stores import manifest_of


class Drawn(NamedTuple):
    manifest: Manifest
    borders: dict[str, list[int]]  # of the documents of each shard: the first token, and the end
    division: Division
    schedule: BatchSchedule
    seed: int
    window_rows: int

    def order(self) -> TrainingOrder:
        return TrainingOrder(
            self.manifest,
            self.division,
            self.schedule,
            seed=self.seed,
            window_rows=self.window_rows,
        )


@st.composite
def schedules(draw: st.DrawFn, *, seq_len: int) -> BatchSchedule:
    start_lanes, lane_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ramp_tokens = draw(st.sampled_from([0, 0, 100, 400]))
    full_lanes = start_lanes + draw(st.integers(0, 4))
    first_lanes = start_lanes if ramp_tokens else full_lanes
    return BatchSchedule(
        seq_len=seq_len,
        lane_size=lane_size,
        full_lanes=full_lanes,
        max_tokens=first_lanes * lane_size * seq_len + draw(st.integers(0, 900)),
        start_lanes=start_lanes,
        ramp_tokens=ramp_tokens,
    )


@st.composite
def runs(draw: st.DrawFn) -> Drawn:
    """Draws a store of one to three sources, with weights or without, and a run of some steps."""
    seq_len, num_sources = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    shares = draw(st.lists(st.integers(1, 9), min_size=num_sources, max_size=num_sources))
    has_weights = draw(st.booleans())
    weights = tuple(share / sum(shares) for share in shares) if has_weights else ()
    shards, borders = list[Shard](), dict[str, list[int]]()
    for source in range(num_sources):
        for split in ("train", *draw(st.lists(st.sampled_from(["train", "val"]), max_size=3))):
            sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=8))
            # A source can always fill two rows
            sizes += [2 * seq_len + 2] if split == "train" else []
            name = f"{split}-{len(shards)}.bin"
            borders[name] = [0, *np.cumsum(sizes).tolist()]
            shards.append(Shard(name, split, source, sum(sizes), len(sizes), 1, "h"))
    manifest = manifest_of(shards, weights=weights)
    division = BY_DOCUMENTS
    if draw(st.booleans()):
        division = Division(HeldOut.END, draw(st.integers(1, seq_len)))
    schedule = draw(schedules(seq_len=seq_len))
    return Drawn(
        manifest, borders, division, schedule, draw(st.integers(0, 99)), draw(st.integers(1, 30))
    )


Document = tuple[str, int]  # the shard's file, and the number in it


def scanned(drawn: Drawn) -> dict[tuple[int, int, int], Counter[Document]]:
    """Goes through every step and counts the targets of each document, by step, lane and
    sample."""
    texts: list[list[Document]] = []
    for text in texts_of(drawn.manifest, "train", drawn.division):
        owners: list[Document] = []
        for piece in text:
            borders = drawn.borders[piece.shard.file]
            for number, (start, end) in enumerate(pairwise(borders)):
                owners += [(piece.shard.file, number)] * len(
                    range(max(start, piece.start), min(end, piece.end))
                )
        texts.append(owners)
    schedule, seq_len = drawn.schedule, drawn.schedule.seq_len
    num_rows = tuple((len(owners) - 1) // seq_len for owners in texts)
    order = SampleOrder(drawn.seed, drawn.window_rows, num_rows, drawn.manifest.weights)
    found = {}
    for step in range(1, schedule.max_steps + 1):
        samples = schedule.samples(step)
        for place, sample in enumerate(samples):
            ((source,), (row,)) = order.rows([sample])
            targets = texts[source][row * seq_len + 1 : row * seq_len + seq_len + 1]
            assert len(targets) == seq_len
            found[step, place // schedule.lane_size, sample] = Counter(targets)
    return found


@settings(max_examples=25, deadline=None)
@given(drawn=runs())
def test_where_finds_what_a_scan_of_every_step_finds(drawn: Drawn) -> None:
    order, expected = drawn.order(), scanned(drawn)
    found: dict[tuple[int, int, int], Counter[Document]] = {place: Counter() for place in expected}
    for shard in drawn.manifest.shards:
        for number, (start, end) in enumerate(pairwise(drawn.borders[shard.file])):
            for stretch in order.stretches(shard, start, end):
                for turn in order.turns(stretch.source, order.rows(stretch)):
                    targets = order.targets(turn)
                    shared = range(max(targets.start, stretch.start), min(targets.end, stretch.end))
                    assert shared, "a row without a token of the document"
                    place = turn.step, turn.lane, turn.sample
                    found[place][shard.file, number] += len(shared)
    assert found == expected


@pytest.mark.more
@settings(max_examples=25, deadline=None)
@given(drawn=runs())
def test_a_step_has_the_documents_that_a_scan_finds(drawn: Drawn) -> None:
    order, expected = drawn.order(), scanned(drawn)
    found: dict[tuple[int, int, int], Counter[Document]] = {}
    for step in range(1, drawn.schedule.max_steps + 1):
        for turn in order.turns_of_step(step):
            assert turn.step == step
            counts: Counter[Document] = Counter()
            for piece in order.pieces(order.targets(turn)):
                for number, (start, end) in enumerate(pairwise(drawn.borders[piece.shard.file])):
                    shared = range(max(start, piece.start), min(end, piece.end))
                    counts[piece.shard.file, number] += len(shared)
            found[step, turn.lane, turn.sample] = +counts
            assert turn in order.turns(turn.source, range(turn.row, turn.row + 1))
    assert found == expected
