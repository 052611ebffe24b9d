"""The bytes of all unfinished bodies together: the oldest goes when they are too many."""

import asyncio

import pytest
from starlette.types import Message

from serving.protocol.errors import ApiError
from serving.proxy.request_body import Bodies
from tests.serving.front_door_parts import scope
from tests.time_limits import limit_s

PART = b"a" * 1000


def test_the_oldest_unfinished_body_goes_when_all_together_are_too_large() -> None:
    async def scenario() -> None:
        bodies = Bodies(most_bytes=5 * len(PART))
        may_end = asyncio.Event()

        async def send(num_parts: int) -> bytes | None:
            messages: list[Message] = [{"type": "http.request", "body": PART, "more_body": True}] * num_parts

            async def receive() -> Message:
                if messages:
                    return messages.pop()
                await may_end.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            return await bodies.read(scope(), receive, timeout_s=limit_s(30))

        first = asyncio.create_task(send(3))
        await asyncio.sleep(0)
        second = asyncio.create_task(send(2))
        await asyncio.sleep(0)
        third = asyncio.create_task(send(1))
        with pytest.raises(ApiError) as refused:
            await first
        assert refused.value.status == 429 and refused.value.headers["Connection"] == "close"
        may_end.set()
        assert await second == 2 * PART and await third == PART
        assert await send(5) == 5 * PART, "what has ended counts no more"

    asyncio.run(scenario())
