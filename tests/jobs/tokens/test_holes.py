"""Holes of a token store as they are read: end-of-text tokens that do not count, at the places of a
document's tokens; all others stay."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.storage.uris import Storage, open_storage
from jobs.exact.compute import micro_batch
from jobs.tokens.holes import Hole, HoleMap, Holes, read_holes
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import Manifest, TokenStoreError, read_manifest
from jobs.tokens.token_stream import TokenStream
from model.linear_cross_entropy import IGNORE_INDEX
from tests.jobs.runs import tiny_plan
from tests.jobs.stores import make_store

EOT = 999
SEQ_LEN = 10


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[37, 90, 64])
    return storage


@pytest.fixture
def manifest(storage: Storage) -> Manifest:
    return read_manifest(storage)


def holes_at(manifest: Manifest, *places: tuple[int, int, int]) -> Holes:
    return Holes.of(
        manifest, [Hole(f"shard-{shard:05d}.bin", start, end, "") for shard, start, end in places]
    )


def test_holes__are_read_as_ends_that_do_not_count__and_nothing_else_changes(
    storage: Storage, manifest: Manifest
) -> None:
    """Over shard borders, at the front of a shard, and several in a row."""
    holes = holes_at(manifest, (0, 30, 37), (1, 0, 4), (1, 12, 14), (1, 15, 18), (2, 60, 64))
    options = {"split": "train", "seq_len": SEQ_LEN, "seed": 3, "window_rows": 7}
    plain = TokenStream(storage, **options)  # type: ignore[arg-type]
    holed = TokenStream(storage, holes=holes, **options)  # type: ignore[arg-type]
    sizes = [shard.tokens for shard in manifest.shards]
    firsts = np.cumsum([0, *sizes])
    is_hole = np.zeros(sum(sizes), bool)
    for hole in holes.holes:
        first = firsts[int(hole.shard[6:11])]
        is_hole[first + hole.start : first + hole.end] = True
    for read, indices in ((plain.rows, holed.rows), (plain.samples, holed.samples)):
        numbers = np.arange(plain.count_rows())
        rows = numbers if read == plain.rows else plain.order.rows(numbers)[1]
        (inputs, targets), (inputs_holed, targets_holed) = read(numbers), indices(numbers)
        for row, number in enumerate(rows.tolist()):
            place = number * SEQ_LEN
            mark = torch.from_numpy(is_hole[place : place + SEQ_LEN + 1])
            assert torch.equal(inputs_holed[row], inputs[row].where(~mark[:-1], EOT))
            assert torch.equal(targets_holed[row], targets[row].where(~mark[1:], IGNORE_INDEX))


def test_texts_with_holes__keep_their_documents_apart__as_without(tmp_path: Path) -> None:
    """Targets that do not count tell conversations, and here they do not."""
    plan = tiny_plan(str(tmp_path), train={"document_mask": True})
    config, eot = plan.config, 5
    inputs = torch.tensor([[1, eot, 2, 3, eot, eot, eot, 4, 6]])
    targets = torch.tensor([[eot, 2, 3, eot, -100, -100, 4, 6, 7]])
    device = torch.device("cpu")
    batch = micro_batch((inputs, targets), config, device, eot_id=eot, has_holes=True)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 0, 1, 2, 0, 0, 0, 1, 2]]
    assert isinstance(batch.mask, torch.Tensor)
    # The hole is the second and third end; the third one is what the next document begins from
    assert not batch.mask[0, 0, 6:, :6].any()
    assert not batch.mask[0, 0, :5, 5:].any()


def test_what_the_holes_leave__is_the_rest_of_the_pieces(manifest: Manifest) -> None:
    shard = manifest.shards[1]
    found = HoleMap(holes_at(manifest, (1, 0, 4), (1, 10, 20), (1, 20, 22)), manifest)
    pieces = [*found.outside([Piece(shard, 2, 15), Piece(shard, 30, 40)])]
    assert [piece[1:] for piece in pieces] == [(4, 10), (30, 40)]
    assert found.marks(Piece(shard, 18, 24)).tolist() == [True] * 4 + [False] * 2


def test_a_list__is_found_by_its_hash_alone(storage: Storage, manifest: Manifest) -> None:
    holes = holes_at(manifest, (1, 12, 14), (0, 3, 9))
    holes.store(storage)
    assert read_holes(storage, holes.hash) == holes
    assert not read_holes(storage, None)
    file = f"forgotten/{holes.hash}.json"
    storage.write_bytes(file, storage.read_bytes(file).replace(b"12", b"11"))
    with pytest.raises(TokenStoreError, match="another one than its name says"):
        read_holes(storage, holes.hash)
    storage.delete(file)
    with pytest.raises(TokenStoreError, match="missing"):
        read_holes(storage, holes.hash)


def test_a_list_with_overlaps_or_of_another_store__is_refused(
    storage: Storage, manifest: Manifest
) -> None:
    overlapping = holes_at(manifest, (0, 3, 9), (0, 8, 10))
    overlapping.store(storage)
    with pytest.raises(TokenStoreError, match="overlap at token 8"):
        read_holes(storage, overlapping.hash)
    others = Holes("another", holes_at(manifest, (0, 3, 9)).holes)
    with pytest.raises(TokenStoreError, match="forget them in a run on that store"):
        TokenStream(storage, split="train", seq_len=SEQ_LEN, holes=others)
