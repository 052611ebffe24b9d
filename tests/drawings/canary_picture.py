"""Makes the picture of the canary dashboard: a real endpoint under load, a real canary that is
slower, and its rollback by itself, as a real Prometheus saw them. `python -m tests.drawings.canary_picture
FILE` makes this picture alone.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import ray
from ray import serve

from cluster.local.local_cluster import free_port
from cluster.monitoring.files import documents
from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, EngineConfig, ServeConfig
from model.config import GPTConfig
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from serving.app import run
from tests.cluster.grafana_stub import grafana_stub
from tests.drawings.dashboard_picture import draw
from tests.local_ray import local_ray
from tests.prometheus import prometheus
from tests.serving.delivery_parts import Admin
from tests.serving.tiny_models import write_model

ADMIN_KEY = "sk-admin"
CLIENTS = 8
CANARY_PERCENT = 5  # so that it takes a while until enough of its sequences can be judged
STEADY_S = 25.0
SHAPES = {"step-100": (4, 256), "step-200": (8, 512)}  # layers and width
VARIABLES = {"$__rate_interval": "10s", "$application": "raymill"}
TEXT = "the quick brown fox jumps over the lazy dog, and naïve cafés sell €5 tea\n"


def picture_of_canary(folder: Path) -> bytes:
    tokenizer = train_bpe([TEXT * 9], vocab_size=300, normalize=[])
    for name, (n_layer, n_embd) in SHAPES.items():
        config = GPTConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=256,
            n_layer=n_layer,
            n_head=4,
            n_embd=n_embd,
        )
        model = GPT(config)
        model.init_weights(1)
        write_model(folder / name, model.eval(), tokenizer, step=int(name.removeprefix("step-")))
    (folder / "admin").write_text(ADMIN_KEY)
    stable, canary = (folder / name for name in SHAPES)
    settings = ServeConfig(
        checkpoint=str(stable),
        port=free_port(),
        admin_key_file=str(folder / "admin"),
        storage=StorageConfig(uri=str(folder / "store")),
        engine=EngineConfig(max_num_seqs=CLIENTS),
        delivery=DeliveryConfig(watch_s=600),
    )
    with grafana_stub() as grafana:
        environment = {"GRAFANA_URL": grafana.url, "GRAFANA_TOKEN": grafana.token}
        reports = {"_system_config": {"metrics_report_interval_ms": 1000}}
        with local_ray(num_cpus=2, environment=environment, **reports):
            targets = folder / "targets.json"
            targets.write_text(
                json.dumps([{"targets": [f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"]}])
            )
            url = run(settings)["url"]
            try:
                with (
                    prometheus(folder / "prometheus", scrape_targets=targets) as server,
                    asking(url),
                ):
                    time.sleep(STEADY_S / 2)
                    began_s = time.time()
                    time.sleep(STEADY_S)
                    admin = Admin(url, ADMIN_KEY)
                    assert admin.promote(canary, canary_percent=CANARY_PERCENT).status_code == 202
                    outcome = admin.wait_for("steady", timeout_s=120)["outcome"]
                    assert outcome["result"] == "rolled_back", outcome
                    time.sleep(STEADY_S)

                    def history(expr: str) -> list[object]:
                        for name, value in VARIABLES.items():
                            expr = expr.replace(name, value)
                        return server.history(expr, since_s=began_s)

                    return draw(
                        documents()["raymill-canary"],
                        history=history,
                        annotations=grafana.annotations,
                        since_s=began_s,
                        until_s=time.time(),
                    )
            finally:
                serve.shutdown()


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Clients that ask without a pause; a request without a session is given to a version by
    chance."""
    ending = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            model = http.get("/v1/models").json()["data"][0]["id"]
            count = number
            while not ending.is_set():
                count += CLIENTS
                # Two thirds of a prompt are like that of others, as with a common instruction
                # before each question.
                body = {
                    "model": model,
                    "prompt": f"{TEXT}{TEXT}{count} {TEXT[count % 40 :]}",
                    "max_tokens": 48,
                }
                answer = http.post(
                    "/v1/completions", json=body | {"ignore_eos": True, "stream": count % 2 == 0}
                )
                assert answer.status_code == 200, answer.text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join(60)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[1]).write_bytes(picture_of_canary(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
