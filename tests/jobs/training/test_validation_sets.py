"""Further validation sets: their figures are those of their texts, in any world, and one too small
is named."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.settings.run import RunConfig
from cluster.storage.uris import join_uri, open_storage
from jobs import pretrain
from jobs.pretrain import validation_stores
from jobs.report.make_report import make_report
from jobs.run.find_run import token_uses
from jobs.run.history import recorded_config, statistics
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.tokens.inspect_store import find_store
from jobs.tokens.token_store import MANIFEST, SOURCES, TokenStoreError, read_manifest
from jobs.training.train_loop import train
from jobs.workers.heartbeat import Pulse
from jobs.workers.watchdog import Place
from model.files.checkpoint import load_model
from model.text.tokenizer import Tokenizer
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import make_store, make_text, newest_checkpoint, tiny_plan

SEQ_LEN = 32
TEXTS = {"news": make_text(500, seed=2), "law-2.a": make_text(90, seed=3)}


def plan_with_sets(folder: Path) -> RunPlan:
    # Less than the first set has
    plan = tiny_plan(str(folder), train={"eval_max_tokens": 20 * SEQ_LEN})
    uris = {}
    for name, text in TEXTS.items():
        make_store(str(folder / name), Tokenizer.from_json(plan.tokenizer_json), {"train": text})
        uris[name] = open_storage(str(folder / name)).child("tokens/made").uri
    return dataclasses.replace(plan, validation_uris=uris)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = plan_with_sets(tmp_path_factory.mktemp("sets"))
    train(plan, rank=0, world_size=1)
    return plan


def validations(plan: RunPlan) -> list[tuple[int, Any]]:
    return [(event["step"], event["sets"]) for event in Ledger.read(plan.run).events("validation")]


@pytest.mark.parametrize("name", TEXTS)
def test_a_sets_figures_are_those_of_its_text(trained: RunPlan, name: str) -> None:
    text, tokenizer = TEXTS[name], Tokenizer.from_json(trained.tokenizer_json)
    documents = re.findall(r"(?:\S+\s*){1,20}", text)  # as `make_store` cuts it
    ids = [
        token for document in documents for token in [*tokenizer.encode(document), tokenizer.eot_id]
    ]
    num_rows = min(20, (len(ids) - 1) // SEQ_LEN)
    assert num_rows == 20 or name == "law-2.a"
    model = load_model(newest_checkpoint(trained))
    loss = 0.0
    for row in range(num_rows):
        tokens = torch.tensor(ids[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1])
        with torch.no_grad():
            loss += float(model.loss(tokens[None, :-1], tokens[None, 1:])) / (num_rows * SEQ_LEN)
    step, sets = validations(trained)[-1]
    assert step == 8
    assert sets[name]["val_loss"] == pytest.approx(loss, rel=1e-5)
    bits_per_byte = loss / math.log(2) / (len(text.encode()) / len(ids))
    assert sets[name]["val_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)


def test_two_workers_measure_the_same_bits(trained: RunPlan, tmp_path: Path) -> None:
    plan = plan_with_sets(tmp_path)
    run_world(plan, world_size=2)
    assert [step for step, _ in validations(plan)] == [4, 8]
    assert validations(plan) == validations(trained)


def test_each_batch_is_a_sign_of_life(tmp_path: Path) -> None:
    places = []

    class Seen(Pulse):
        def at(self, place: Place) -> None:
            places.append(place)
            super().at(place)

    train(plan_with_sets(tmp_path), rank=0, world_size=1, pulse=Seen({}))
    assert places.count(Place.VALIDATION) > 2 * 20 / 2, (
        "two validations of 20 rows of a set, two rows in a batch"
    )


def test_sets_change_nothing_else(trained: RunPlan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_with_sets(tmp_path), validation_uris={})
    train(plan, rank=0, world_size=1)
    with_sets, without = Ledger.read(trained.run), Ledger.read(plan.run)
    losses, hashes = (
        [[line[field] for line in ledger.events(event)] for ledger in (with_sets, without)]
        for event, field in (("validation", "val_loss"), ("checkpoint", "parameter_hash"))
    )
    assert losses[0] == losses[1]
    assert hashes[0][-1] == hashes[1][-1]
    assert "sets" not in without.events("validation")[-1]


@pytest.mark.more
def test_the_report_shows_the_sets(trained: RunPlan) -> None:
    ledger = Ledger.read(trained.run)
    figures = validations(trained)[-1][1]["law-2.a"]
    rows = dict(statistics(ledger, recorded_config(trained.run)))
    expected = f"{figures['val_loss']:.4f} nats/token, {figures['val_bits_per_byte']:.4f} bits/byte"
    assert rows["Validation set law-2.a"] == expected
    make_report(trained.run)
    page = trained.run.read_bytes("report/index.html").decode()
    # What the loss figure says to those who do not see it
    assert f"law-2.a {figures['val_loss']:.3f}" in page
    assert f"law-2.a {expected}" in page  # the events


def test_each_set_becomes_a_store_of_its_own_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunConfig] = []

    def tokenize(config: RunConfig) -> dict[str, Any]:
        asked.append(config)
        tokens = 33 if config.data.source == ["/good.txt"] else 32
        return {
            "manifest": join_uri(str(tmp_path / "tokens" / str(len(asked))), MANIFEST),
            "train_tokens": tokens,
        }

    monkeypatch.setattr(pretrain, "tokenize", tokenize)
    config = RunConfig.model_validate(
        {
            "model": {"preset": "tiny"},
            "train": {"seq_len": 32},
            "data": {
                "source": ["/a.txt", "/b.txt"],
                "weights": [1, 2],
                "text_field": "body",
                "decontaminate_ngram": 8,
                "validation": {"good": "/good.txt"},
            },
        }
    )
    stores = validation_stores(config, tokenizer_uri="/t/tokenizer.json")
    assert stores == {"good": open_storage(str(tmp_path / "tokens" / "1")).uri}
    data = asked[0].data
    assert (data.source, data.weights, data.val_fraction) == (["/good.txt"], [], 0.0)
    assert (data.tokenizer, data.text_field, data.dedup) == ("/t/tokenizer.json", "body", True)
    assert asked[0].storage == config.storage

    short = config.data.model_copy(
        update={"validation": {"good": "/good.txt", "short": "/short.txt"}}
    )
    with pytest.raises(
        TokenStoreError, match=r"data\.validation\.short=/short\.txt has 32 tokens, a row needs 33"
    ):
        validation_stores(
            config.model_copy(update={"data": short}), tokenizer_uri="/t/tokenizer.json"
        )


def test_the_final_figures_have_the_sets(trained: RunPlan) -> None:
    figures = pretrain._figures(trained.run, Ledger.read(trained.run), "a checkpoint")
    assert figures["validation_sets"] == validations(trained)[-1][1]
    assert figures["validation_sets"].keys() == TEXTS.keys()


def test_the_stores_of_a_run_are_told_apart(trained: RunPlan, tmp_path: Path) -> None:
    """By what they are made of, by their dates, and by what the run uses them for."""
    storage = open_storage(str(tmp_path))
    made = read_manifest(open_storage(trained.tokens_uri))
    stores = {name: dataclasses.replace(made, source_hash=name) for name in ("news", "text")}
    for name, manifest in stores.items():
        storage.write_bytes(f"tokens/{name}/{MANIFEST}", manifest.to_json())
        storage.write_bytes(
            f"tokens/{name}/{SOURCES}", json.dumps({"sources": [f"/{name}.txt"]}).encode()
        )
    start = {"event": "start", "data_identity": stores["text"].identity}
    start["validated_on"] = {"headlines": stores["news"].identity}
    storage.write_bytes("runs/first/ledger.jsonl", json.dumps(start).encode() + b"\n")
    with pytest.raises(TokenStoreError, match="name a token store") as refused:
        find_store(None, storage.uri, uses_in=token_uses)
    news, text = str(refused.value).partition("there are ")[2].split("; ")
    date = r"made \d{4}-\d\d-\d\d [\d:]+"
    assert re.fullmatch(
        rf"news of /news.txt \({date}, validation set headlines of run first\)", news
    ), news
    assert re.fullmatch(rf"text of /text.txt \({date}, run first trains on it\)", text), text
