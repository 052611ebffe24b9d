"""The page to talk to the model on a real endpoint during a real canary: an operator compares the
versions, and what is stopped in the browser ends behind the proxy."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, EngineConfig, HttpConfig, ServeConfig
from model.text.tokenizer import Tokenizer
from tests.chromium import Watched, needs_chromium, running_chromium
from tests.serving.delivery_parts import Admin, version
from tests.serving.endpoint_parts import Endpoints, assert_error
from tests.serving.page_parts import (
    CONTEXT_TOKENS,
    DESKTOP,
    answers,
    chat_checkpoint,
    expect_answers,
    say,
    set_settings,
    stored,
)
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, needs_chromium]

USER_KEY, ADMIN_KEY = "sk-chat-user", "sk-chat-admin"


@dataclass(frozen=True)
class Canary:
    url: str
    old: str
    new: str
    request_log: Path

    @property
    def logged(self) -> list[dict[str, Any]]:
        lines = self.request_log.read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def canary(
    endpoints: Endpoints, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Canary]:
    folder = tmp_path_factory.mktemp("chat-endpoint")
    old = chat_checkpoint(folder / "step-7", tokenizer)
    new = chat_checkpoint(folder / "step-8", tokenizer, seed=2, step=8)
    (folder / "keys").write_text(f"{USER_KEY} name=user\n")
    (folder / "admin").write_text(f"{ADMIN_KEY} name=operator\n")
    config = ServeConfig(
        checkpoint=str(old),
        model_name="tiny",
        api_key_file=str(folder / "keys"),
        admin_key_file=str(folder / "admin"),
        xray="admin",
        storage=StorageConfig(uri=str(folder / "storage")),
        http=HttpConfig(request_log=str(folder / "requests.jsonl")),
        engine=EngineConfig(max_num_seqs=8),
        delivery=DeliveryConfig(max_latency_ratio=None),
    )
    url = str(endpoints.deployed(config)["url"])
    admin = Admin(url, ADMIN_KEY)
    answer = admin.promote(new, canary_percent=0, watch_s=1000)
    assert answer.status_code == 202, answer.text
    admin.wait_for("canary")
    yield Canary(url, version(old), version(new), folder / "requests.jsonl")
    admin.order("rollback")
    admin.http.close()


def test_only_who_may_look_inside_may_name_a_version(canary: Canary) -> None:
    asked = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 3}

    def answer(key: str, model: str) -> httpx.Response:
        return httpx.post(
            f"{canary.url}/v1/chat/completions",
            json=asked | {"model": model},
            headers={"Authorization": f"Bearer {key}"},
            timeout=limit_s(30),
        )

    for name in (canary.old, canary.new):
        given = answer(ADMIN_KEY, f"tiny@{name}")
        assert given.status_code == 200, given.text
        assert given.headers["x-model-version"] == name
        assert_error(answer(USER_KEY, f"tiny@{name}"), 403)
    assert answer(USER_KEY, "tiny").headers["x-model-version"] == canary.old


def test_an_operator_compares_the_versions_and_stops_them(canary: Canary) -> None:
    with running_chromium() as browser:
        watched = Watched(browser.new_context(viewport=DESKTOP).new_page(), canary.url)
        page = watched.page
        page.goto(canary.url)
        page.get_by_label("API key").fill(ADMIN_KEY)
        page.keyboard.press("Enter")
        for label, name in (("Answered by", canary.old), ("Beside it", canary.new)):
            page.get_by_label(label).select_option(f"tiny@{name}")
        watched.problems.clear()  # Chromium's note of the 401 before the key
        set_settings(page, max_tokens=8)
        say(page, "fox")
        expect_answers(page, 2)
        [turn] = stored(page)[0]["turns"]
        versions = [answer["version"] for answer in turn["answers"]]
        assert versions == [canary.old, canary.new], turn["answers"]

        set_settings(page, max_tokens=None)
        say(page, "dog")
        growing = page.locator('.answer[aria-busy="true"] .said')
        expect(growing).to_have_count(2)
        expect(growing.nth(1)).not_to_be_empty()
        page.keyboard.press("Escape")
        for column in (2, 3):
            expect(answers(page).nth(column)).to_contain_text("stopped")

        def stopped() -> list[dict[str, Any]]:
            return [line for line in canary.logged if line["reason"] == "client_left"]

        wait_until(lambda: len(stopped()) == 2)
        assert {line["model_version"] for line in stopped()} == {canary.old, canary.new}
        assert all(line["completion_tokens"] < CONTEXT_TOKENS - 100 for line in stopped())
        assert {line["key"] for line in stopped()} == {"operator"}
        assert watched.problems == []
