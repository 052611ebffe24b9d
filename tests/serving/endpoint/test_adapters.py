"""Adapters promoted, watched and rolled back beside others on one engine: vLLM's CPU build."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import served_checkpoints
from cluster.storage.uris import open_storage
from model.text.tokenizer import Tokenizer
from tests.serving.adapter_parts import MadeAdapter, made_adapter, stored_base
from tests.serving.delivery_parts import Admin, Load, greedy_texts, promote_under_load, version
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.vllm_parts import installed, vllm_config, vllm_model
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow, installed]

ADMIN_KEY = "sk-admin"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapters(storage: Path, tokenizer: Tokenizer) -> dict[str, MadeAdapter]:
    whole = vllm_model(tokenizer, seed=5, architecture="llama")
    base = stored_base(storage, whole, tokenizer)
    made = {}
    for seed, name in enumerate(("red", "blue", "green"), start=1):
        made[name] = made_adapter(storage, name, base, whole, tokenizer, seed=seed)
    return made


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, adapters: dict[str, MadeAdapter], storage: Path) -> str:
    (storage / "admin").write_text(ADMIN_KEY)
    config = ServeConfig.model_validate(
        {
            "checkpoint": str(adapters["red"].folder),
            "adapters": {"green": str(storage / "runs/green")},  # its newest checkpoint
            "model_name": "tiny",
            "admin_key_file": str(storage / "admin"),
            "storage": {"uri": str(storage)},
            "engine": vllm_config(
                dtype="float32", max_num_seqs=16, max_waiting=100, kv_cache_tokens=2048
            ).model_dump(),
            "delivery": {"watch_s": 1.0},
        }
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def admin(url: str) -> Iterator[Admin]:
    admin = Admin(url, ADMIN_KEY)
    yield admin
    admin.http.close()


def test_an_adapter__is_promoted_under_load_and_rolled_back_on_the_same_engine(
    admin: Admin,
    url: str,
    adapters: dict[str, MadeAdapter],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    storage: Path,
) -> None:
    red, blue = adapters["red"].folder, adapters["blue"].folder
    texts = {}
    for name in ("red", "blue"):
        made = adapters[name]
        texts[version(made.folder)] = greedy_texts(made.merged, tokenizer, prompts)
    [engine] = children_with("serving.engine_process.run_engine")
    load = Load(url, prompts, texts, num_connections=4)
    promote_under_load(admin, load, red, blue, before=60, after=60, gate_rows=[])

    answers_s = limit_s(60)
    with httpx.Client(base_url=url, timeout=answers_s) as http:
        asked = {"prompt": prompts[1], "max_tokens": 24, "temperature": 0}
        named = http.post("/v1/completions", json=asked | {"model": "green"})
        assert named.headers["x-model-version"] == version(adapters["green"].folder)
        listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert listed == ["tiny", "green"]
    needed = served_checkpoints(open_storage(str(storage)))
    assert {str(made.folder) for made in adapters.values()} == needed, "no retention deletes them"

    back = Load(url, prompts, texts, num_connections=4)
    assert admin.promote(red, gate_rows=[], watch_s=1000).status_code == 202
    admin.wait_for("watching")
    with back.running():
        back.wait_for_more(20)
        assert admin.http.post("/admin/rollback", json={}).json()["phase"] == "steady"
        admin.wait_for("steady")
        back.wait_for_more(20)
    assert back.wrong == []
    assert admin.delivery["live"]["version"] == version(blue)
    assert [one.pid for one in children_with("serving.engine_process.run_engine")] == [engine.pid]


def test_a_whole_model__is_refused_where_adapters_are_served(
    admin: Admin, adapters: dict[str, MadeAdapter], storage: Path
) -> None:
    [base] = (storage / "bases").iterdir()
    live = admin.delivery["live"]
    assert admin.promote(base, gate_rows=[]).status_code == 202
    outcome = admin.wait_for("steady")["outcome"]
    assert outcome["result"] == "refused"
    assert "is a whole model" in outcome["reason"]
    assert admin.delivery["live"] == live
