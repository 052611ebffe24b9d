"""Tracing a text over HTTP for a checkpoint that was trained for real, with the real process
beside the replica."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.settings.serve import ServeConfig
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.trace_run import trace
from jobs.trace.windows import LEAST_SPAN
from raymill.errors import UserError
from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from serving.delivery.versions import Versions
from serving.xray.routes import trace_of
from serving.xray.trace import (
    LIMITS,
    MAX_TEXT_CHARS,
    MAX_WAITING,
    MIN_SPAN_TOKENS,
    MODULE,
    require_traced,
)
from tests.jobs.planted_runs import PASSAGE, disturbed_run, planted_texts
from tests.serving.endpoint_parts import Run, replica_client, shared_replica
from tests.waiting import wait_in_loop_until

pytestmark = pytest.mark.more

KEY, USER, ADMIN = "sk-trace", "sk-user", "sk-admin"
TEXT = f"unheard of: {PASSAGE} and so on"
Body = dict[str, Any]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return disturbed_run(tmp_path_factory.mktemp("traced"))


def checkpoints_of(plan: RunPlan) -> dict[int, Path]:
    names = RunCheckpoints(plan.run).names
    return {int(name.split("-")[1]): Path(plan.run.uri, "checkpoints", name) for name in names}


def newest_of(plan: RunPlan) -> Path:
    return max(checkpoints_of(plan).items())[1]


def config_of(plan: RunPlan, checkpoint: Path) -> ServeConfig:
    return ServeConfig(
        checkpoint=str(checkpoint),
        trace=plan.tokens_uri,
        api_key_file="keys",
        storage=plan.config.storage,
    )


def rules() -> AccessRules:
    users = (ApiKey.read(f"{KEY} name=reader may=trace"), ApiKey.read(USER))
    return AccessRules(users, (ApiKey.read(ADMIN),), traces=True)


@pytest.fixture(scope="module")
def run(plan: RunPlan) -> Iterator[Run]:
    newest = newest_of(plan)
    with shared_replica(newest, config=config_of(plan, newest), access=rules(), key=KEY) as run:
        yield run


async def ask(http: httpx.AsyncClient, **fields: Any) -> Body:
    answer = await http.post("/v1/trace", json={"model": "tiny"} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(answer: httpx.Response, status: int) -> Body:
    assert answer.status_code == status, answer.text
    error: Body = answer.json()["error"]
    assert error["message"].isprintable()
    return error


def processes() -> list[psutil.Process]:
    living = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in living if MODULE in p.cmdline()]


def test_an_answer_has_what_the_run_learned_and_where_it_stands(run: Run, plan: RunPlan) -> None:
    step = max(checkpoints_of(plan))
    expected = trace(plan.run, TEXT, min_tokens=LEAST_SPAN, step=step).json()
    losses = {line["step"]: line["loss"] for line in Ledger.read(plan.run).steps}
    texts = planted_texts()

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await ask(http, text=TEXT)
        assert (answer["run"], answer["step"], answer["missing"]) == ("tiny", step, [])
        assert answer["traced_tokens"] == expected["traced_tokens"]
        [span], [known] = answer["spans"], expected["spans"]
        assert span["tokens"] == [known["start"], known["end"]]
        assert TEXT[slice(*span["characters"])] == span["text"] == known["text"]
        assert span["text"].strip() == PASSAGE
        assert span["occurrences"] == known["occurrences"] == len(span["documents"]) >= 2
        assert (span["first_step"], span["last_step"]) == (known["first_step"], known["last_step"])
        for document, place in zip(span["documents"], known["places"], strict=True):
            learned = [turn for turn in place["turns"] if turn["outcome"] == "learned"]
            assert (document["file"], document["place"]) == (place["file"], place["place"])
            assert document["num_steps"] == len({turn["step"] for turn in learned}) > 0
            assert (
                document["steps"]
                == [
                    {
                        "step": turn["step"],
                        "epoch": turn["epoch"],
                        "tokens": turn["tokens"],
                        "loss": losses[turn["step"]],
                    }
                    for turn in learned
                ][: LIMITS["max_steps"]]
            )
            line = Path(document["file"]).read_bytes()[document["place"] :].partition(b"\n")[0]
            text = json.loads(line)["text"]
            assert text in texts
            assert document["before"] + span["text"] + document["behind"] in text
            assert document["before"] and document["behind"]
            assert 0 < document["first_token"] < document["tokens"]

    run(check)


def test_tokens_are_traced_as_their_text_is(run: Run, plan: RunPlan) -> None:
    ids = IndexedStore.open(open_storage(plan.tokens_uri)).encoded(TEXT).tolist()

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        of_text = await ask(http, text=TEXT)
        assert await ask(http, tokens=ids) == of_text
        few = await ask(http, text=TEXT, documents=1, context_tokens=0)
        [span] = few["spans"]
        [document] = span["documents"]
        assert document["before"] == document["behind"] == ""
        assert span["occurrences"] == of_text["spans"][0]["occurrences"]
        for nothing in ("", "Quite another text, of which nobody wrote a word."):
            assert (await ask(http, text=nothing))["spans"] == []
        whole = planted_texts()[7]
        [span] = (await ask(http, text=whole, context_tokens=99, documents=1))["spans"][:1]
        assert span["characters"][0] == 0, "a text that is a whole document"

    run(check)


def test_it_is_shown_to_keys_with_the_right_alone(run: Run, plan: RunPlan) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for key, status, code in (
            (USER, 403, "trace_right_required"),
            (ADMIN, 403, "trace_right_required"),
            ("sk-wrong", 401, "invalid_api_key"),
        ):
            for method in ("GET", "POST"):
                headers = {"Authorization": f"Bearer {key}"}
                body = {"model": "tiny", "text": TEXT}
                answer = await http.request(method, "/v1/trace", headers=headers, json=body)
                assert refused(answer, status)["code"] == code
                assert PASSAGE not in answer.text
        limits = (await http.get("/v1/trace")).json()
        assert limits["max_tokens"] == LIMITS["max_tokens"]

    run(check)
    folder = newest_of(plan)

    async def without() -> None:
        async with replica_client(folder, access=AccessRules((ApiKey.read(KEY),)), key=KEY) as (
            http,
            _,
        ):
            for method in ("GET", "POST"):
                answer = await http.request(method, "/v1/trace", json={"model": "tiny"})
                assert "without the setting trace" in refused(answer, 404)["message"]

    asyncio.run(without())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"text": "x" * (MAX_TEXT_CHARS + 1)}, 400, "text"),
        ({"text": "я" * 20_000}, 400, "text"),
        ({"tokens": [1] * (LIMITS["max_tokens"] + 1)}, 400, "tokens"),
        ({"tokens": [1 << 40]}, 400, "tokens"),
        ({"tokens": [-1]}, 400, "tokens"),
        ({"text": TEXT, "min_tokens": MIN_SPAN_TOKENS - 1}, 400, "min_tokens"),
        ({"text": TEXT, "documents": 51}, 400, "documents"),
        ({"text": TEXT, "context_tokens": 513}, 400, "context_tokens"),
        ({"text": TEXT, "tokens": [1]}, 400, None),
        ({}, 400, None),
        ({"text": TEXT, "model": "gpt-4"}, 404, "model"),
    ],
)
def test_a_request_over_a_limit_is_refused_by_name(
    run: Run, fields: Body, status: int, param: str | None
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/trace", json={"model": "tiny"} | fields)
        assert refused(answer, status)["param"] == param

    run(check)
    assert MIN_SPAN_TOKENS == LEAST_SPAN


def test_a_process_that_ends_is_an_error_of_one_request(run: Run) -> None:
    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        await ask(http, text=TEXT)
        [process] = processes()
        assert process.nice() > psutil.Process().nice()
        process.suspend()
        asked = {"model": "tiny", "text": TEXT}
        tracing = trace_of(versions.live, versions.config)
        slow = [asyncio.create_task(http.post("/v1/trace", json=asked))]
        await wait_in_loop_until(lambda: tracing._num_waiting == 1)
        for number in range(MAX_WAITING):
            slow.append(asyncio.create_task(http.post("/v1/trace", json=asked)))
            await wait_in_loop_until(lambda n=number: tracing._num_waiting == n + 2)
        one_more = await http.post("/v1/trace", json=asked)
        assert refused(one_more, 429)["code"] == "overloaded"
        fields = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        assert (await http.post("/v1/completions", json=fields)).status_code == 200
        os.kill(process.pid, signal.SIGKILL)
        first, *others = await asyncio.gather(*slow)
        assert refused(first, 503)["code"] == "trace_unavailable"
        assert {answer.status_code for answer in others} == {200}, "by another process"
        tracing.close()
        assert not processes()

    run(check)


def test_an_index_of_other_data_is_refused_with_the_two_hashes(
    plan: RunPlan, checkpoint: Path
) -> None:
    require_traced(config_of(plan, newest_of(plan)))
    manifest_hash = IndexedStore.open(open_storage(plan.tokens_uri)).manifest.hash
    other = config_of(plan, checkpoint)
    with pytest.raises(UserError, match=rf"{manifest_hash}.* was trained on d{{64}}"):
        require_traced(other)


def test_a_version_of_other_data_is_served_and_its_traces_are_refused(
    plan: RunPlan, checkpoint: Path
) -> None:
    manifest_hash = IndexedStore.open(open_storage(plan.tokens_uri)).manifest.hash
    config = config_of(plan, checkpoint)

    async def main() -> None:
        async with replica_client(checkpoint, config=config, access=rules(), key=KEY) as (http, _):
            answer = await http.post("/v1/trace", json={"model": "tiny", "text": TEXT})
            assert manifest_hash in refused(answer, 409)["message"]

    asyncio.run(main())


def test_the_setting_needs_a_key_file() -> None:
    with pytest.raises(ValueError, match="expected api_key_file or admin_key_file"):
        ServeConfig(trace="store")
