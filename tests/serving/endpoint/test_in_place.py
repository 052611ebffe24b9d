"""Checkpoints promoted, refused and rolled back with one engine's memory: vLLM's CPU build, whose
weights are replaced."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, ServeConfig
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.command_line import RAYMILL, environment
from tests.serving.delivery_parts import (
    Admin,
    Load,
    bad_checkpoint,
    greedy_texts,
    promote_under_load,
    version,
)
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.tiny_models import lively_model, write_model
from tests.serving.vllm_parts import installed, memory_bytes, peak_memory, vllm_config, vllm_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, installed]

ADMIN_KEY = "sk-admin"
MEMORY_RATIO = 1.25
NUM_FOLLOWED = 10
GREEDY = SamplingParams(temperature=0.0)
Texts = dict[str, list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in-place")


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> list[GPT]:
    """The live one, another one, and those of the run that is followed."""
    return [vllm_model(tokenizer, seed=seed) for seed in range(2 + NUM_FOLLOWED)]


@pytest.fixture(scope="module")
def live(models: list[GPT], tokenizer: Tokenizer, folder: Path) -> Path:
    return write_model(folder / "step-1", models[0], tokenizer, step=1)


@pytest.fixture(scope="module")
def other(models: list[GPT], tokenizer: Tokenizer, folder: Path) -> Path:
    return write_model(folder / "step-2", models[1], tokenizer, step=2)


@pytest.fixture(scope="module")
def texts(
    models: list[GPT], live: Path, other: Path, tokenizer: Tokenizer, prompts: list[list[int]]
) -> Texts:
    found = [greedy_texts(model, tokenizer, prompts) for model in models[:2]]
    assert all(a != b for a, b in zip(*found, strict=True))
    return dict(zip([version(live), version(other)], found, strict=True))


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, live: Path, folder: Path) -> str:
    (folder / "admin").write_text(ADMIN_KEY)
    config = ServeConfig(
        checkpoint=str(live),
        model_name="tiny",
        admin_key_file=str(folder / "admin"),
        storage=StorageConfig(uri=str(folder / "storage")),
        engine=vllm_config(max_num_seqs=16, max_waiting=100, kv_cache_tokens=16 * 128),
        delivery=DeliveryConfig(watch_s=1.0, weights="in_place"),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def admin(url: str, live: Path) -> Iterator[Admin]:
    """Each test begins with the first checkpoint."""
    admin = Admin(url, ADMIN_KEY)
    wait_until(lambda: admin.delivery["phase"] == "steady", timeout_s=60)
    if admin.delivery["live"]["version"] != version(live):
        admin.promoted(live, watch_s=0)
    yield admin
    admin.http.close()


def engine() -> psutil.Process:
    """The one engine process."""
    [process] = children_with("serving.engine_process.run_engine")
    return process


def rows(model: GPT, prompts: list[list[int]]) -> list[list[int]]:
    return [generate(model, prompts[5], max_tokens=60, params=GREEDY)]


def test_a_promotion_under_two_thousand_requests_in_the_memory_of_one_engine(
    admin: Admin,
    url: str,
    live: Path,
    other: Path,
    prompts: list[list[int]],
    texts: Texts,
    models: list[GPT],
) -> None:
    """As with an engine for each version: nothing fails, and nothing is mixed."""
    warm, load, process = Load(url, prompts, texts), Load(url, prompts, texts), engine()
    with warm.running():
        warm.wait_for_more(50)
    before = memory_bytes(process)
    gate = rows(models[1], prompts)
    with peak_memory(process) as peak:
        promote_under_load(
            admin, load, live, other, before=1000, after=1000, gate_rows=gate, max_loss_increase=100
        )
    assert engine().pid == process.pid, "no second engine, and no new one"
    print(
        f"{load.num_answers} requests on {len(load.connections)} connections, {len(load.wrong)} wrong or failed; the "
        f"longest took {load.longest_s:.1f} s; {before / 1e6:.0f} MB before, {peak.bytes / before:.3f} times as much "
        "at most"
    )
    assert peak.bytes < MEMORY_RATIO * before


@pytest.mark.parametrize(
    ("kind", "message"),
    [("nan", "not finite"), ("worse", "worse by more than 0.5"), ("deeper", "another shape")],
)
def test_a_bad_checkpoint_is_refused_and_nobody_notices(
    kind: str, message: str, admin: Admin, url: str, live: Path, other: Path, folder: Path, tokenizer: Tokenizer,
    prompts: list[list[int]], texts: Texts, models: list[GPT],
) -> None:  # fmt: skip
    if kind == "worse":
        place = other
    elif kind == "nan":
        place = bad_checkpoint("nan", folder, other, tokenizer)
    else:
        place = write_model(
            folder / "deeper", lively_model(tokenizer, n_embd=192), tokenizer, step=3
        )
    load, epoch = Load(url, prompts, texts, num_connections=4), admin.delivery["epoch"]
    with load.running():
        load.wait_for_more(8)
        gate = rows(models[0], prompts) if kind == "worse" else []
        assert (
            answer := admin.promote(place, gate_rows=gate, max_loss_increase=0.5)
        ).status_code == 202, answer.text
        outcome = admin.wait_for("steady")["outcome"]
        load.wait_for_more(8)
    assert outcome["result"] == "refused" and re.search(message, outcome["reason"]), outcome
    assert load.wrong == [] and {v for answers in load.connections for v in answers.versions} == {
        version(live)
    }
    assert admin.delivery["epoch"] == epoch


def test_a_canary_takes_turns_and_the_version_before_returns_at_once(
    admin: Admin, url: str, live: Path, other: Path, prompts: list[list[int]], texts: Texts
) -> None:
    load = Load(url, prompts, texts)
    with load.running():
        load.wait_for_more(50)
        assert admin.promote(other, canary_percent=50, watch_s=1000).status_code == 202
        admin.wait_for("canary")
        load.wait_for_more(300)
        assert admin.http.post("/admin/finish", json={}).status_code == 200
        admin.wait_for("watching")
        load.wait_for_more(100)
        began_s = time.monotonic()
        assert admin.http.post("/admin/rollback", json={}).json()["phase"] == "steady"
        admin.wait_for("steady")
        with httpx.Client(base_url=url, timeout=limit_s(30)) as http:
            asked = {"model": "tiny", "prompt": [1], "max_tokens": 1}
            assert http.post("/v1/completions", json=asked).headers["x-model-version"] == version(
                live
            )
        took_s = time.monotonic() - began_s
        load.wait_for_more(100)
    assert load.wrong == []
    of_canary = sum(version(other) in answers.versions for answers in load.connections)
    answered = [v for answers in load.connections for v in answers.versions]
    assert of_canary == len(load.connections), "everybody saw the new version once it was live"
    print(
        f"{len(answered)} answers, {answered.count(version(other))} of the new version; the longest took "
        f"{load.longest_s:.1f} s; {took_s:.1f} s from the order to roll back to an answer"
    )


def test_weights_that_end_the_only_engine_do_not_stay(
    admin: Admin, url: str, live: Path, other: Path, prompts: list[list[int]]
) -> None:
    """Played by a kill at that moment: the replica ends with its engine, and another one begins
    with what is live."""
    replica = admin.status()["replicas"][0]["replica"]
    terms = {"gate_rows": [prompts[5]] * 100, "max_loss_increase": 100.0, "watch_s": 1000}
    assert admin.promote(other, **terms).status_code == 202

    def is_about_to() -> bool:
        state = admin.status()
        candidate = state["delivery"]["candidate"]
        slots = state["replicas"][0]["slots"]  # the live version's may be in place too
        return candidate is not None and slots.get(str(candidate["serial"]), {}).get("in_place")

    wait_until(is_about_to, timeout_s=30)
    engine().kill()

    def has_ended() -> bool:
        answer = admin.http.get("/admin/status")
        return answer.status_code == 200 and answer.json()["delivery"]["phase"] == "steady"

    wait_until(has_ended, timeout_s=90)
    outcome = admin.delivery["outcome"]  # rolled back if its gate had passed by then
    assert (
        outcome["result"] in ("refused", "rolled_back")
        and f"{replica} has ended" in outcome["reason"]
    ), outcome
    with httpx.Client(base_url=url, timeout=limit_s(30)) as http:
        answer = http.post(
            "/v1/completions", json={"model": "tiny", "prompt": [1], "max_tokens": 1}
        )
    assert answer.status_code == 200 and answer.headers["x-model-version"] == version(live)


def test_a_run_is_followed_over_ten_checkpoints(
    admin: Admin, url: str, folder: Path, models: list[GPT], tokenizer: Tokenizer, prompts: list[list[int]],
    texts: Texts,
) -> None:  # fmt: skip
    """`raymill promote --follow` beside clients that never stop, each answer that of the version
    that it names."""
    run = folder / "storage/runs/followed/checkpoints"
    run.mkdir(parents=True)
    ready = [
        write_model(folder / f"hidden-{step}", model, tokenizer, step=step)
        for step, model in enumerate(models[2:], start=10)
    ]
    known = texts | {
        version(place): greedy_texts(model, tokenizer, prompts)
        for place, model in zip(ready, models[2:], strict=True)
    }
    command = [
        *RAYMILL,
        "promote",
        "--follow",
        "followed",
        "--url",
        url,
        "--admin-key-file",
        str(folder / "admin"),
    ]
    command += ["--storage.uri", str(folder / "storage"), "--gate-source", "none", "--watch-s", "0"]
    load = Load(url, prompts, known, num_connections=8)
    with load.running(), (folder / "follow.log").open("w") as said:
        follower = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=said, stderr=said
        )
        try:
            for place in ready:
                place.rename(run / f"step-{place.name.removeprefix('hidden-'):0>9}")
                wanted = version(run / f"step-{place.name.removeprefix('hidden-'):0>9}")

                def is_live(wanted: str = wanted) -> bool:
                    state = admin.delivery
                    return state["live"]["version"] == wanted and state["phase"] == "steady"

                wait_until(is_live, timeout_s=90)
                load.wait_for_more(10)
        finally:
            follower.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.wait(limit_s(20))
            follower.kill()
    assert load.wrong == [], (folder / "follow.log").read_text()
    history = [outcome["result"] for outcome in admin.delivery["history"][-NUM_FOLLOWED:]]
    assert history == ["promoted"] * NUM_FOLLOWED
    for answers in load.connections:
        order = list(dict.fromkeys(answers.versions))
        assert [v for v in known if v in order] == order, "an older version came back"
    assert len(children_with("serving.engine_process.run_engine")) == 1
    print(
        f"{load.num_answers} answers of {NUM_FOLLOWED + 1} versions, the longest took {load.longest_s:.1f} s"
    )
