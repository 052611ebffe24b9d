"""The proof that all messages of a step have arrived: each way in which it can fail, with the
gather of a real group's shape."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.workers.failures import is_lost_peer
from raymill.errors import LostPeerError
from raymill.workers.worker_group import Meeting, WorkerGroup

STEP, ROUND = 7, 2
OWN = torch.tensor([1.5, 2.5], dtype=torch.float64)


@pytest.fixture
def group() -> WorkerGroup:
    return WorkerGroup(0, 2, Meeting(ROUND))


def gathered(
    monkeypatch: pytest.MonkeyPatch, peer: list[float], then: Callable[[], None] = lambda: None
) -> None:
    """Makes the other rank's row of the next table be `peer`."""

    def gather(table: Tensor, own: Tensor) -> None:
        assert not table.any(), "an aborted gather leaves what lies in the memory"
        table.copy_(torch.cat([own, torch.tensor(peer)]))
        then()

    monkeypatch.setattr(dist, "all_gather_single", gather)


def test_a_table_with_all_stamps_holds_every_vector(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered(monkeypatch, [3.5, 0, 0, ROUND, STEP])
    assert group.proven(OWN, step=STEP, width=3).tolist() == [[1.5, 2.5, 0], [3.5, 0, 0]]


@pytest.mark.parametrize(
    "stamp",
    [(0, 0), (ROUND, STEP - 1), (ROUND - 1, STEP)],
    ids=["nothing", "the step before", "another round"],
)
def test_a_missing_stamp_names_its_rank(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch, stamp: tuple[int, int]
) -> None:
    gathered(monkeypatch, [*stamp])
    with pytest.raises(
        LostPeerError, match=r"step 7: nothing shows that the messages of rank 1 have arrived"
    ) as raised:
        group.prove(STEP, torch.device("cpu"))
    assert is_lost_peer(raised.value)


def test_one_that_was_aborted_neither_vouches_nor_believes(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's aborted messages return as if they had arrived, so the flag is looked at before and
    after."""
    gathered(monkeypatch, [ROUND, STEP], then=group.meeting.aborted.set)
    with pytest.raises(LostPeerError, match="this one's messages were aborted"):
        group.prove(STEP, torch.device("cpu"))
    monkeypatch.setattr(
        dist, "all_gather_single", lambda table, own: pytest.fail("it vouched for its messages")
    )
    with pytest.raises(LostPeerError, match="this one's messages were aborted"):
        group.prove(STEP, torch.device("cpu"))


def test_a_single_worker_has_nothing_to_prove() -> None:
    alone = WorkerGroup(0, 1)
    alone.meeting.aborted.set()
    alone.prove(STEP, torch.device("cpu"))
    assert not alone.meeting.is_waiting()


def test_a_worker_waits_while_it_is_in_a_message_of_its_group(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    gathered(monkeypatch, [ROUND, STEP], then=lambda: waits.append(group.meeting.is_waiting()))
    group.prove(STEP, torch.device("cpu"))
    assert waits == [True]
    assert not group.meeting.is_waiting()
