"""Adapters promoted, watched and rolled back beside others on one engine: vLLM's CPU build."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.cli import main
from cluster.settings.serve import ServeConfig
from cluster.storage.registry import served_checkpoints
from cluster.storage.uris import open_storage
from model.text.tokenizer import Tokenizer
from tests.serving.adapter_parts import MadeAdapter, made_adapter, stored_base
from tests.serving.delivery_parts import Admin, Load, greedy_texts, promote_under_load, version
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.vllm_parts import installed, vllm_config, vllm_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, installed]

ADMIN_KEY = "sk-admin"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapters(storage: Path, tokenizer: Tokenizer) -> dict[str, MadeAdapter]:
    whole = vllm_model(tokenizer, seed=5, architecture="llama")
    base = stored_base(storage, whole, tokenizer)
    made = {}
    for seed, name in enumerate(("red", "blue", "green", "yellow"), start=1):
        made[name] = made_adapter(storage, name, base, whole, tokenizer, seed=seed)
    return made


@pytest.fixture(scope="module")
def unfit(
    storage: Path,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, str]]:
    """What cannot become a version of an adapter, and what the operator is told."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = vllm_model(tokenizer, seed=6, architecture="llama")
    stranger = made_adapter(
        elsewhere, "other", stored_base(elsewhere, other, tokenizer), other, tokenizer, seed=9
    )
    whole = vllm_model(tokenizer, seed=5, architecture="llama")
    base = stored_base(storage, whole, tokenizer)
    large = made_adapter(storage, "large", base, whole, tokenizer, seed=5, rank=16)
    return {
        "of another base": (stranger.folder, "is an adapter of .* is served"),
        "too large": (large.folder, "has rank 16: set engine.max_adapter_rank"),
        "whole": (base.folder(str(storage)), "is a whole model"),
    }


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, adapters: dict[str, MadeAdapter], storage: Path) -> str:
    (storage / "admin").write_text(ADMIN_KEY)
    config = ServeConfig.model_validate(
        {
            "checkpoint": str(adapters["red"].folder),
            "adapters": {
                "green": str(storage / "runs/green"),  # its newest checkpoint
                "violet": str(adapters["blue"].folder),
            },
            "model_name": "tiny",
            "admin_key_file": str(storage / "admin"),
            "storage": {"uri": str(storage)},
            "engine": vllm_config(
                dtype="float32",
                max_num_seqs=16,
                max_waiting=100,
                kv_cache_tokens=2048,
                max_adapters=4,
                max_adapter_rank=8,
            ).model_dump(),
            "delivery": {"watch_s": 1.0},
        }
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def admin(url: str) -> Iterator[Admin]:
    admin = Admin(url, ADMIN_KEY)
    yield admin
    admin.http.close()


@pytest.fixture
def green(url: str) -> Iterator[Admin]:
    green = Admin(url, ADMIN_KEY, adapter="green")
    yield green
    green.http.close()


@pytest.fixture
def violet(url: str) -> Iterator[Admin]:
    violet = Admin(url, ADMIN_KEY, adapter="violet")
    yield violet
    violet.http.close()


def pinned(storage: Path) -> set[str]:
    return served_checkpoints(open_storage(str(storage)))


def folders(adapters: dict[str, MadeAdapter], *names: str) -> set[str]:
    return {str(adapters[name].folder) for name in names}


def answers(url: str, model: str) -> bool:
    asked = {"model": model, "prompt": "the", "max_tokens": 1}
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=limit_s(60)).is_success
    return False


def test_an_adapter__is_promoted_under_load_and_rolled_back_on_the_same_engine(
    admin: Admin,
    url: str,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    storage: Path,
) -> None:
    red, blue = adapters["red"].folder, adapters["blue"].folder
    texts = {}
    for name in ("red", "blue"):
        made = adapters[name]
        texts[version(made.folder)] = greedy_texts(made.merged, tokenizer, prompts)
    [engine] = children_with("serving.engine_process.run_engine")
    load = Load(url, prompts, texts, num_connections=4)
    promote_under_load(admin, load, red, blue, before=60, after=60, gate_rows=[])

    answers_s = limit_s(60)
    with httpx.Client(base_url=url, timeout=answers_s) as http:
        asked = {"prompt": prompts[1], "max_tokens": 24, "temperature": 0}
        named = http.post("/v1/completions", json=asked | {"model": "green"})
        assert named.headers["x-model-version"] == version(adapters["green"].folder)
        listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert listed == ["tiny", "green", "violet"]
    assert pinned(storage) == folders(adapters, "red", "blue", "green"), "no retention deletes them"

    back = Load(url, prompts, texts, num_connections=4)
    assert admin.promote(red, gate_rows=[], watch_s=1000).status_code == 202
    admin.wait_for("watching")
    with back.running():
        back.wait_for_more(20)
        assert admin.http.post("/admin/rollback", json={}).json()["phase"] == "steady"
        admin.wait_for("steady")
        back.wait_for_more(20)
    assert back.wrong == []
    assert admin.delivery["live"]["version"] == version(blue)
    assert [one.pid for one in children_with("serving.engine_process.run_engine")] == [engine.pid]


def test_a_named_adapter__is_promoted_under_load_survives_its_replica_and_is_rolled_back(
    url: str,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    storage: Path,
    green: Admin,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = adapters["green"], adapters["yellow"]
    texts = {}
    for made in adapters.values():
        texts[version(made.folder)] = greedy_texts(made.merged, tokenizer, prompts)
    before = green.status()["delivery"]
    load, others = (
        Load(url, prompts, texts, num_connections=3, model=name) for name in ("green", "tiny")
    )
    violet = Load(url, prompts, texts, num_connections=1, model="violet")
    with others.running(), violet.running():
        promote_under_load(green, load, old.folder, new.folder, before=40, after=40, gate_rows=[])
    assert others.wrong == [] and violet.wrong == []
    assert others.versions == {before["live"]["version"]}
    assert violet.versions == {version(adapters["blue"].folder)}
    now = green.status()["delivery"]
    assert {name: now[name] for name in ("live", "epoch", "history")} == {
        name: before[name] for name in ("live", "epoch", "history")
    }
    assert pinned(storage) >= folders(adapters, "green", "yellow")

    [engine] = children_with("serving.engine_process.run_engine")
    engine.parent().kill()
    wait_until(lambda: not engine.is_running(), timeout_s=60)
    after = Load(url, prompts, texts, num_connections=2, model="green")
    wait_until(lambda: answers(url, "green"), timeout_s=300)
    with after.running():
        after.wait_for_more(20)
    assert after.wrong == [] and after.versions == {version(new.folder)}
    with httpx.Client(base_url=url, timeout=limit_s(60)) as http:
        card = http.get("/v1/models/green").json()
    assert (card["parent"], card["version"]) == ("tiny", version(new.folder))
    assert card["lineage"]["run_id"] == "yellow"

    words = ["--adapter", "green", "--url", url, "--admin-key-file", str(storage / "admin")]
    back = Load(url, prompts, texts, num_connections=3, model="green")
    with back.running():
        back.wait_for_more(20)
        assert main(["rollback", *words, "--json"]) == 0
        back.wait_for_more(20)
    assert back.wrong == []
    for one in back.connections:
        assert one.versions == sorted(one.versions, key=lambda v: v == version(old.folder))
    printed = capsys.readouterr().out.splitlines()[-1]  # after what Ray says of the replica's end
    assert json.loads(printed)["live"] == version(old.folder)
    final = Load(url, prompts, texts, num_connections=2, model="green")
    with final.running():
        final.wait_for_more(10)
    assert final.wrong == [] and final.versions == {version(old.folder)}


def test_what_is_no_version_of_a_named_adapter__is_refused_with_what_to_do(
    url: str,
    adapters: dict[str, MadeAdapter],
    unfit: dict[str, tuple[Path, str]],
    green: Admin,
    violet: Admin,
    storage: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = green.delivery
    for what, (place, message) in unfit.items():
        answer = green.promote(place, gate_rows=[])
        assert answer.status_code == 202, (what, answer.text)
        outcome = green.wait_for("steady")["outcome"]
        assert outcome["result"] == "refused", what
        assert re.search(message, outcome["reason"]), outcome
    assert green.delivery["live"] == before["live"] and green.delivery["epoch"] == before["epoch"]

    words = ["--url", url, "--admin-key-file", str(storage / "admin"), "--gate-source", "none"]
    blue = str(adapters["blue"].folder)
    assert main(["promote", blue, "--adapter", "pink", *words]) == 1
    assert "'pink'; this endpoint serves green, violet" in capsys.readouterr().err
    refused = violet.order("rollback")
    assert refused.status_code == 409 and "no earlier version" in refused.text


def test_a_named_adapter__has_a_gate_a_canary_and_a_place_of_its_own(
    url: str,
    adapters: dict[str, MadeAdapter],
    prompts: list[list[int]],
    admin: Admin,
    green: Admin,
    violet: Admin,
) -> None:
    blue, yellow = adapters["blue"].folder, adapters["yellow"].folder
    terms = {"gate_rows": prompts[2:4], "watch_s": 1000, "canary_percent": 50}
    assert violet.promote(yellow, **terms, max_loss_increase=100).status_code == 202
    violet.wait_for("canary")
    [replica] = admin.status()["replicas"]
    measured = replica["adapters"]["violet"]["slots"]["2"]
    assert 0 < measured["loss"] != measured["live_loss"] > 0
    seen = {name: set[str]() for name in ("violet", "green", "tiny")}
    with httpx.Client(base_url=url, timeout=limit_s(60)) as http:
        for name, versions in seen.items():
            for number in range(12):
                asked = {"model": name, "prompt": "the", "max_tokens": 1, "user": f"user-{number}"}
                versions.add(http.post("/v1/completions", json=asked).headers["x-model-version"])
    assert seen == {
        "violet": {version(blue), version(yellow)},
        "green": {green.delivery["live"]["version"]},
        "tiny": {admin.delivery["live"]["version"]},
    }

    refused = green.promote(adapters["red"].folder)
    assert refused.status_code == 409
    assert "for 5 adapters, and have 4: set engine.max_adapters" in refused.text
    assert violet.order("finish").status_code == 200
    assert violet.wait_for("watching")["live"]["version"] == version(yellow)
    assert violet.order("rollback").status_code == 200
    last = admin.http.get("/admin/audit").json()["orders"][-1]
    assert (last["order"], last["asked"]["adapter"]) == ("rollback", "violet")
    assert (last["old"]["version"], last["new"]["version"]) == (version(yellow), version(blue))
    assert violet.wait_for("steady")["live"]["version"] == version(blue)

    measured_worse = measured["loss"] > measured["live_loss"]
    here, there = (blue, yellow) if measured_worse else (yellow, blue)
    if not measured_worse:
        violet.promoted(yellow, gate_rows=[], watch_s=0)
    assert violet.promote(there, gate_rows=prompts[2:4], max_loss_increase=0).status_code == 202
    ended = violet.wait_for("steady")
    assert (ended["outcome"]["result"], ended["live"]["version"]) == ("refused", version(here))
    assert "nats per token, the live version's" in ended["outcome"]["reason"]


def test_a_whole_model__is_refused_where_adapters_are_served(
    admin: Admin, adapters: dict[str, MadeAdapter], storage: Path
) -> None:
    [base] = (storage / "bases").iterdir()
    live = admin.delivery["live"]
    assert admin.promote(base, gate_rows=[]).status_code == 202
    outcome = admin.wait_for("steady")["outcome"]
    assert outcome["result"] == "refused"
    assert "is a whole model" in outcome["reason"]
    assert admin.delivery["live"] == live
