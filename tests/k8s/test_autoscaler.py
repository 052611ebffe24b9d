"""Ray's own autoscaler scales the rendered manifests: pods come and go, and the results stay the same.

`process_pods.py` says what is real here and what is not.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, write_config
from cluster.storage.uris import open_storage
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan, run_storage
from jobs.training.train_loop import train
from model.tokenizer import train_bpe
from tests.jobs.runs import make_store, make_text
from tests.k8s.manifests import Manifest, cluster_spec, find, render
from tests.k8s.pod_process import needs_pods
from tests.k8s.process_pods import PodCluster
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_pods]

NUM_STEPS, NUM_FEW_STEPS = 600, 150


def spot_cluster() -> list[Manifest]:
    """Returns the overlay `spot` as rendered, except that a pod has one CPU, drains for 5 s, not 20, and goes after 15 s
    without work, not 300."""
    objects = render("overlays/spot")
    (group,) = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    assert group["minReplicas"] == 0
    assert group["template"]["spec"]["nodeSelector"] == {"raymill/capacity": "spot"}
    (container,) = group["template"]["spec"]["containers"]
    (notice,) = container["env"]
    assert notice == {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "20"}
    notice["value"] = "5"
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    resources["limits"]["cpu"] = resources["requests"]["cpu"] = "1"
    group["idleTimeoutSeconds"] = 15
    return objects


def run_config(objects: list[Manifest], folder: Path, *, num_steps: int) -> RunConfig:
    """Returns the overlay's settings for a tiny model on CPUs: a worker takes the CPU of a GPU pod, the only ones there."""
    texts = {"train": make_text(30_000), "val": make_text(400, seed=1)}
    store = str(folder / "made")
    make_store(store, train_bpe(texts.values(), vocab_size=300), texts)  # type: ignore[arg-type]
    values = yaml.safe_load(find(objects, "ConfigMap/run-config")["data"]["run.yaml"])
    values |= {"model": {"preset": "tiny", "dropout": 0.1}, "data": {"source": f"tokens://{store}/tokens/made"}}
    values["storage"] = {"uri": str(folder / "storage")}
    values["scaling"] |= {"max_workers": 3, "threads_per_worker": 1, "use_gpu": False, "resize_check_s": 2}
    values["checkpoint"] |= {"save_every_steps": 25}
    values["train"] = {
        "max_tokens": num_steps * 64 * 32,
        "global_batch_size": 64,
        "micro_batch_size": 4,
        "seq_len": 32,
        "learning_rate": 3e-3,
        "eval_every_steps": num_steps,
    }
    return validate_config(values, RunConfig)


def test_a_run_has_its_gpu_group_grow_and_shrink_and_its_bits_stay(tmp_path: Path) -> None:
    objects = spot_cluster()
    config = run_config(objects, tmp_path, num_steps=NUM_STEPS)
    write_config(config, tmp_path / "run.yaml")
    entrypoint = find(objects, "RayJob/pretrain")["spec"]["entrypoint"].replace("/config/", f"{tmp_path}/")
    run = run_storage(config)

    with PodCluster(objects, "RayJob/pretrain", num_nodes=3) as pods:
        jobs = JobSubmissionClient(pods.jobs_url, headers=pods.headers)
        assert pods.running == []
        start_s = time.monotonic()

        def until(condition: Callable[[], object], timeout_s: float = 120) -> None:
            def comes_true() -> object:
                assert pods.problem is None, pods.problem
                return condition()

            wait_until(comes_true, timeout_s=timeout_s, poll_s=0.2, why=lambda: pods.autoscaler_log()[-4000:])

        def end_of(job: str) -> JobStatus:
            until(lambda: jobs.get_job_status(job).is_terminal(), timeout_s=240)
            return jobs.get_job_status(job)

        def until_workers(number: int, *, after: int = 0) -> dict[str, Any]:
            """Returns the `start` event of an attempt later than `after` with so many workers."""

            def started() -> bool:
                starts = Ledger.read(run).events("start")
                return bool(starts) and starts[-1]["attempt"] > after and starts[-1]["world_size"] == number

            until(started)
            start = Ledger.read(run).events("start")[-1]
            print(f"{time.monotonic() - start_s:.0f} s: {number} workers after step {start['step']}")
            return start

        assert end_of(jobs.submit_job(entrypoint="true", entrypoint_num_gpus=1)) == JobStatus.SUCCEEDED
        assert len(pods.running) == 1
        print(f"{time.monotonic() - start_s:.0f} s: a pod for who asked for a GPU")
        job = jobs.submit_job(entrypoint=entrypoint)
        start = until_workers(3)
        killed = start["workers"][-1]["node"]
        pods.kill(killed)
        until_workers(3, after=start["attempt"])
        assert killed not in pods.running
        assert len(pods.running) == 3

        for left in (2, 1):  # the run's minimum
            start = Ledger.read(run).events("start")[-1]
            pods.take_back_node_of(start["workers"][-1]["node"])
            until_workers(left, after=start["attempt"])
        assert end_of(job) == JobStatus.SUCCEEDED, jobs.get_job_logs(job)[-4000:]
        assert len(pods.pending) >= 2, "the run wants three, and there is room for one"
        print(f"{time.monotonic() - start_s:.0f} s: done")
        ledger = Ledger.read(run)
        assert [line["step"] for line in ledger.steps] == list(range(1, NUM_STEPS + 1))
        assert ledger.events("checkpoint")[-1]["parameter_hash"] == hash_of_a_local_run(run)
        until(lambda: not pods.running and not pods.pending)
        print(f"{time.monotonic() - start_s:.0f} s: no pods")


def test_a_job_that_lost_its_cluster_resumes_its_run_on_the_next(tmp_path: Path) -> None:
    """Shows the purpose of a RayJob's `backoffLimit`: its head runs the driver, so with it the whole cluster is lost."""
    objects = spot_cluster()
    config = run_config(objects, tmp_path, num_steps=NUM_FEW_STEPS)
    write_config(config, tmp_path / "run.yaml")
    job = find(objects, "RayJob/pretrain")["spec"]
    assert job["backoffLimit"] > 0
    entrypoint = job["entrypoint"].replace("/config/", f"{tmp_path}/")
    run = run_storage(config)

    def on_a_new_cluster(is_enough: Callable[[Ledger], bool]) -> JobStatus:
        """Returns the job's status once it has ended or the ledger shows enough steps; then the cluster is gone at once."""
        with PodCluster(objects, "RayJob/pretrain", num_nodes=1) as pods:
            jobs = JobSubmissionClient(pods.jobs_url, headers=pods.headers)
            job_id = jobs.submit_job(entrypoint=entrypoint)

            def has_done_enough() -> bool:
                assert pods.problem is None, pods.problem
                return jobs.get_job_status(job_id).is_terminal() or is_enough(Ledger.read(run))

            wait_until(has_done_enough, timeout_s=200, poll_s=0.1, why=lambda: jobs.get_job_logs(job_id)[-4000:])
            return jobs.get_job_status(job_id)

    assert on_a_new_cluster(lambda ledger: len(ledger.events("checkpoint")) >= 2) == JobStatus.RUNNING
    assert on_a_new_cluster(lambda ledger: False) == JobStatus.SUCCEEDED
    ledger = Ledger.read(run)
    assert [start["step"] >= 50 for start in ledger.events("start")] == [False, True]
    assert ledger.events("checkpoint")[-1]["parameter_hash"] == hash_of_a_local_run(run)


def hash_of_a_local_run(run: Any) -> str:
    """Returns the hash of a run with the same settings, in this process alone."""
    config = recorded_config(run).model_copy(update={"run_id": "local"})
    (store,) = Path(config.storage.uri, "tokens").iterdir()
    tokenizer_json = (store / "tokenizer.json").read_bytes()
    plan = RunPlan(config, str(store), tokenizer_json, code_version="test", pinned=frozenset())
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(open_storage(config.storage.uri).child("runs/local"))
    return str(ledger.events("checkpoint")[-1]["parameter_hash"])
