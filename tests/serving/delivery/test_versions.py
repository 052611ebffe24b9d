"""The versions on one replica, with their engine processes and without Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.delivery.promotion import Delivery, Phase, Terms
from serving.delivery.route import Route
from serving.delivery.routed_request import RETRY_HEADER, RoutedRequest
from serving.delivery.versions import Versions
from tests.serving.delivery_parts import served
from tests.serving.tiny_models import write_model
from tests.waiting import wait_in_loop_until

pytestmark = pytest.mark.more

ROWS = ((1, 2, 3, 4, 5), (7, 8, 9))


@pytest.fixture(scope="module")
def other(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt = GPT(model.config)
    gpt.init_weights(2)
    return write_model(
        tmp_path_factory.mktemp("checkpoints") / "step-8", gpt.eval(), tokenizer, step=8
    )


@asynccontextmanager
async def joined(state: Delivery) -> AsyncIterator[Versions]:
    """A replica that starts when the state is so already."""
    versions = Versions(
        ServeConfig(engine=EngineConfig(max_num_seqs=2)), state, on_live_death=print
    )
    try:
        await versions.wait_until_live()
        yield versions
    finally:
        await versions.close()


@pytest.mark.parametrize(
    "phase", [pytest.param(Phase.CANARY, marks=pytest.mark.slow), Phase.WATCHING]
)
def test_a_replica_that_joins_a_promotion_measures_the_gates_rows(
    phase: Phase, checkpoint: Path, other: Path
) -> None:
    old, new = served(checkpoint, 1), served(other, 2)
    places = (
        {"live": new, "previous": old}
        if phase is Phase.WATCHING
        else {"live": old, "candidate": new}
    )
    terms = Terms(watch_s=1000, gate_rows=ROWS, canary_percent=10.0)
    state = Delivery(
        deployment="d", model_name="tiny", phase=phase, terms=terms, last_serial=2, **places
    )

    async def scenario() -> None:
        async with joined(state) as versions:
            await wait_in_loop_until(lambda: versions.report()[2].loss is not None)
            seen = versions.report()
            assert seen[2].live_loss is not None and seen[2].loss != seen[2].live_loss
            assert seen[1].loss is None and not seen[2].problem and not seen[1].problem

    asyncio.run(scenario())


def test_a_number_that_two_coordinators_gave_is_not_taken_for_the_same_version(
    checkpoint: Path, other: Path
) -> None:
    """What served goes on until what is wanted now is loaded."""
    state = Delivery(deployment="d", model_name="tiny", live=served(checkpoint, 1))

    async def scenario() -> None:
        async with joined(state) as versions:
            before = versions.live.model.version
            versions.adopt(state.model_copy(update={"live": served(other, 1)}), asked_at_s=0)
            assert versions.live.model.version == before
            await wait_in_loop_until(
                lambda: versions.live.model.version == served(other, 1).version
            )
            versions.adopt(versions.delivery, asked_at_s=0)
            await wait_in_loop_until(lambda: set(versions.report()) == {1})

    asyncio.run(scenario())


def test_a_request_uses_routes_of_this_endpoint_only_and_one_version_after_a_death(
    checkpoint: Path, other: Path
) -> None:
    """The proxy also knows the route of the endpoint before, whose epochs and serials say nothing
    here."""
    new, old = served(other, 2), served(checkpoint, 1)
    state = Delivery(
        deployment="d", model_name="tiny", origin="b", epoch=2, phase=Phase.WATCHING, live=new, previous=old,
        terms=Terms(watch_s=1000), last_serial=2,
    )  # fmt: skip

    def request(versions: Versions, *headers: tuple[bytes, bytes]) -> RoutedRequest:
        return RoutedRequest(versions, {"headers": headers})

    def header(route: Route) -> tuple[bytes, bytes]:
        return b"x-route", route.to_header().encode()

    async def scenario() -> None:
        async with joined(state) as versions:
            await wait_in_loop_until(lambda: versions.report()[1].status == "ready")
            assert request(versions).take().model.version == new.version
            before = header(Route(epoch=9, primary=1, origin="a"))
            assert request(versions, before).take().model.version == new.version
            rolled_back = header(Route(epoch=3, primary=1, origin="b"))
            assert request(versions, before, rolled_back).take().model.version == old.version
            for headers, has_other in [((), True), (((RETRY_HEADER, b"1"),), False)]:
                routed = request(versions, *headers)
                routed.take()
                assert (routed.take_other() is not None) == has_other

    asyncio.run(scenario())
