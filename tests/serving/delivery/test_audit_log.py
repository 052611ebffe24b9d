"""The audit log: no replica's entry is lost to another's, and the oldest go."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.settings.serve import ServeConfig
from serving.delivery import audit_log
from serving.delivery.audit_log import AuditLog

NUM_REPLICAS = 4


def test_replicas_add_entries_at_once_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MAX_ENTRIES", 10)
    monkeypatch.setattr(audit_log, "MAX_TRIES", 1000)
    config = ServeConfig.model_validate({"storage": {"uri": str(tmp_path)}, "model_name": "m"})
    assert AuditLog(config).read() == []

    def add(replica: int) -> None:
        log = AuditLog(config)
        for order in range(2):
            log.add({"replica": replica, "order": order})

    with ThreadPoolExecutor(NUM_REPLICAS) as replicas:
        list(replicas.map(add, range(NUM_REPLICAS)))
    entries = AuditLog(config).read()
    assert len(entries) == 2 * NUM_REPLICAS
    for replica in range(NUM_REPLICAS):
        assert [entry["order"] for entry in entries if entry["replica"] == replica] == [0, 1]
    add(NUM_REPLICAS)
    add(NUM_REPLICAS + 1)
    bounded = AuditLog(config).read()
    assert bounded[:6] == entries[2:] and len(bounded) == 10
