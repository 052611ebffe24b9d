"""Requests and bytes that a training worker takes from S3, whose server answers 20 ms late: row by
row, and with shards near.

A worker reads shuffled rows at 300 a second, in steps of 32. Each contender reads the same two
windows and checks them against the store on disk; the first half of a window is cold, what follows
is warm. Prints a table and, last, JSON.
"""

import argparse
import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.output.progress import say
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.token_stream import TokenStream
from tests.cluster.fault_proxy import FaultProxy, Stalled, running_proxy
from tests.jobs.stores import make_store
from tests.moto_server import moto_server

DELAY_S = 0.02
SEQ_LEN = 1024
STEP_ROWS = 32
# 512 rows, 1 MiB: the server in this process, which slices whole objects, keeps up with that
SHARD_TOKENS = 1 << 19


def measured(
    storage: Storage, local: TokenStream, proxy: FaultProxy, *, near: bool, window: int, rate: float
) -> dict[str, Any]:
    """Reads two windows; what follows the middle of the first one counts as warm."""
    num_rows, num_cold = 2 * window, window // 2
    options = {
        "seq_len": SEQ_LEN,
        "window_rows": window,
        "num_samples": num_rows if near else 0,
        "near_bytes": 8 << 30,
    }
    stream = TokenStream(storage, split="train", **options)  # type: ignore[arg-type]
    proxy.ranges.clear()
    cold, waits = 0, []
    start_s = time.monotonic()
    for first in range(0, num_rows, STEP_ROWS):
        if first == num_cold:
            cold = len(proxy.ranges)
        begun_s = time.monotonic()
        stream.read_ahead(np.arange(first, min(num_rows, first + 2 * STEP_ROWS)))
        samples = np.arange(first, first + STEP_ROWS)
        found = stream.samples(samples)[0]
        waits.append(time.monotonic() - begun_s)
        assert found.equal(local.samples(samples)[0])
        time.sleep(max(0.0, start_s + (first + STEP_ROWS) / rate - time.monotonic()))
    seconds = time.monotonic() - start_s
    bounds = [str(each).removeprefix("bytes=").split("-") for each in proxy.ranges]
    fetched = sum(int(end) - int(start) + 1 for start, end in bounds)
    warm, warm_rows = len(proxy.ranges) - cold, num_rows - num_cold
    return {
        "shards": "near" if near else "row by row",
        "rows_per_s": round(num_rows / seconds, 1),
        "cold_requests_per_100_rows": round(100 * cold / num_cold, 2),
        "warm_requests_per_100_rows": round(100 * warm / warm_rows, 3),
        "warm_requests_per_s": round(warm / warm_rows * rate, 2),
        "fetched_over_used": round(fetched / (num_rows * SEQ_LEN * 2), 3),
        "first_step_ms": round(1e3 * waits[0], 1),
        "warm_wait_ms_a_step": round(1e3 * float(np.mean(waits[num_cold // STEP_ROWS :])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window-rows", type=int, default=1 << 12)
    parser.add_argument("--rate", type=float, default=300.0, help="rows a second")
    arguments = parser.parse_args()
    window = arguments.window_rows
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    num_tokens = 2 * window * SEQ_LEN + 1
    sizes = [SHARD_TOKENS] * (num_tokens // SHARD_TOKENS) + [num_tokens % SHARD_TOKENS]
    results = []
    with (
        moto_server() as server,
        running_proxy(server) as proxy,
        tempfile.TemporaryDirectory() as folder,
    ):
        os.environ["AWS_ENDPOINT_URL"] = server
        bucket = f"bench-{uuid.uuid4().hex[:8]}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        remote = open_storage(f"s3://{bucket}/store")
        say(
            f"a store of {sum(sizes) * 2 >> 20} MiB in {len(sizes)} shards, windows of {window:,} rows of {SEQ_LEN} tokens"
        )
        make_store(remote, sizes=sizes)
        os.environ["HOME"] = folder  # of the copies
        disk = open_storage(str(Path(folder) / "store"))
        make_store(disk, sizes=sizes)
        local = TokenStream(disk, split="train", seq_len=SEQ_LEN, window_rows=window)
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        proxy.spoil = lambda method, path: Stalled(DELAY_S)
        for near in (False, True):
            found = measured(remote, local, proxy, near=near, window=window, rate=arguments.rate)
            results.append(found)
            say(json.dumps(found))
    table = Table()
    for name in results[0]:
        table.add_column(name)
    for found in results:
        table.add_row(*map(str, found.values()))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
