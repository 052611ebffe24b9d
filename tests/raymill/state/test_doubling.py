"""Teams that gather a bucket: what they send is what is counted, and the quicker teams are taken."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from raymill.state.division import Division, power_of_two_teams
from raymill.state.doubling import gather, gather_messages, teams_to_gather
from raymill.state.flat_layout import BLOCK
from raymill.state.messages import Message, most_cost
from raymill.state.peers import Peers
from tests.jobs.wires import run_peers


@pytest.mark.parametrize(
    ("num_peers", "num_calls"), [(1, 0), (2, 1), (6, 3), (8, 3), (12, 4), (24, 5)]
)
def test_teams_send_the_messages_that_are_counted(num_peers: int, num_calls: int) -> None:
    """In one call for each doubling, and one before where there are several teams."""
    size = 16 * num_peers * BLOCK
    teams = power_of_two_teams(num_peers)
    division = Division.of(size, num_peers=num_peers)
    whole = torch.arange(size).float()

    def run(peers: Peers) -> Tensor:
        values = torch.full_like(whole, torch.nan)
        part = division.part(peers.index)
        part.of(values).copy_(part.of(whole))
        gather(peers, values, division, teams)
        return values

    results, wired = run_peers(num_peers, run)
    assert all(torch.equal(values, whole) for values in results)
    sent = [
        Message(peer.index, receiver, length / size)
        for peer in wired
        for receiver, length in peer.sent
    ]
    assert Counter(sent) == Counter(gather_messages(num_peers, teams))
    assert wired[0].num_calls == num_calls


@pytest.mark.parametrize("num_peers", range(1, 30))
def test_a_gather_takes_no_longer_than_other_teams_would(num_peers: int) -> None:
    one_each = [range(peer, peer + 1) for peer in range(num_peers)]
    cost = most_cost(gather_messages(num_peers, teams_to_gather(num_peers)), num_peers)
    for teams in (power_of_two_teams(num_peers), one_each):
        assert cost <= most_cost(gather_messages(num_peers, teams), num_peers)
