"""Chat templates in a promotion: what fails is refused while it loads, and rolled back by what
clients send later."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from model.text.tokenizer import Tokenizer
from serving.api.admin_routes import _read_candidate
from serving.delivery.promotion import Delivery, Phase, Terms
from serving.delivery.versions import Versions
from serving.protocol.errors import ApiError
from tests.serving.delivery_parts import served
from tests.serving.endpoint_parts import routes_of
from tests.serving.tiny_models import as_transformers_folder, lively_model, write_model
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

pytestmark = pytest.mark.more

GOOD = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BROKEN = "{% for m in messages %}{{ m.content "
REFUSES_BAD = "{% if bad is defined %}{{ raise_exception('bad') }}{% endif %}"
REFUSES_Q = "{% if 'q' in messages[0].content %}{{ raise_exception('no q') }}{% endif %}"


def chat_folder(tokenizer: Tokenizer, place: Path, template: str, *, seed: int) -> Path:
    """A folder of transformers with a model and a template."""
    own = write_model(place / f"own-{seed}", lively_model(tokenizer, seed=seed), tokenizer)
    folder = as_transformers_folder(own, place / f"chat-{seed}")
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_candidate_whose_template_is_broken_gets_no_request(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Neither the order to promote it is obeyed, nor does a replica load it if another process has
    taken the order."""
    live, broken = (
        chat_folder(tokenizer, tmp_path, template, seed=i)
        for i, template in enumerate((GOOD, BROKEN), 1)
    )
    state = Delivery(deployment="d", model_name="tiny", live=served(live, 1))
    loading = {"phase": Phase.LOADING, "candidate": served(broken, 2), "terms": Terms(watch_s=1)}

    async def scenario() -> None:
        versions = Versions(
            ServeConfig(engine=EngineConfig(max_num_seqs=2)), state, on_live_death=print
        )
        await versions.wait_until_live()
        with pytest.raises(ApiError, match="cannot write a user's message") as refused:
            await _read_candidate(str(broken), versions.live, ServeConfig())
        assert refused.value.code == "checkpoint_refused"
        versions.adopt(state.having(**loading), asked_at_s=0)
        await wait_in_loop_until(lambda: versions.report()[2].status != "loading")
        assert "cannot write a user's message" in versions.report()[2].problem
        await versions.close()

    asyncio.run(scenario())


def test_a_chat_that_the_version_before_can_write_is_the_new_ones_failure(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The version before answers it. A chat that both refuse is its client's mistake."""
    refuses_z = REFUSES_Q.replace("q", "z")
    old = chat_folder(tokenizer, tmp_path, refuses_z + GOOD, seed=1)
    refuses_quick = REFUSES_Q.replace("'q'", "'quick'")
    new = chat_folder(tokenizer, tmp_path, refuses_z + refuses_quick + REFUSES_BAD + GOOD, seed=2)
    config = ServeConfig(engine=EngineConfig(max_num_seqs=2), model_name="tiny")
    state = Delivery(
        deployment="d", model_name="tiny", phase=Phase.WATCHING, live=served(new, 2), previous=served(old, 1),
        terms=Terms(watch_s=1000), last_serial=2,
    )  # fmt: skip

    async def scenario() -> None:
        versions = Versions(config, state, on_live_death=print)
        await versions.wait_until_live()
        await wait_in_loop_until(lambda: versions.report()[1].status == "ready")
        app = routes_of(versions)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=limit_s(60)
        ) as http:

            async def chat(text: str, **fields: object) -> httpx.Response:
                messages = [{"role": "user", "content": text}]
                asked = {"model": "tiny", "messages": messages, "max_tokens": 2} | fields
                return await http.post("/v1/chat/completions", json=asked)

            assert (await chat("fox")).headers["x-model-version"] == versions.live.model.version
            assert versions.report()[2].stats.errors == 0
            answer = await chat("the quick fox")
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-model-version"] == served(old, 1).version
            assert versions.report()[2].stats.errors == 1
            answer = await chat("lazy")
            assert answer.status_code == 400 and "no z" in answer.text.replace("no q", "no z")
            assert versions.report()[2].stats.errors == 1
            answer = await chat("fox", chat_template_kwargs={"bad": 1})
            assert answer.headers["x-model-version"] == served(old, 1).version
            assert versions.report()[2].stats.errors == 1, "no client's setting rolls it back"
            shown = (await http.get("/metrics")).text
            refused = [line for line in shown.splitlines() if "chats_refused" in line]
            assert any(
                versions.live.model.version in line and line.endswith(" 3.0") for line in refused
            )
        await versions.close()

    asyncio.run(scenario())
