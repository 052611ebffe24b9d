"""Of two starts of one run the second is refused before anything is started for it."""

from pathlib import Path

import pytest

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from cluster.storage.lease import LeaseHeldError
from cluster.submission.first_checks import check_stage, starting
from cluster.submission.preflight import AdmissionError


def config_in(folder: Path, **cluster: str) -> RunConfig:
    storage = {"uri": str(folder / "a storage")}
    values = {"run_id": "r", "model": {"preset": "tiny"}, "storage": storage, "cluster": cluster}
    return validate_config(values, RunConfig)


def test_a_second_start_is_refused_until_the_first_has_its_job(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with starting(config, "pretrain") as first:
        typed = f"`raymill stop r --storage.uri '{tmp_path}/a storage'` saves and ends it"
        with pytest.raises(AdmissionError, match="run r is running already") as refused:
            check_stage(config, "pretrain")
        assert typed in str(refused.value)
        with pytest.raises(LeaseHeldError), starting(config, "pretrain"):
            raise AssertionError("it must not start")
        check_stage(config, "tokenize")
        first.close()
        check_stage(config, "pretrain")


def test_a_folder_of_another_machine_is_not_written_to(tmp_path: Path) -> None:
    with starting(config_in(tmp_path, address="http://head:8265"), "pretrain"):
        assert not any(tmp_path.iterdir())
