"""A corpus of one text trains, validated on its end or on texts of its own; what cannot train is
refused at once."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import RunConfig, run_storage
from cluster.settings.stages import EvaluateConfig
from cluster.storage.uris import Entry, glob_uris
from jobs import pretrain as stage
from jobs.corpus import listing
from jobs.evaluate import evaluate, gate_rows
from jobs.pipeline import pipeline
from jobs.pretrain import pretrain
from jobs.proof.replay_run import replay
from jobs.run.ledger import Ledger
from jobs.tokens.token_store import TokenStoreError
from jobs.training.train_loop import train
from model.files.checkpoint_folder import read_metadata
from tests.jobs.runs import make_text

pytestmark = pytest.mark.more


def small_run(folder: Path, sources: list[Path], **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_id": "small",
            "model": {"preset": "tiny"},
            "data": {"source": [str(source) for source in sources], "vocab_size": 300} | data,
            "train": {
                "max_tokens": 8 * 4 * 32,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "seq_len": 32,
                "precision": "fp32",
                "eval_every_steps": 4,
                "hash_every_steps": 2,
            },
            "checkpoint": {"save_every_steps": 4, "keep_best": 1},
            "storage": {"uri": str(folder / "storage")},
        }
    )


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher itself is the only worker."""
    monkeypatch.setattr(
        stage,
        "_train",
        lambda plan: train(dataclasses.replace(plan, launch=None), rank=0, world_size=1),
    )


def check_proofs(config: RunConfig, result: dict[str, Any]) -> None:
    """Two workers that take the steps again get the same bits, and one that resumes; evaluation
    gives the trainer's own validation loss."""
    run = run_storage(config)
    again = replay(run, steps=range(1, 9), num_workers=2)
    assert (again.equal, again.hashes) == (True, 4)
    resumed = replay(run, steps=range(6, 9))
    assert (resumed.equal, resumed.hashes) == (True, 2)
    assert "step-000000004" in str(resumed.from_checkpoint)
    found = evaluate(
        EvaluateConfig(checkpoint=result["checkpoint"], batch_size=2, storage=config.storage)
    )
    assert found["loss"] == pytest.approx(result["val_loss"], abs=1e-6)
    assert found["bits_per_byte"] == pytest.approx(result["val_bits_per_byte"], abs=1e-6)
    assert read_metadata(Path(result["checkpoint"])).val_loss == result["val_loss"]


@pytest.mark.usefixtures("in_this_process")
def test_the_end_of_one_text_is_held_out(
    ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path, [written(tmp_path / "one.txt", make_text(4000))])
    result = pretrain(config)
    said = re.search(
        r"the last ([\d,]+) of ([\d,]+) tokens are held out to validate", capsys.readouterr().err
    )
    assert said is not None
    held_out, total = (int(number.replace(",", "")) for number in said.groups())
    assert 0.04 * total < held_out <= 0.05 * total + 1
    start = Ledger.read(run_storage(config)).events("start")[-1]
    assert (start["held_out"], start["end_tokens"]) == ("end", held_out)
    check_proofs(config, result)
    gate = gate_rows(result["checkpoint"], config.storage.uri)
    assert gate["rows"], gate["reason"]


@pytest.mark.usefixtures("in_this_process")
def test_pipeline__lists_the_corpus_once(
    ray_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing of a million files takes 13.5 s, and two of them may tell of different files."""
    listed: list[str] = []

    def list_files(location: str, **options: Any) -> Iterator[Entry]:
        listed.append(location)
        return glob_uris(location, **options)

    monkeypatch.setattr(listing, "glob_uris", list_files)
    source = written(tmp_path / "one.txt", make_text(1000))
    figures = pipeline(small_run(tmp_path, [source]))
    assert listed == [str(source)]
    assert (figures["documents"], figures["step"]) == (1, 8)
    assert figures["evaluation"]["parameter_hash"] == figures["parameter_hash"]


@pytest.mark.usefixtures("in_this_process")
def test_texts_of_their_own_validate_where_nothing_is_held_out(
    ray_workers: int, tmp_path: Path
) -> None:
    sets = {
        name: str(written(tmp_path / f"{name}.txt", make_text(400, seed=seed)))
        for name, seed in (("a", 1), ("b", 2))
    }
    source = written(tmp_path / "one.txt", make_text(1000))
    config = small_run(tmp_path, [source], val_fraction=0.0, validation=sets)
    result = pretrain(config)
    line = Ledger.read(run_storage(config)).events("validation")[-1]
    losses = [figures["val_loss"] for figures in line["sets"].values()]
    assert min(losses) < line["val_loss"] == result["val_loss"] < max(losses)
    check_proofs(config, result)


SHORT = make_text(12).strip()[:50]
ROWS = "\n".join([json.dumps({"text": SHORT})] * 3)


@pytest.mark.parametrize(
    ("texts", "data", "message"),
    [
        (
            {"a.txt": "too short"},
            {},
            r"the text has \d+ tokens to train on, a row needs 33 .* lower train\.seq_len$",
        ),
        ({"a.csv": f"text\n{SHORT}"}, {}, r"the text has \d+ tokens, .* a row to validate need 66"),
        (
            {"a.jsonl": ROWS, "b.txt": SHORT, "c.txt": SHORT},
            {},
            r"the text has \d+ tokens, .* a row to validate need 66",
        ),
        ({"a.txt": make_text(900)}, {"val_fraction": 0.0}, "data.validation names no text"),
        (
            {"a.txt": make_text(900), "b.txt": "short"},
            {"weights": [1, 1]},
            r"data\.source\[1\] has \d+ tokens",
        ),
        (
            {"a.txt": make_text(900)},
            {"validation": {"short": "SHORT"}},
            r"data\.validation\.short=.* a row needs 33",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_a_worker_starts(
    texts: dict[str, str],
    data: dict[str, Any],
    message: str,
    ray_workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "_train", lambda _: pytest.fail("it starts workers"))
    sources = [written(tmp_path / name, text) for name, text in texts.items()]
    if "validation" in data:
        data = {"validation": {"short": str(written(tmp_path / "short.txt", "short"))}}
    with pytest.raises(TokenStoreError, match=message):
        pretrain(small_run(tmp_path, sources, vocab_size=257, **data))  # a byte is a token
