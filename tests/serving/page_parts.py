"""A replica's pages for a real browser, without Ray: chat-tuned checkpoints, a replica in a thread
beside the test that drives the browser, and what tests do on the page to talk to the model."""

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Locator, Page, expect

from cluster.settings.serve import ServeConfig
from model.config import GPTConfig
from model.gpt import GPT
from model.text.chat import format_to_train
from model.text.tokenizer import Tokenizer
from serving.api.access import AccessRules
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import loopback_server, replica_app
from tests.serving.tiny_models import write_model
from tests.time_limits import limit_s

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
CONTEXT_TOKENS = 8192  # an answer that fills it takes long enough to be stopped


def chat_checkpoint(folder: Path, tokenizer: Tokenizer, *, seed: int = 1, step: int = 7) -> Path:
    """Writes a model with a chat template. Its greedy answers never end by themselves."""
    tuned = Tokenizer(json.loads(tokenizer.to_json()), format_to_train(tokenizer))
    shape = {"n_positions": CONTEXT_TOKENS, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(vocab_size=tuned.vocab_size, initializer_range=0.3, **shape))
    model.init_weights(seed)
    with torch.no_grad():
        model.token_embedding.weight[tuned.eot_id] = 0  # its logit is 0, and that of others above
    return write_model(folder, model.eval(), tuned, step=step)


@dataclass(frozen=True)
class ServedPages:
    url: str
    versions: Versions
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs something in the replica's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(limit_s(60))


@contextmanager
def served_pages(
    folder: Path, *, config: ServeConfig | None = None, access: AccessRules | None = None
) -> Iterator[ServedPages]:
    """A replica that serves `folder` as "tiny". Playwright needs the test's own thread."""
    config = config or ServeConfig(model_name="tiny")
    served: Future[ServedPages] = Future()
    stop: Future[asyncio.Event] = Future()

    async def serve() -> None:
        ending = asyncio.Event()
        stop.set_result(ending)
        async with (
            replica_app(folder, name="tiny", config=config, access=access) as (app, versions),
            loopback_server(app) as url,
        ):
            served.set_result(ServedPages(url, versions, asyncio.get_running_loop()))
            await ending.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if served.done():
                raise
            served.set_exception(error)

    thread = threading.Thread(target=run, name="replica")
    thread.start()
    try:
        pages = served.result(limit_s(60))
        yield pages
        pages.loop.call_soon_threadsafe(stop.result().set)
    finally:
        thread.join(limit_s(60))


def answers(page: Page) -> Locator:
    return page.locator(".answer")


def set_settings(
    page: Page, *, max_tokens: int | None, temperature: float = 0, seed: int = 5
) -> None:
    settings = page.locator("#chat-settings")
    if settings.get_attribute("open") is None:
        settings.locator("summary").click()
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_label("Most tokens").fill("" if max_tokens is None else str(max_tokens))
    page.get_by_label("Seed").fill(str(seed))


def say(page: Page, text: str) -> None:
    """By keyboard, from the field of the message."""
    page.locator("#chat-message").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def expect_answers(page: Page, count: int) -> None:
    """Waits until there are so many answers, all of them ended."""
    expect(answers(page)).to_have_count(count)
    expect(page.locator('.answer[aria-busy="false"]')).to_have_count(count)


def stored(page: Page) -> list[dict[str, Any]]:
    """The conversations in the browser's storage."""
    return [
        json.loads(text)
        for text in page.evaluate(
            "Object.entries(localStorage).filter(([k]) => k.startsWith('raymill.chat.')).map(([, v]) => v)"
        )
    ]
