"""A run is found by its id, by its folder, and as `latest`: the one that was published last."""

from pathlib import Path

import pytest

from cluster.storage.registry import publish
from cluster.storage.uris import open_storage
from jobs.run.find_run import find_run
from jobs.run.ledger import LEDGER
from raymill.errors import UserError
from tests.jobs.runs import newest_checkpoint, trained_run


def test_latest_is_the_run_that_was_published_last(tmp_path: Path) -> None:
    plan = trained_run(str(tmp_path))
    storage_uri = plan.config.storage.uri
    with pytest.raises(UserError, match="unknown run 'latest'"):
        find_run("latest", storage_uri)
    publish(open_storage(storage_uri), str(newest_checkpoint(plan)))
    run_id = str(plan.config.run_id)
    found = {find_run(name, storage_uri).uri for name in ("latest", run_id, plan.run.uri)}
    assert found == {plan.run.uri}
    named_so = open_storage(storage_uri).child("runs/latest")
    named_so.write_bytes(LEDGER, b"")
    assert find_run("latest", storage_uri).uri == named_so.uri
