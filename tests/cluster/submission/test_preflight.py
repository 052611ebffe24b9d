"""Jobs that are refused before one is spent, and the words. No cluster: nodes are as Ray would
describe them."""

from pathlib import Path
from typing import Any

import pytest

from cluster.commands.job_commands import checked_needs
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import StorageError, open_storage
from cluster.submission.preflight import AdmissionError, Folders, check_rooms

NODE = {"CPU": 4.0, "memory": 6e9, "object_store_memory": 2e9}
NEEDS = {"worker_bytes": 3_000_000_000}


def config(tmp_path: Path, **branches: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_id": "demo",
        "model": {"preset": "tiny"},
        "storage": {"uri": str(tmp_path / "store")},
    }
    values["data"] = {"source": str(tmp_path / "texts/*.txt"), "vocab_size": 300}
    values["train"] = {
        "max_tokens": 10_000,
        "seq_len": 32,
        "global_batch_size": 8,
        "micro_batch_size": 1,
    }
    return validate_config(values | branches, RunConfig)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("words")
    return tmp_path


@pytest.mark.parametrize(
    ("scaling", "nodes", "words"),
    [
        ({"min_workers": 2, "threads_per_worker": 2}, [NODE], None),
        ({"min_workers": 2, "max_workers": 4, "threads_per_worker": 3}, [NODE, NODE], None),
        (
            {"min_workers": 2, "threads_per_worker": 3},
            [NODE],
            "scaling.min_workers=2 workers of 3 CPUs each do not fit: here has room for 1 now",
        ),
        (
            {"min_workers": 4, "max_workers": 4, "use_gpu": True},
            [NODE | {"GPU": 2.0}, NODE],
            "scaling.min_workers=4 workers of 1 CPU and a GPU each do not fit: here has room for 2 now",
        ),
        ({"min_workers": 1}, [], "has room for 0 now"),
        (
            {"min_workers": 3, "max_workers": 4},
            [NODE],
            r"needs about 3.0 GB of memory, and here has that for 2 of scaling.min_workers=3 workers \(the largest node "
            r"has 8.0 GB\)",
        ),
    ],
)
def test_workers_find_room_or_are_refused_with_both_numbers(
    tmp_path: Path, scaling: dict[str, Any], nodes: list[dict[str, float]], words: str | None
) -> None:
    run = config(tmp_path, scaling=scaling)
    if words is None:
        check_rooms(run, "pretrain", NEEDS, nodes=nodes, where="here")
        return
    with pytest.raises(AdmissionError, match=words):
        check_rooms(run, "pretrain", NEEDS, nodes=nodes, where="here")


def test_tokenizing_needs_a_cpu_somewhere(tmp_path: Path) -> None:
    run = config(tmp_path, scaling={"min_workers": 4, "max_workers": 4, "use_gpu": True})
    check_rooms(run, "tokenize", NEEDS, nodes=[{"CPU": 0.0}, NODE], where="here")
    with pytest.raises(AdmissionError, match="tokenizing needs a CPU, and here has none"):
        check_rooms(run, "tokenize", NEEDS, nodes=[{"CPU": 0.0}], where="here")


def test_a_good_run_is_told_what_it_needs(texts: Path) -> None:
    tiny = checked_needs(config(texts), Folders.SAME)["worker_bytes"]
    wide = checked_needs(config(texts, model={"preset": "gpt2-124m"}), Folders.SAME)["worker_bytes"]
    assert 0.4e9 < tiny < 0.6e9
    assert wide > tiny + 4 * 4 * 124e6  # weights, gradients and two moments in fp32
    assert not (texts / "store").exists()


def test_other_settings_than_the_run_was_begun_with_are_refused(texts: Path) -> None:
    run = config(texts)
    values = run.model_dump(mode="json")
    values["model"]["vocab_size"] = 300  # the tokenizer's
    before = validate_config(values, RunConfig)
    open_storage(run.storage.uri).write_bytes("runs/demo/config.yaml", to_yaml(before).encode())
    checked_needs(run, Folders.SAME)
    changed = run.model_copy(update={"train": run.train.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(
        AdmissionError,
        match=r"run demo has other settings: train.learning_rate was 0.0006, now 0.001",
    ):
        checked_needs(changed, Folders.SAME)


def test_sources_and_storage_are_looked_at(texts: Path, s3_bucket: str) -> None:
    missing = config(texts, data={"source": [str(texts / "texts"), f"s3://{s3_bucket}/corpus"]})
    with pytest.raises(
        AdmissionError, match=f"data.source: nothing is at 's3://{s3_bucket}/corpus'"
    ):
        checked_needs(missing, Folders.SAME)
    nowhere = config(texts, storage={"uri": "s3://no-such-bucket/x"})
    with pytest.raises(
        AdmissionError, match=r"there is no bucket 'no-such-bucket'.*`raymill storage check"
    ):
        checked_needs(nowhere, Folders.SAME)
    with pytest.raises(StorageError, match="cannot open 'ftp://x'"):
        checked_needs(config(texts, storage={"uri": "ftp://x"}), Folders.SAME)


def test_a_folder_of_this_machine_is_nothing_for_others(
    texts: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        AdmissionError, match=r"is a folder of this machine; the job needs --storage.uri s3://"
    ):
        checked_needs(config(texts), Folders.NONE)
    with pytest.raises(AdmissionError, match="is on this machine, and the job is not; upload it"):
        checked_needs(config(texts, storage={"uri": f"s3://{s3_bucket}/store"}), Folders.NONE)
    checked_needs(config(texts, data={"source": "/only/there"}), Folders.UNKNOWN)
    assert "all nodes of the cluster must see the same files there" in capsys.readouterr().err
