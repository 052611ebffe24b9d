"""A replica's metrics: what each version of a promotion does, its queue and its engine, and the
state of the endpoint."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.settings.serve import EngineConfig, ServeConfig
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.delivery.promotion import Delivery, Phase, PromotionOutcome, Terms, Version
from serving.delivery.versions import Versions
from tests.serving.delivery_parts import served
from tests.serving.endpoint_parts import routes_of
from tests.serving.tiny_models import write_model
from tests.waiting import wait_in_loop_until

PROMPT = list(range(1, 41))
REQUEST = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def other(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt = GPT(model.config)
    gpt.init_weights(2)
    return write_model(
        tmp_path_factory.mktemp("checkpoints") / "step-8", gpt.eval(), tokenizer, step=8
    )


async def seen(http: httpx.AsyncClient, name: str, **labels: str) -> dict[str, float]:
    """The values of a series with these labels, by the label that is left of its own ones."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    found: dict[str, float] = {}
    for sample in (
        sample for family in families for sample in family.samples if sample.name == name
    ):
        if labels.items() <= sample.labels.items():
            rest = set(sample.labels) - {"model_name", "replica", *labels}
            found[" ".join(sample.labels[label] for label in sorted(rest))] = sample.value
    return found


def test_each_version_of_a_canary_has_its_own_figures(checkpoint: Path, other: Path) -> None:
    old, new = served(checkpoint, 1), served(other, 2)
    state = Delivery(
        deployment="d", model_name="tiny", epoch=2, phase=Phase.CANARY, live=old, candidate=new,
        terms=Terms(watch_s=1000, canary_percent=50.0), last_serial=2,
    )  # fmt: skip

    async def scenario() -> None:
        config = ServeConfig(engine=EngineConfig(max_num_seqs=1))
        versions = Versions(config, state, on_live_death=print)
        await versions.wait_until_live()
        await wait_in_loop_until(lambda: versions.report()[2].status == "ready")
        app = routes_of(versions)
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://test"
            ) as http:
                await asserted(http, versions)
        finally:
            await versions.close()

    async def asserted(http: httpx.AsyncClient, versions: Versions) -> None:
        async def ask(version: Version, **fields: Any) -> None:
            session = next(
                key for key in map(str, range(99)) if state.route.serial_for(key) == version.serial
            )
            answer = await http.post(
                "/v1/completions", json=REQUEST | fields, headers={"x-session-id": session}
            )
            assert (
                answer.status_code == 200 and answer.headers["x-model-version"] == version.version
            )

        await asyncio.gather(ask(old, n=8), ask(new))
        await ask(new)
        assert await seen(http, "vllm:generation_tokens_total") == {
            old.version: 40,
            new.version: 10,
        }
        ended = await seen(http, "vllm:request_success_total", finished_reason="length")
        assert ended == {old.version: 8, new.version: 2}
        # All but the first sequence of each version find two blocks of 16 of their 40 tokens.
        assert await seen(http, "vllm:prefix_cache_queries_total") == {
            old.version: 320,
            new.version: 80,
        }
        assert await seen(http, "vllm:prefix_cache_hits_total") == {
            old.version: 7 * 32,
            new.version: 32,
        }
        # Each sequence reads the rest of its prompt, and four of its five tokens to draw the next.
        tokens = {old.version: 8 * 44 - 7 * 32, new.version: 2 * 44 - 32}
        assert await seen(http, "vllm:iteration_tokens_total_sum") == tokens
        steps = await seen(http, "raymill:step_seconds_count")
        took_s = await seen(http, "raymill:step_seconds_sum")
        assert steps == {old.version: 40, new.version: 10} and min(took_s.values()) > 0
        # There is one place: each of eight sequences waits for those before it.
        assert await seen(http, "vllm:request_queue_time_seconds_count") == {
            old.version: 8,
            new.version: 2,
        }
        waits, ttft, whole = [
            await seen(http, f"vllm:{name}_seconds_sum")
            for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency")
        ]
        assert all(0 < waits[version] < ttft[version] < whole[version] for version in steps)
        assert waits[old.version] > whole[old.version] / 2

        assert await seen(http, "raymill:version_role", role="stable") == {
            old.version: 1,
            new.version: 0,
        }
        assert await seen(http, "raymill:version_role", role="canary") == {
            old.version: 0,
            new.version: 1,
        }
        assert {k for k, v in (await seen(http, "raymill:promotion_phase")).items() if v} == {
            "canary"
        }
        watched = {
            "phase": Phase.WATCHING,
            "live": new,
            "previous": old,
            "candidate": None,
            "epoch": 3,
        }
        versions.adopt(state.model_copy(update=watched), asked_at_s=0)
        assert await seen(http, "raymill:version_role", role="canary") == {
            old.version: 0,
            new.version: 1,
        }
        outcome = PromotionOutcome(version=new, result="rolled_back", reason="slow")
        is_over = {
            "phase": Phase.STEADY,
            "live": old,
            "previous": None,
            "candidate": None,
            "epoch": 4,
        }
        refused = outcome.having(result="refused")
        adapter = Delivery(deployment="d", model_name="sql", live=old, outcome=refused)
        is_over |= {"outcome": outcome, "draining": True, "adapters": {"sql": adapter}}
        versions.adopt(state.model_copy(update=is_over), asked_at_s=0)
        assert await seen(http, "raymill:version_role", role="stable") == {
            old.version: 1,
            new.version: 0,
        }
        assert await seen(http, "raymill:version_role", role="canary") == {
            old.version: 0,
            new.version: 0,
        }
        assert await seen(http, "raymill:last_promotion") == {
            "promoted": 0,
            "refused": 1,
            "rolled_back": 1,
        }
        assert await seen(http, "raymill:draining") == {"": 1}

    asyncio.run(scenario())
