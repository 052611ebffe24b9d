"""Adapters beside their base in one engine of vLLM: each answers what its merged model would."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from cluster.settings.serve import ServeConfig
from jobs.run.base import Base
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.delivery.promotion import (
    Phase,
    ReplicaReport,
    Terms,
    advance,
    start,
    version_of,
)
from serving.delivery.route import ROUTE_HEADER, Route
from serving.delivery.versions import Versions
from serving.protocol.served_model import read_served_model
from tests.serving.adapter_parts import MadeAdapter, made_adapter, stored_base
from tests.serving.endpoint_parts import replica_client
from tests.serving.vllm_parts import installed, vllm_config, vllm_model

GREEDY = SamplingParams(temperature=0.0)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def whole(tokenizer: Tokenizer) -> GPT:
    return vllm_model(tokenizer, seed=5, architecture="llama")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def base(storage: Path, whole: GPT, tokenizer: Tokenizer) -> Base:
    return stored_base(storage, whole, tokenizer)


@pytest.fixture(scope="module")
def adapters(storage: Path, base: Base, whole: GPT, tokenizer: Tokenizer) -> dict[str, MadeAdapter]:
    made = {}
    for seed, name in enumerate(("red", "blue"), start=1):
        made[name] = made_adapter(storage, name, base, whole, tokenizer, seed=seed)
    return made


def config(storage: Path, adapters: dict[str, str], **engine: object) -> ServeConfig:
    return ServeConfig.model_validate(
        {
            "adapters": adapters,
            "model_name": "tiny",
            "engine": vllm_config(dtype="float32", **engine).model_dump(),
            "storage": {"uri": str(storage)},
        }
    )


async def answered(http: httpx.AsyncClient, name: str, prompt: list[int], **headers: str) -> str:
    asked = {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    body = asked | {"ignore_eos": True}
    answer = await http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return str(answer.json()["choices"][0]["text"])


async def switched(versions: Versions, name: str, folder: Path) -> None:
    """Promotes an adapter as far as to the watch, as the coordinator does for one replica."""
    candidate = version_of(read_served_model(folder, name=None), checkpoint=str(folder))
    line = start(versions.delivery.adapters[name], candidate, Terms(watch_s=1000))
    while line.phase is not Phase.WATCHING:
        versions.adopt(versions.delivery.with_line(name, line), asked_at_s=time.monotonic())
        await asyncio.sleep(0.1)
        slots = versions.adapters[name].report()
        line = advance(line, [ReplicaReport("r", line.epoch, slots)], elapsed_s=0)
        assert line.outcome is None, line.outcome
    versions.adopt(versions.delivery.with_line(name, line), asked_at_s=time.monotonic())


@installed
@pytest.mark.slow
def test_two_adapters_and_their_base__answer_at_once_as_their_merged_models(
    storage: Path,
    base: Base,
    whole: GPT,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
) -> None:
    merged = {"tiny": whole} | {name: made.merged for name, made in adapters.items()}
    expected = {}
    for name, one in merged.items():
        for number, prompt in enumerate(prompts[:4]):
            ids = generate(one, prompt, max_tokens=NUM_TOKENS, params=GREEDY)
            expected[name, number] = tokenizer.decode(ids)
    assert len({expected[name, 1] for name in merged}) == 3

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["tiny", "red", "blue"]
        assert [card.get("parent") for card in listed] == [None, "tiny", "tiny"]
        assert listed[1]["lineage"]["base_hash"] == base.parameter_hash
        assert (await http.get("/v1/models/blue")).json()["version"] == listed[2]["version"]
        asked = [answered(http, name, prompts[number]) for name, number in expected]
        assert await asyncio.gather(*asked) == [*expected.values()]
        answer = await http.post("/v1/completions", json={"model": "green", "prompt": "the"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"

        now = expected | {("blue", number): expected["red", number] for number in range(4)}
        promoting = asyncio.create_task(switched(versions, "blue", adapters["red"].folder))
        while not promoting.done():
            asked = [answered(http, name, prompts[number]) for name, number in expected]
            texts = zip(expected, await asyncio.gather(*asked), strict=True)
            for place, text in texts:
                assert text in (expected[place], now[place])
        await promoting
        asked = [answered(http, name, prompts[number]) for name, number in expected]
        assert await asyncio.gather(*asked) == [*now.values()]
        card = (await http.get("/v1/models/blue")).json()
        assert (card["id"], card["parent"]) == ("blue", "tiny")
        assert card["version"] == listed[1]["version"]
        assert card["delivery"]["previous"]["version"] == listed[2]["version"]

        # Another replica has heard of a rollback, first of the other adapter, before this one
        before = versions.adapters["blue"].delivery.previous
        assert before is not None
        for origin, text in (("red", now["blue", 1]), ("blue", expected["blue", 1])):
            header = {
                ROUTE_HEADER: Route(epoch=9, primary=before.serial, origin=origin).to_header()
            }
            assert await answered(http, "blue", prompts[1], **header) == text
            assert await answered(http, "red", prompts[1], **header) == expected["red", 1]

    async def run() -> None:
        places = {name: str(made.folder) for name, made in adapters.items()}
        served = config(storage, places)
        async with replica_client(base.folder(str(storage)), config=served) as parts:
            await check(*parts)

    asyncio.run(run())


@installed
@pytest.mark.slow
def test_an_adapter_that_the_endpoint_begins_with__is_the_model(
    storage: Path,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
) -> None:
    red = adapters["red"]
    ids = generate(red.merged, prompts[1], max_tokens=NUM_TOKENS, params=GREEDY)

    async def run() -> None:
        async with replica_client(red.folder, config=config(storage, {})) as (http, _):
            assert await answered(http, "tiny", prompts[1]) == tokenizer.decode(ids)

    asyncio.run(run())


@installed
@pytest.mark.slow
def test_an_adapter_that_cannot_be_served__is_refused_with_what_to_do(
    storage: Path,
    base: Base,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    other = vllm_model(tokenizer, seed=6, architecture="llama")
    stranger = made_adapter(
        tmp_path, "other", stored_base(tmp_path, other, tokenizer), other, tokenizer, seed=3
    )
    folder = base.folder(str(storage))
    for place, message in ((stranger.folder, "is served"), (folder, "is a whole model")):

        async def run(place: Path = place) -> None:
            async with replica_client(folder, config=config(storage, {"red": str(place)})):
                pass

        with pytest.raises(RuntimeError, match=f"the adapter red: .* {message}"):
            asyncio.run(run())


def test_settings_of_adapters__that_no_engine_has__are_refused() -> None:
    with pytest.raises(ValueError, match="adapters are computed by vLLM"):
        ServeConfig.model_validate({"adapters": {"red": "runs/red"}})
    with pytest.raises(ValueError, match="max_adapters=1 is less than the 2"):
        ServeConfig.model_validate(
            {
                "adapters": {"red": "runs/red", "blue": "runs/blue"},
                "engine": {"backend": "vllm", "max_adapters": 1},
            }
        )
    with pytest.raises(ValueError, match="is the name of an adapter too"):
        ServeConfig.model_validate(
            {"adapters": {"red": "a"}, "model_name": "red", "engine": {"backend": "vllm"}}
        )
