"""Requests that name a version: which they get, who may, and that no other one answers instead."""

import asyncio
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.api.access import AccessRules, XrayAccess, may_look_inside
from serving.api.keys import ApiKey
from serving.delivery.named_version import AskedModel, read_asked_model
from serving.delivery.promotion import Delivery, Phase, Terms
from serving.delivery.routed_request import RoutedRequest
from serving.delivery.versions import Versions
from serving.protocol.errors import ApiError
from tests.serving.delivery_parts import served
from tests.serving.tiny_models import write_model
from tests.waiting import wait_in_loop_until

USER, ROOT = ApiKey.read("user"), ApiKey.read("root")


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (None, AskedModel(None)),
        ("mine", AskedModel("mine")),
        ("mine@0f", AskedModel("mine", "0f")),
        ("me@home", AskedModel("me@home")),
        ("me@home@0f", AskedModel("me@home", "0f")),
        ("mine@", AskedModel("mine", "")),
        ("other", AskedModel("other")),
    ],
)
def test_a_name_that_is_served_names_no_version_whatever_is_in_it(
    model: str | None, asked: AskedModel
) -> None:
    assert read_asked_model(model, ["mine", "me@home"]) == asked


@pytest.mark.parametrize(
    ("xray", "key", "may"),
    [
        ("user", None, True),
        ("user", USER, True),
        ("admin", ROOT, True),
        ("admin", USER, False),
        ("admin", None, False),
        ("off", ROOT, False),
        ("off", USER, False),
    ],
)
def test_who_may_look_inside_may_name_a_version(
    xray: XrayAccess, key: ApiKey | None, may: bool
) -> None:
    assert may_look_inside(key, AccessRules((USER,), (ROOT,), xray)) is may


def test_a_request_gets_the_version_that_it_names_and_no_other_one_instead(
    checkpoint: Path, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    gpt = GPT(model.config)
    gpt.init_weights(2)
    other = write_model(tmp_path / "step-8", gpt.eval(), tokenizer, step=8)
    old, new = served(checkpoint, 1), served(other, 2)
    canary = Delivery(
        deployment="d", model_name="tiny", live=old, phase=Phase.CANARY, candidate=new,
        terms=Terms(watch_s=1000, canary_percent=0.0), last_serial=2,
    )  # fmt: skip
    loading = canary.having(phase=Phase.LOADING)
    watching = canary.having(phase=Phase.WATCHING, live=new, candidate=None, previous=old, epoch=2)

    def asking(versions: Versions, *, may: bool = True) -> RoutedRequest:
        routed = RoutedRequest(versions, {"headers": []})
        routed.may_name_versions = may
        return routed

    def got(versions: Versions, version: str) -> str:
        return asking(versions).take(f"tiny@{version}").model.version

    async def scenario() -> None:
        config = ServeConfig(engine=EngineConfig(max_num_seqs=2), model_name="tiny")
        versions = Versions(config, loading, on_live_death=print)
        await versions.wait_until_live()
        await wait_in_loop_until(lambda: versions.report()[2].status == "ready")
        assert got(versions, old.version) == old.version
        with pytest.raises(ApiError, match="answers no requests here now") as refused:
            got(versions, new.version)  # it is still being measured
        assert refused.value.status == 404 and old.version in refused.value.message

        versions.adopt(canary, asked_at_s=0)
        for wanted in (old.version, new.version):
            routed = asking(versions)
            assert routed.take(f"tiny@{wanted}").model.version == wanted
            assert routed.headers["x-model-version"] == wanted
            assert routed.take_other() is None, "no other version was asked for"
            routed.close()
        assert asking(versions).take("tiny").model.version == old.version
        assert asking(versions, may=False).take("tiny").model.version == old.version
        with pytest.raises(ApiError, match="the right to look inside a query") as refused:
            asking(versions, may=False).take(f"tiny@{new.version}")
        assert (refused.value.status, refused.value.code) == (403, "version_closed")
        with pytest.raises(ApiError, match="does not exist") as refused:
            asking(versions).take(f"other@{new.version}")
        assert refused.value.code == "model_not_found"

        versions.adopt(watching, asked_at_s=0)
        assert got(versions, old.version) == old.version
        assert asking(versions).take("tiny").model.version == new.version
        await versions.close()

    asyncio.run(scenario())
