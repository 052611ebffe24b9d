"""When an endpoint borrows workers of a training run, and when it gives them back."""

from pathlib import Path

import pytest

from cluster.storage.lending import give_back, read_loan
from cluster.storage.uris import open_storage
from serving.delivery.borrowing import LOAN_S, RENEW_S, Borrower, Seen
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _borrows_after_10_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.delivery.borrowing.BORROW_AFTER_S", 10)


class Endpoint:
    """A borrower whose clock and replicas are set by hand."""

    def __init__(self, root: Path, *, min_replicas: int = 1) -> None:
        self.run = open_storage(str(root)).child("runs/r")
        self.now_s = 0.0
        self.seen = Seen(1, 1)
        self.failure: Exception | None = None
        self.borrower = Borrower(self.run, min_replicas=min_replicas, look=self._look, clock=lambda: self.now_s)

    def _look(self) -> Seen:
        if self.failure is not None:
            raise self.failure
        return self.seen

    def step(self, now_s: float, *, wanted: int, placed: int) -> None:
        self.now_s, self.seen = now_s, Seen(wanted, placed)
        self.borrower.step()

    def lent(self, now_s: float, *, wanted: int, placed: int) -> int:
        self.step(now_s, wanted=wanted, placed=placed)
        loan = read_loan(self.run)
        return 0 if loan is None else loan.num_workers


def test_a_spike_borrows_what_finds_no_place_and_returns_it_when_it_has_gone(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    assert endpoint.lent(0, wanted=1, placed=1) == 0
    assert endpoint.lent(1, wanted=3, placed=1) == 0
    assert endpoint.lent(5, wanted=3, placed=2) == 0, "one only took a while to start"
    assert endpoint.lent(10.9, wanted=3, placed=2) == 0
    assert endpoint.lent(11, wanted=3, placed=2) == 1
    assert endpoint.lent(30, wanted=3, placed=2) == 1, "the run still shrinks"
    assert endpoint.lent(31, wanted=3, placed=3) == 1
    assert endpoint.lent(35, wanted=4, placed=3) == 1
    assert endpoint.lent(45, wanted=4, placed=3) == 2
    assert endpoint.lent(60, wanted=4, placed=4) == 2
    assert endpoint.lent(61, wanted=1, placed=4) == 2, "they finish their streams"
    assert endpoint.lent(63, wanted=1, placed=3) == 1
    assert endpoint.lent(64, wanted=1, placed=1) == 0
    assert read_loan(endpoint.run) is None


def test_a_short_wait_or_a_place_that_comes_by_itself_borrows_nothing(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    for start_s in range(0, 100, 10):
        assert endpoint.lent(start_s, wanted=2, placed=1) == 0
        assert endpoint.lent(start_s + 9, wanted=2, placed=2) == 0


def test_what_an_endpoint_always_has_is_not_borrowed(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, min_replicas=2)
    assert endpoint.lent(0, wanted=2, placed=0) == 0
    assert endpoint.lent(99, wanted=2, placed=1) == 0
    assert endpoint.lent(100, wanted=3, placed=1) == 1


def test_a_loan_is_renewed_and_taken_again_after_an_outage_of_the_storage(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    folder = tmp_path / "runs"
    folder.write_text("a file where the folder should be")
    assert RENEW_S < LOAN_S / 2
    for now_s in (0, 10, 20):
        endpoint.step(now_s, wanted=2, placed=1)
    folder.unlink()
    assert endpoint.lent(21, wanted=2, placed=1) == 1
    first = read_loan(endpoint.run)
    assert endpoint.lent(30, wanted=2, placed=2) == 1 and read_loan(endpoint.run) == first
    assert endpoint.lent(41, wanted=2, placed=2) == 1 and read_loan(endpoint.run) != first
    give_back(endpoint.run)
    assert endpoint.lent(61, wanted=2, placed=2) == 1, "a person's return is overruled while it is needed"


def test_a_loan_is_renewed_through_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the thread, which outlives a KeyError: `status().applications` has no application while it is redeployed."""
    monkeypatch.setattr("serving.delivery.borrowing.POLL_S", 0.001)
    endpoint = Endpoint(tmp_path)
    for now_s in (0, 10):
        endpoint.step(now_s, wanted=2, placed=1)
    first = read_loan(endpoint.run)
    assert first is not None
    endpoint.failure = KeyError("raymill")
    endpoint.borrower.step_forever()
    for now_s in (10 + RENEW_S, 10 + 2 * RENEW_S, 10 + 9 * RENEW_S):
        before = read_loan(endpoint.run)
        endpoint.now_s = now_s
        wait_until(lambda before=before: read_loan(endpoint.run) != before, timeout_s=20)
    assert endpoint.borrower.borrowed.num_workers == 1 and caplog.text.count("KeyError: 'raymill'") > 3
    endpoint.failure, endpoint.seen = None, Seen(1, 1)
    wait_until(lambda: read_loan(endpoint.run) is None, timeout_s=20)
