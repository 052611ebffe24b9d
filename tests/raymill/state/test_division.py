"""Who has a part of a piece: shares that add up, for any number of peers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.state.division import Piece, owners


@given(st.integers(1, 40), st.integers(0, 5))
def test_owners_of_pieces_have_equal_shares_of_the_bucket(num_peers: int, halvings: int) -> None:
    count = 2**halvings
    shares_of_peers: Counter[int] = Counter()
    for number in range(count):
        shares = owners(Piece(number, count), num_peers)
        assert sum(share for _, share in shares) == pytest.approx(1 / count)
        for peer, share in shares:
            assert share > 0
            shares_of_peers[peer] += share  # type: ignore[assignment]
    assert shares_of_peers == pytest.approx(dict.fromkeys(range(num_peers), 1 / num_peers))
