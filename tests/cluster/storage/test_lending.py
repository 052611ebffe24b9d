"""A loan of a run's workers: it ends by itself, by the clock of who looks at it."""

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.storage.lending import Lender, Loan, give_back, lend, read_loan
from cluster.storage.uris import open_storage


def test_a_loan_ends_with_its_time_its_return_or_the_next_one(tmp_path: Path) -> None:
    run, now_s = open_storage(str(tmp_path)), 0.0
    lender = Lender(run, lambda: now_s)

    def lent_at(time_s: float) -> int:
        nonlocal now_s
        now_s = time_s
        lender.look()
        return lender.num_lent()

    assert lent_at(0) == 0
    lend(run, Loan(2, for_s=60))
    assert [lent_at(t) for t in (10, 69, 70, 500)] == [2, 2, 0, 0]
    lend(run, Loan(2, for_s=60))  # a renewal
    assert [lent_at(t) for t in (501, 560, 561)] == [2, 2, 0]
    lend(run, Loan(1, for_s=60))
    assert lent_at(600) == 1
    give_back(run)
    assert lent_at(601) == 0
    assert read_loan(run) is None


def test_lending_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_storage(str(tmp_path)).child("runs/r1")
    storage = ["--storage.uri", str(tmp_path)]
    assert main(["lend", "r1", "--workers", "1", *storage]) == 1
    assert "no run r1" in capsys.readouterr().err
    run.write_bytes("config.yaml", b"")
    assert main(["lend", "r1", "--workers", "1", "--for", "30", *storage, "--json"]) == 0
    assert '"lent_workers": 1' in capsys.readouterr().out
    loan = read_loan(run)
    assert loan is not None and (loan.num_workers, loan.for_s) == (1, 30)
    assert main(["lend", "r1", "--return", *storage]) == 0
    assert read_loan(run) is None
    for wrong in ("nan", "inf", "0", "-5"):
        assert main(["lend", "r1", "--workers", "1", "--for", wrong, *storage]) == 2
        assert (
            capsys.readouterr().err
            == f"error: --for {wrong}: expected seconds above 0; --return ends a loan\n"
        )
    assert read_loan(run) is None
