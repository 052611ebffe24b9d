"""Messages that were aborted: none begins after that, as on a GPU it would leave the thread unable
to send more."""

import pytest
import torch

from jobs.workers.failures import is_lost_peer
from raymill.errors import LostPeerError, OpenGroupError
from raymill.state.peers import Peers
from raymill.workers.worker_group import WorkerGroup


def test_no_message_begins_after_an_abort() -> None:
    group = WorkerGroup(0, 4)
    peers = Peers([0, 2], group)
    group.meeting.aborted.set()
    with pytest.raises(LostPeerError, match="aborted"):
        peers.pass_on([(1, [torch.ones(3)])], [])


def test_a_group_of_messages_that_stays_open_counts_as_a_lost_peer_too() -> None:
    """So the newest snapshot is rescued before the process ends."""
    assert is_lost_peer(OpenGroupError("a message could not begin: NCCL communicator was aborted"))
