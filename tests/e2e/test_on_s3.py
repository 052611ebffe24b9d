"""The whole demo on S3, through a proxy that refuses, resets, stalls and cuts off, ends with a
quiet run's bits.

Both runs have clusters of their own; the disturbed one loses a node and gets another one besides.
"""

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.demo import PROMPTS, ask, river
from cluster.commands.demo_run import CONFIG, demo_faults, demo_serving
from cluster.settings.flags import read_config, validate_config
from cluster.settings.run import RunConfig
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from tests.cluster.fault_proxy import Cut, Fault, Refused, Stalled, running_proxy
from tests.paced_steps import paced
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SEED = 20261125
NUM_STEPS = 200
STEP_S = 0.2  # the ledger, by whose steps faults come, reaches a store that fails late


class Weather:
    """Spoils a share of the requests, the same ones in the same order for a seed."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.counts: Counter[str] = Counter()

    def spoil(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.counts["requests"] += 1
            number, kind = self._random.random(), ""
            fault: Fault | None = None
            for share, name, made in (
                (0.03, "503", Refused(503, "SlowDown")),
                (0.02, "500", Refused(500, "InternalError")),
                (0.01, "reset", Cut(self._random.randrange(4096), "reset")),
                (0.01, "truncated", Cut(self._random.randrange(4096))),
                (0.01, "unanswered", Cut(kind="unanswered")),
                (0.01, "stalled", Stalled(2)),
                (0.001, "hung", Stalled(20)),  # longer than the client waits
            ):
                if number < share:
                    fault, kind = made, name
                    break
                number -= share
            self.counts[kind] += fault is not None
            return fault


@pytest.fixture
def corpus(s3_bucket: str, tmp_path: Path) -> str:
    """Words in S3, some documents twice."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        words = " ".join(f"w{(number % 27 * 31 + i * i) % 211}" for i in range(4000))
        (folder / f"{number:02d}.txt").write_text(f"Document {number % 27}. {words}")
    open_storage(f"s3://{s3_bucket}").upload_folder(folder, "corpus")
    return f"s3://{s3_bucket}/corpus"


def config(corpus: str, storage_uri: str) -> RunConfig:
    values: dict[str, Any] = read_config(CONFIG, RunConfig).model_dump(mode="json")
    values["run_id"] = "demo"
    values["data"] |= {"source": f"{corpus}/*.txt", "vocab_size": 400, "shard_bytes": 100_000}
    values["train"] |= {
        "seq_len": 64,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "eval_every_steps": 50,
    }
    values["train"] |= {"max_tokens": NUM_STEPS * 8 * 64, "eval_max_tokens": 8192}
    values["checkpoint"] |= {"save_every_steps": 25}
    return validate_config(values | {"storage": {"uri": storage_uri}}, RunConfig)


def whole_way(run: RunConfig, *, disturbed: bool) -> dict[str, Any]:
    """Returns everything that must not differ."""
    with river(
        run, faults=demo_faults(run) if disturbed else (), serving=demo_serving(run)
    ) as found:
        texts = [ask(found.endpoint, prompt)["text"] for prompt in PROMPTS]
        tokens = {
            name: value
            for name, value in found.tokens.items()
            if "hash" in name or name in ("tokens", "documents")
        }
        ledger = Ledger.read(open_storage(found.run["run_dir"]))
        return {
            "tokens": tokens,
            "parameter_hash": found.run["parameter_hash"],
            "losses": [line["loss"] for line in ledger.steps],
            "evaluation": found.evaluation["loss"],
            "texts": texts,
        }


def test_the_demo_on_a_store_that_fails_ends_with_the_same_bits(
    s3_server: str, s3_bucket: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = whole_way(config(corpus, f"s3://{s3_bucket}/calm"), disturbed=False)
    run, weather = config(corpus, f"s3://{s3_bucket}/storm"), Weather(SEED)
    with paced(tmp_path) as pace, pace.slow(STEP_S), running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.spoil = weather.spoil
        began = time.monotonic()
        stormy = whole_way(run, disturbed=True)
        wall_s = time.monotonic() - began
        proxy.spoil = None
        ledger = Ledger.read(open_storage(f"s3://{s3_bucket}/storm/runs/demo"))
    print(f"seed {SEED}, {wall_s:.0f} s, {dict(weather.counts)}, workers {ledger.world_sizes}")
    assert stormy == quiet
    assert len(quiet["losses"]) == NUM_STEPS
    assert {"503", "500", "reset", "truncated", "unanswered", "stalled"} <= weather.counts.keys()
    assert min(ledger.world_sizes) < max(ledger.world_sizes)  # the node was lost and replaced
    assert wall_s < limit_s(300)
