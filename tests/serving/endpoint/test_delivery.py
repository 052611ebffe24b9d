"""Checkpoints promoted, refused and rolled back on a real Ray Serve with two replicas, under
load."""

import hashlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, EngineConfig, ReplicaConfig, ServeConfig
from cluster.storage.registry import served_checkpoints
from cluster.storage.uris import open_storage
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.delivery.route import Route
from serving.protocol.errors import DRAINING_HEADER
from tests.command_line import raymill_here
from tests.serving.delivery_parts import (
    Admin,
    Load,
    bad_checkpoint,
    greedy_texts,
    promote_under_load,
    version,
)
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.tiny_models import FRAGILE_POSITION, write_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

KEYS = [f"sk-user-{number}" for number in range(40)]
ADMIN_KEY = "sk-admin"
WATCH_S = 1.0
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delivery")


@pytest.fixture(scope="module")
def other_model(model: GPT) -> GPT:
    gpt = GPT(model.config)
    gpt.init_weights(2)
    return gpt.eval()


@pytest.fixture(scope="module")
def other(other_model: GPT, tokenizer: Tokenizer, folder: Path) -> Path:
    return write_model(folder / "step-8", other_model, tokenizer, step=8)


@pytest.fixture(scope="module")
def texts(
    model: GPT,
    other_model: GPT,
    checkpoint: Path,
    other: Path,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
) -> dict[str, list[str]]:
    """The greedy answers of both models to `prompts`, which all differ."""
    found = {version(checkpoint): greedy_texts(model, tokenizer, prompts)}
    found[version(other)] = greedy_texts(other_model, tokenizer, prompts)
    ours, theirs = found.values()
    assert all(a != b for a, b in zip(ours, theirs, strict=True))
    return found


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, checkpoint: Path, folder: Path) -> str:
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "admin").write_text(ADMIN_KEY)
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name="tiny",
        api_key_file=str(folder / "keys"),
        admin_key_file=str(folder / "admin"),
        storage=StorageConfig(uri=str(folder / "storage")),
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        engine=EngineConfig(max_num_seqs=16, max_waiting=100),
        # Two engines share a busy core while one takes over from the other: times say nothing here.
        delivery=DeliveryConfig(watch_s=WATCH_S, max_latency_ratio=None),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def admin(url: str, checkpoint: Path) -> Iterator[Admin]:
    """Each test begins and ends with the first checkpoint alone."""
    admin = Admin(url, ADMIN_KEY)
    yield admin
    if admin.delivery["phase"] != "steady":
        admin.http.post("/admin/rollback", json={})
    admin.wait_for("steady")
    if admin.delivery["live"]["version"] != version(checkpoint):
        admin.promoted(checkpoint, watch_s=0)
    admin.http.close()


def load(url: str, prompts: list[list[int]], texts: dict[str, list[str]]) -> Load:
    return Load(url, prompts, texts, key=KEYS[0])


def test_a_promotion_under_load_fails_and_mixes_nothing(
    admin: Admin,
    url: str,
    checkpoint: Path,
    other: Path,
    prompts: list[list[int]],
    texts: dict[str, list[str]],
) -> None:
    promote_under_load(admin, load(url, prompts, texts), checkpoint, other, before=100, after=100)


@pytest.mark.slow
def test_a_promotion_under_two_thousand_requests(
    admin: Admin,
    url: str,
    checkpoint: Path,
    other: Path,
    prompts: list[list[int]],
    texts: dict[str, list[str]],
) -> None:
    promote_under_load(admin, load(url, prompts, texts), checkpoint, other, before=1000, after=1000)


def test_the_old_engine_ends_and_the_new_lineage_shows(
    admin: Admin, url: str, checkpoint: Path, other: Path, folder: Path
) -> None:
    answer = admin.promote(other, watch_s=1000)
    assert answer.status_code == 202, answer.text
    admin.wait_for("watching")
    assert len(children_with("serving.engine_process.run_engine")) == 4, (
        "the old version could return at once"
    )
    assert admin.promote(checkpoint).status_code == 409
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=limit_s(30)
    ) as http:
        card = http.get("/v1/models/tiny").json()
        assert card["lineage"]["step"] == 8 and card["version"] == version(other)
        assert card["delivery"]["phase"] == "watching"
        assert card["delivery"]["previous"]["lineage"]["step"] == 7
        assert http.post("/admin/rollback", json={}).status_code == 403
    pinned = served_checkpoints(open_storage(str(folder / "storage")))
    assert pinned == {str(checkpoint), str(other)}
    assert admin.http.post("/admin/rollback", json={}).status_code == 200
    state = admin.delivery
    assert (
        state["live"]["version"] == version(checkpoint)
        and state["outcome"]["result"] == "rolled_back"
    )
    wait_until(lambda: len(children_with("serving.engine_process.run_engine")) == 2, timeout_s=10)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "unknown checkpoint .*bad-missing"),
        ("flipped", r"model\.safetensors is altered"),
        ("shape", "bad-shape"),
        ("vocabulary", "a vocabulary of 290 ids, the live version one of 300"),
        ("tokenizer", "another tokenizer"),
        ("served", "served now"),
        ("nan", "not finite"),
        ("worse", "worse by more than 0.5"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_nobody_notices(
    admin: Admin,
    url: str,
    checkpoint: Path,
    other: Path,
    folder: Path,
    tokenizer: Tokenizer,
    model: GPT,
    prompts: list[list[int]],
    texts: dict[str, list[str]],
    kind: str,
    message: str,
) -> None:
    places = {"served": checkpoint, "worse": other}
    place = places.get(kind) or bad_checkpoint(kind, folder, other, tokenizer)
    epoch = admin.delivery["epoch"]
    load = Load(url, prompts, texts, num_connections=4, key=KEYS[0])
    with load.running():
        load.wait_for_more(4)
        rows = [generate(model, prompts[5], max_tokens=60, params=GREEDY)]
        answer = admin.promote(place, gate_rows=rows, max_loss_increase=0.5)
        if answer.status_code == 202:
            said = admin.wait_for("steady")["outcome"]
            assert said["result"] == "refused"
            found = said["reason"]
        else:
            assert (
                answer.status_code == 400 and answer.json()["error"]["code"] == "checkpoint_refused"
            )
            found = answer.json()["error"]["message"]
        assert re.search(message, found), found
        load.wait_for_more(4)
    assert load.wrong == [] and set(load.connections[0].versions) == {version(checkpoint)}
    assert admin.delivery["epoch"] == epoch and admin.delivery["live"]["version"] == version(
        checkpoint
    )


def test_a_version_that_fails_later_returns_by_itself(
    admin: Admin, url: str, checkpoint: Path, fragile_checkpoint: Path, prompts: list[list[int]]
) -> None:
    """The gate's rows are shorter than where its logits end; what it fails to answer, the old
    version does."""
    short, long = prompts[5][:30], (prompts[7] * 3)[: FRAGILE_POSITION - 4]
    asked = {"model": "tiny", "prompt": long, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=limit_s(30)
    ) as http:
        expected = http.post("/v1/completions", json=asked).json()["choices"]
        assert admin.promote(fragile_checkpoint, gate_rows=[short], watch_s=1000).status_code == 202
        admin.wait_for("watching")
        for _ in range(20):
            answer = http.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"] == expected and answer.headers[
                "x-model-version"
            ] == version(checkpoint)
    state = admin.wait_for("steady", timeout_s=10)
    assert state["live"]["version"] == version(checkpoint)
    assert (
        state["outcome"]["result"] == "rolled_back"
        and "sequences failed" in state["outcome"]["reason"]
    )


def ask(http: httpx.Client, **fields: object) -> str:
    """The version that answers."""
    answer = http.post(
        "/v1/completions", json={"model": "tiny", "prompt": [1], "max_tokens": 1, **fields}
    )
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-model-version"])


def test_a_canary_has_its_share_of_the_keys_until_it_is_finished(
    admin: Admin, url: str, checkpoint: Path, other: Path
) -> None:
    old, new = version(checkpoint), version(other)
    assert admin.promote(other, canary_percent=25, watch_s=1000).status_code == 202
    serial = admin.wait_for("canary")["candidate"]["serial"]
    route = Route(epoch=0, primary=0, canary=serial, percent=25)
    expected = [
        new if route.serial_for(hashlib.sha256(key.encode()).hexdigest()) == serial else old
        for key in KEYS
    ]
    assert 0 < expected.count(new) < len(KEYS) / 2
    with httpx.Client(base_url=url, timeout=limit_s(30)) as http:

        def answers() -> list[str]:
            found = []
            for number, key in enumerate(KEYS):
                http.headers["Authorization"] = f"Bearer {key}"
                found.append(ask(http, user=f"user-{number % 3}"))
            return found

        assert answers() == expected == answers(), "a key keeps its version on both replicas"
        assert admin.http.post("/admin/finish", json={}).status_code == 200
        admin.wait_for("watching")
        assert set(answers()) == {new}
        assert admin.http.post("/admin/rollback", json={}).json()["phase"] == "steady"
        admin.wait_for("steady")
        assert set(answers()) == {old}


@pytest.mark.slow
def test_a_killed_replica_comes_back_with_what_is_live(
    admin: Admin, url: str, checkpoint: Path, other: Path
) -> None:
    """One is killed while the candidate is loaded, one after the switch; none serves what it was
    started with."""
    before = {replica["replica"] for replica in admin.status()["replicas"]}
    assert admin.promote(other, watch_s=0).status_code == 202
    kill_replica()
    state = admin.wait_for("steady")
    assert state["outcome"]["result"] == "promoted" and state["live"]["version"] == version(other)
    kill_replica()
    wait_until(
        lambda: {r["replica"] for r in admin.status()["replicas"]}.isdisjoint(before), timeout_s=60
    )
    wait_until(lambda: len(admin.status()["replicas"]) == 2, timeout_s=60)
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=limit_s(30)
    ) as http:
        assert {ask(http) for _ in range(30)} == {version(other)}
    state = admin.promoted(checkpoint, watch_s=0)
    assert len(children_with("serving.engine_process.run_engine")) >= 2 and state["previous"][
        "version"
    ] == version(other)


def kill_replica() -> None:
    """The one that has run longest."""
    engines = sorted(
        children_with("serving.engine_process.run_engine"),
        key=lambda process: process.create_time(),
    )
    os.kill(engines[0].ppid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_coordinator_forgets_nothing(
    admin: Admin,
    url: str,
    checkpoint: Path,
    other: Path,
    prompts: list[list[int]],
    texts: dict[str, list[str]],
) -> None:
    load = Load(url, prompts, texts, num_connections=4, key=KEYS[0])
    with load.running():
        assert admin.promote(other, watch_s=1000).status_code == 202
        before = admin.wait_for("watching")
        [coordinator] = children_with("ServeReplica:raymill:Coordinator")
        coordinator.kill()
        load.wait_for_more(20)

        def is_back() -> bool:
            answer = admin.http.get("/admin/status")
            return answer.status_code == 200 and answer.json()["delivery"] == before

        wait_until(is_back, timeout_s=30)
        assert admin.http.post("/admin/rollback", json={}).status_code == 200
        load.wait_for_more(20)
    assert load.wrong == []
    assert admin.wait_for("steady")["live"]["version"] == version(checkpoint)


def test_a_drained_endpoint_takes_nothing_new(admin: Admin, url: str) -> None:
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=limit_s(30)
    ) as http:

        def statuses() -> set[int]:
            return {
                http.post("/v1/completions", json={"model": "tiny", "prompt": [1]}).status_code
                for _ in range(8)
            }

        assert admin.http.post("/admin/drain", json={}).json()["draining"] is True
        wait_until(lambda: statuses() == {503}, timeout_s=10)
        not_ready = httpx.get(f"{url}/ready", timeout=limit_s(30)).json()["error"]
        assert not_ready["code"] == "draining" and "POST /admin/drain" in not_ready["message"]
        assert (
            DRAINING_HEADER
            in http.post("/v1/completions", json={"model": "tiny", "prompt": [1]}).headers
        )
        assert admin.http.post("/admin/drain", json={"drain": False}).json()["draining"] is False
        wait_until(lambda: statuses() == {200}, timeout_s=10)


def test_the_commands_of_an_operator(
    admin: Admin,
    url: str,
    checkpoint: Path,
    other: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raymill(*words: str) -> tuple[int, dict[str, Any], str]:
        return raymill_here(
            words[0],
            "--url",
            url,
            "--admin-key-file",
            str(folder / "admin"),
            *words[1:],
            capsys=capsys,
        )

    old, new = version(checkpoint), version(other)
    (folder / "wrong").write_text("sk-wrong")
    code, result, said = raymill("rollback", "--admin-key-file", str(folder / "wrong"))
    assert code == 1 and "answered 401" in said
    text = folder / "held-out.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and naïve cafés sell €5 tea")
    gate = ["--gate-source", str(text), "--max-loss-increase", "100"]
    code, result, said = raymill("promote", str(other), "--canary", "50", *gate)
    assert code == 0 and (result["phase"], result["live"], result["candidate"]) == (
        "canary",
        old,
        new,
    ), said
    code, result, said = raymill("promote", "--finish")
    assert code == 0 and (result["phase"], result["live"], result["previous"]) == (
        "steady",
        new,
        old,
    ), said
    code, result, said = raymill("rollback")
    assert code == 0 and (result["phase"], result["live"]) == ("steady", old), said
    code, result, said = raymill("promote", str(folder / "nowhere"), *gate)
    assert code == 1 and "unknown checkpoint" in said
