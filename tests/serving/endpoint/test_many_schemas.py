"""Many strangers' schemas at a real endpoint with a random model: the JSON-Schema-Test-Suite, and
a client that sends 10,000 different ones."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.structured.json_schema_suite import SuiteSchema, fetched_suite
from tests.serving.structured.schema_cases import field
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MODEL = "tiny"
NUM_DIFFERENT = 10_000
NUM_AT_ONCE = 16
MAX_GROWTH_BYTES = 64 << 20


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, wide_checkpoint: Path) -> str:
    config = ServeConfig(
        checkpoint=str(wide_checkpoint),
        model_name=MODEL,
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
        engine=EngineConfig(max_num_seqs=NUM_AT_ONCE),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> list[SuiteSchema]:
    schemas = fetched_suite(tmp_path_factory.mktemp("suite"))
    if schemas is None:
        pytest.skip("the source package of jsonschema cannot be fetched")
    return schemas


def request(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    by_schema = {"name": "answer", "schema": schema}
    response_format = {"type": "json_schema", "json_schema": by_schema}
    return {"model": MODEL, "prompt": "fox", "response_format": response_format} | fields


def answers(url: str, requests: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    """The answers in the order of the requests, of which some are asked at once."""

    async def ask_all() -> list[httpx.Response]:
        places = asyncio.Semaphore(NUM_AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=limit_s(120)) as http:

            async def ask(fields: dict[str, Any]) -> httpx.Response:
                async with places:
                    return await http.post("/v1/completions", json=fields)

            return await asyncio.gather(*map(ask, requests))

    return asyncio.run(ask_all())


def test_each_finished_answer_to_the_suite_validates(
    url: str, suite: list[SuiteSchema], closing: dict[str, float]
) -> None:
    asked = [
        request(case.schema, seed=seed, max_tokens=200, logit_bias=closing)
        for case in suite
        for seed in range(3)
    ]
    outcomes: Counter[str] = Counter()
    finished, refused = set[str](), dict[str, str]()
    cases = (case for case in suite for _ in range(3))
    for case, answer in zip(cases, answers(url, asked), strict=True):
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["code"] == "invalid_schema" and error["param"], answer.text
            refused[case.name] = error["message"]
            continue
        assert answer.status_code == 200, (case, answer.text)
        [choice] = answer.json()["choices"]
        outcomes[choice["finish_reason"]] += 1
        if choice["finish_reason"] == "stop":
            finished.add(case.name)
            jsonschema.Draft202012Validator(case.schema).validate(json.loads(choice["text"]))
    num_taken = len(suite) - len(refused)
    print(f"{len(suite)} schemas, {num_taken} taken, {len(finished)} finished; {outcomes}")
    assert set(outcomes) <= {"stop", "length"}
    assert num_taken > 0.4 * len(suite), "others have keywords that are refused by name"
    assert len(finished) > 0.9 * num_taken


def test_ten_thousand_schemas_fill_no_memory(url: str, wide_checkpoint: Path) -> None:
    def ask(numbers: range) -> None:
        for answer in answers(url, [request(different(n), max_tokens=1) for n in numbers]):
            assert answer.status_code == 200, answer.text

    ask(range(NUM_DIFFERENT // 5))  # the caches are full
    before = memory(wide_checkpoint)
    ask(range(NUM_DIFFERENT // 5, NUM_DIFFERENT))
    after = memory(wide_checkpoint)
    growth = {name: after[name] - before[name] for name in before}
    print(f"MB before: {in_mb(before)}; grown by {in_mb(growth)}")
    assert max(growth.values()) < MAX_GROWTH_BYTES


def different(number: int) -> dict[str, Any]:
    """A schema that no other number has."""
    words = [f"word{number * 7 + place}" for place in range(40)]
    return field({"anyOf": [{"enum": words}, {"type": "string", "pattern": f"^x{number}[a-z]*$"}]})


def memory(checkpoint: Path) -> dict[str, int]:
    """Resident bytes of the replica, of its engine, and of the process that checks grammars."""
    word = json.dumps(str(checkpoint))
    [engine] = [p for p in children_with("run_engine") if word in " ".join(p.cmdline())]
    [check] = [p for p in children_with("run_check") if word in " ".join(p.cmdline())]
    replica = engine.parent()
    assert replica is not None and check.parent() == replica
    named = {"replica": replica, "engine": engine, "check": check}
    return {name: process.memory_info().rss for name, process in named.items()}


def in_mb(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size >> 20 for name, size in sizes.items()}
