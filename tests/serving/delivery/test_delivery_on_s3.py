"""An endpoint whose state and checkpoints are on S3: what was promoted is live on the next cluster,
too."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from ray import serve

from cluster.local.local_cluster import free_port
from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, ServeConfig
from cluster.storage.registry import served_checkpoints
from cluster.storage.uris import open_storage
from model.files.checkpoint_folder import read_metadata
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.app import build_app
from tests.serving.adapter_parts import made_adapter, stored_base
from tests.serving.delivery_parts import Admin, version
from tests.serving.endpoint_parts import ray_cluster
from tests.serving.tiny_models import write_model
from tests.serving.vllm_parts import installed, vllm_config, vllm_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

ADMIN_KEY = "sk-admin"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@contextmanager
def endpoint(config: ServeConfig) -> Iterator[Admin]:
    """On a cluster of its own, as from a Ray Serve config file."""
    with ray_cluster():
        serve.start(
            proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port}
        )
        serve.run(build_app(config), name="raymill", route_prefix="/", blocking=False)
        url = f"http://{config.host}:{config.port}"
        wait_until(
            lambda: httpx.get(f"{url}/ready", timeout=limit_s(30)).status_code == 200, timeout_s=60
        )
        yield Admin(url, ADMIN_KEY)


def upload(folder: Path, uri: str) -> str:
    storage = open_storage(uri)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):
        storage.upload_file(path, path.name)
    return storage.uri


def test_what_was_promoted_on_s3_is_live_on_the_next_cluster(
    model: GPT, checkpoint: Path, tokenizer: Tokenizer, s3_bucket: str, tmp_path: Path
) -> None:
    other_model = GPT(model.config)
    other_model.init_weights(2)
    first, second = (
        upload(folder, f"s3://{s3_bucket}/runs/r/checkpoints/{folder.name}")
        for folder in (checkpoint, write_model(tmp_path / "step-8", other_model, tokenizer, step=8))
    )
    (tmp_path / "admin").write_text(ADMIN_KEY)
    config = ServeConfig(
        checkpoint=first,
        port=free_port(),
        model_name="tiny",
        admin_key_file=str(tmp_path / "admin"),
        storage=StorageConfig(uri=f"s3://{s3_bucket}"),
        delivery=DeliveryConfig(watch_s=1, max_latency_ratio=None),
    )
    with endpoint(config) as admin:
        assert admin.promote(second, canary_percent=50, watch_s=600).status_code == 202
        admin.wait_for("canary")
        assert admin.http.post("/admin/rollback", json={"reason": "not yet"}).status_code == 200
        admin.wait_for("steady")
        admin.promoted(second)
        assert admin.status()["is_stored"]
    with endpoint(config) as admin:
        state = admin.wait_for("steady")
        assert state["live"]["checkpoint"] == second
        assert [(ended["result"], ended["reason"]) for ended in state["history"]] == [
            ("rolled_back", "not yet"),
            ("promoted", ""),
        ]
        answer = httpx.post(
            f"{admin.http.base_url}/v1/completions",
            json={"model": "tiny", "prompt": [1]},
            timeout=limit_s(60),
        )
        assert answer.status_code == 200
        served = str(read_metadata(tmp_path / "step-8").parameter_hash)[:16]
        assert answer.headers["x-model-version"] == served


@installed
def test_an_adapter_that_was_promoted_on_s3_is_live_on_the_next_cluster(
    tokenizer: Tokenizer, s3_bucket: str, tmp_path: Path
) -> None:
    """Unless the settings there name another checkpoint for it."""
    whole = vllm_model(tokenizer, seed=5, architecture="llama")
    stored = stored_base(tmp_path, whole, tokenizer)
    base = stored.folder(str(tmp_path))
    places, versions = {}, {}
    for seed, name in enumerate(("red", "blue", "green"), start=1):
        folder = made_adapter(tmp_path, name, stored, whole, tokenizer, seed=seed).folder
        places[name] = upload(folder, f"s3://{s3_bucket}/runs/{name}/checkpoints/{folder.name}")
        versions[name] = version(folder)
    (tmp_path / "admin").write_text(ADMIN_KEY)
    config = ServeConfig.model_validate(
        {
            "checkpoint": upload(base, f"s3://{s3_bucket}/bases/{base.name}"),
            "adapters": {"sql": f"s3://{s3_bucket}/runs/red", "tidy": places["green"]},
            "port": free_port(),
            "model_name": "tiny",
            "admin_key_file": str(tmp_path / "admin"),
            "storage": {"uri": f"s3://{s3_bucket}"},
            "engine": vllm_config(dtype="float32").model_dump(),
        }
    )
    needed = {config.checkpoint, *places.values()}
    with endpoint(config) as admin:
        sql = Admin(str(admin.http.base_url), ADMIN_KEY, adapter="sql")
        assert sql.promoted(places["blue"], watch_s=0)["previous"]["version"] == versions["red"]
        assert served_checkpoints(open_storage(config.storage.uri)) == needed
    adapters = {"sql": f"s3://{s3_bucket}/runs/red", "tidy": places["red"]}
    with endpoint(config.model_copy(update={"adapters": adapters})) as admin:
        for name, run in (("sql", "blue"), ("tidy", "red")):
            asked = {"model": name, "prompt": [1], "max_tokens": 1}
            answer = admin.http.post("/v1/completions", json=asked)
            assert answer.headers["x-model-version"] == versions[run]
        needed = {config.checkpoint, places["red"], places["blue"]}
        assert served_checkpoints(open_storage(config.storage.uri)) == needed
