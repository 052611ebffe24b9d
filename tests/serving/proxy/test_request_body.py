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
            messages: list[Message] = [
                {"type": "http.request", "body": PART, "more_body": True}
            ] * num_parts

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
        await asyncio.sleep(0)
        assert bodies._num_bytes == 3 * len(PART), (
            "the first one's bytes go at once, although it has not ended yet"
        )
        with pytest.raises(ApiError) as refused:
            await first
        assert refused.value.status == 429 and refused.value.headers["Connection"] == "close"
        may_end.set()
        assert await second == 2 * PART and await third == PART
        assert await send(5) == 5 * PART, "what has ended counts no more"

    asyncio.run(scenario())


def test_a_body_that_had_to_go_is_refused_even_if_its_end_comes_right_then() -> None:
    """Its bytes are gone: it must not be taken for an empty one."""

    async def scenario() -> None:
        bodies = Bodies(most_bytes=len(PART))
        has_end = asyncio.Event()
        part: Message = {"type": "http.request", "body": PART, "more_body": True}
        end: Message = {"type": "http.request", "body": b"", "more_body": False}
        of_first, of_second = [part], [end, part]

        async def receive_first() -> Message:
            if of_first:
                return of_first.pop()
            await has_end.wait()
            return end

        async def receive_second() -> Message:
            has_end.set()
            return of_second.pop()

        first = asyncio.create_task(bodies.read(scope(), receive_first, timeout_s=limit_s(30)))
        await asyncio.sleep(0)
        second = asyncio.create_task(bodies.read(scope(), receive_second, timeout_s=limit_s(30)))
        with pytest.raises(ApiError) as refused:
            await first
        assert refused.value.status == 429
        assert await second == PART

    asyncio.run(scenario())
