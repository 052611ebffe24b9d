"""Ray's own autoscaler scales the rendered manifests: pods come and go, and the results stay the
same.

`process_pods.py` says what is real here and what is not.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, run_storage, write_config
from cluster.storage.uris import open_storage
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from model.text.tokenizer import train_bpe
from tests.jobs.runs import make_store, make_text
from tests.k8s.manifests import Manifest, cluster_spec, find, render
from tests.k8s.pod_process import needs_pods
from tests.k8s.process_pods import PodCluster
from tests.paced_steps import Pace, paced
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_pods]

NUM_STEPS, NUM_FEW_STEPS = 300, 150
BATCH_SIZE, LANE_SIZE, SEQ_LEN = 16, 4, 32
STEP_S = 0.25  # while something happens to the run


@pytest.fixture
def pace(tmp_path: Path) -> Iterator[Pace]:
    with paced(tmp_path) as pace:
        yield pace


def spot_cluster() -> list[Manifest]:
    """Returns the overlay `spot` as rendered, except that a pod has one CPU, drains for 5 s, not
    20, and goes after 15 s without work, not 300."""
    objects = render("overlays/spot")
    group, fallback = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"]["raymill/capacity"] == "spot"
    variables = group["template"]["spec"]["containers"][0]["env"]
    notice = find_variable(variables, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert notice["value"] == "20"
    notice["value"] = "5"
    for each in (group, fallback):
        make_small(each, gpus=1)
    return objects


def find_variable(variables: list[Manifest], name: str) -> Manifest:
    """Returns the only one of that name."""
    (variable,) = [variable for variable in variables if variable["name"] == name]
    return variable


def node_cluster() -> list[Manifest]:
    """Returns the overlay `gpu-node` as rendered, except that a node has 2 GPUs and CPUs instead of
    8 and 64, and that a pod goes after 15 s without work, not 300."""
    objects = render("overlays/gpu-node")
    (group,) = cluster_spec(find(objects, "RayJob/pretrain"))["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "8"
    for which in resources.values():
        which["nvidia.com/gpu"] = "2"
    make_small(group, gpus=2)
    return objects


def make_small(group: Manifest, *, gpus: int) -> None:
    assert group["minReplicas"] == 0
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == str(gpus)
    resources["limits"]["cpu"] = resources["requests"]["cpu"] = str(gpus)
    group["idleTimeoutSeconds"] = 15


def run_config(
    objects: list[Manifest],
    folder: Path,
    *,
    num_steps: int,
    min_workers: int = 1,
    max_workers: int = 3,
) -> RunConfig:
    """Returns the overlay's settings for a tiny model on CPUs: a worker takes the CPU of a GPU pod,
    the only ones there."""
    texts = {"train": make_text(30_000), "val": make_text(400, seed=1)}
    store = str(folder / "made")
    make_store(store, train_bpe(texts.values(), vocab_size=300), texts)  # type: ignore[arg-type]
    values = yaml.safe_load(find(objects, "ConfigMap/run-config")["data"]["run.yaml"])
    values |= {
        "model": {"preset": "tiny", "dropout": 0.1},
        "data": {"source": f"tokens://{store}/tokens/made"},
    }
    values["storage"] = {"uri": str(folder / "storage")}
    values["scaling"] |= {
        "min_workers": min_workers,
        "max_workers": max_workers,
        "threads_per_worker": 1,
    }
    values["scaling"] |= {"use_gpu": False, "resize_check_s": 2}
    values["checkpoint"] |= {"save_every_steps": 25}
    values["train"] = {
        "max_tokens": num_steps * BATCH_SIZE * SEQ_LEN,
        "global_batch_size": BATCH_SIZE,
        "micro_batch_size": LANE_SIZE,
        "seq_len": SEQ_LEN,
        "learning_rate": 3e-3,
        "eval_every_steps": num_steps,
    }
    return validate_config(values, RunConfig)


class Watched:
    """Waits for events of a run on a cluster of pods."""

    def __init__(self, pods: PodCluster, run: Any) -> None:
        self.pods, self.run = pods, run
        self._start_s = time.monotonic()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self._start_s:.0f} s: {what}")

    def until(self, condition: Callable[[], object], timeout_s: float = 120) -> None:
        def comes_true() -> object:
            assert self.pods.problem is None, self.pods.problem
            return condition()

        wait_until(
            comes_true,
            timeout_s=timeout_s,
            poll_s=0.2,
            why=lambda: self.pods.autoscaler_log()[-4000:],
        )

    def end_of(self, job: str) -> JobStatus:
        self.until(lambda: self.pods.jobs.get_job_status(job).is_terminal(), timeout_s=240)
        return self.pods.jobs.get_job_status(job)

    def last_start(self) -> dict[str, Any]:
        return Ledger.read(self.run).events("start")[-1]

    def until_workers(self, number: int, *, after: int = 0) -> dict[str, Any]:
        """Returns the `start` event of an attempt later than `after` with so many workers."""

        def started() -> bool:
            starts = Ledger.read(self.run).events("start")
            return (
                bool(starts)
                and starts[-1]["attempt"] > after
                and starts[-1]["world_size"] == number
            )

        self.until(started)
        start = self.last_start()
        self.say(f"{number} workers after step {start['step']}")
        return start


def entrypoint_of(objects: list[Manifest], config: RunConfig, folder: Path) -> str:
    """Returns the job's entry point, with its settings in `folder`."""
    write_config(config, folder / "run.yaml")
    return str(find(objects, "RayJob/pretrain")["spec"]["entrypoint"]).replace(
        "/config/", f"{folder}/"
    )


def test_a_run_has_its_gpu_group_grow_and_shrink_and_its_bits_stay(
    tmp_path: Path, pace: Pace
) -> None:
    objects = spot_cluster()
    config = run_config(objects, tmp_path, num_steps=NUM_STEPS)
    entrypoint, run = entrypoint_of(objects, config, tmp_path), run_storage(config)

    with PodCluster(objects, "RayJob/pretrain", num_nodes=3) as pods:
        watched = Watched(pods, run)
        assert pods.running == []
        first = pods.submit("true", num_gpus=1)
        assert watched.end_of(first) == JobStatus.SUCCEEDED
        assert len(pods.running) == 1
        watched.say("a pod for who asked for a GPU")
        with pace.slow(2 * STEP_S):  # for two minutes at least
            job = pods.submit(entrypoint)
            start = watched.until_workers(3)
            killed = start["workers"][-1]["node"]
            pods.kill(killed)
            watched.until_workers(3, after=start["attempt"])
            assert killed not in pods.running
            assert len(pods.running) == 3

            for left in (2, 1):  # the run's minimum
                start = watched.last_start()
                pods.take_back_node_of(start["workers"][-1]["node"])
                watched.until_workers(left, after=start["attempt"])
        assert watched.end_of(job) == JobStatus.SUCCEEDED, pods.jobs.get_job_logs(job)[-4000:]
        assert len(pods.pending) >= 2, "the run wants three, and there is room for one"
        watched.say("done")
        ledger = Ledger.read(run)
        assert [line["step"] for line in ledger.steps] == list(range(1, NUM_STEPS + 1))
        assert ledger.events("checkpoint")[-1]["parameter_hash"] == hash_of_a_local_run(run)
        watched.until(lambda: not pods.running and not pods.pending)
        watched.say("no pods")


def test_pods_of_several_gpus_carry_several_workers_each_and_their_bits_stay(
    tmp_path: Path, pace: Pace
) -> None:
    objects = node_cluster()
    config = run_config(objects, tmp_path, num_steps=NUM_FEW_STEPS, min_workers=4, max_workers=4)
    entrypoint, run = entrypoint_of(objects, config, tmp_path), run_storage(config)

    with PodCluster(objects, "RayJob/pretrain", num_nodes=2) as pods:
        watched = Watched(pods, run)
        assert pods.running == []
        with pace.slow(STEP_S):
            job = pods.submit(entrypoint)
            start = watched.until_workers(4)
            nodes = [worker["node"] for worker in start["workers"]]
            assert sorted(nodes.count(node) for node in pods.running) == [2, 2]
            pods.kill(nodes[-1])
            start = watched.until_workers(4, after=start["attempt"])
        nodes_then = [worker["node"] for worker in start["workers"]]
        assert nodes[-1] not in nodes_then
        assert sorted(nodes_then.count(node) for node in set(nodes_then)) == [2, 2]
        assert watched.end_of(job) == JobStatus.SUCCEEDED, pods.jobs.get_job_logs(job)[-4000:]
        ledger = Ledger.read(run)
        assert [line["step"] for line in ledger.steps] == list(range(1, NUM_FEW_STEPS + 1))
        assert ledger.events("checkpoint")[-1]["parameter_hash"] == hash_of_a_local_run(run)
        watched.until(lambda: not pods.running and not pods.pending)
        watched.say("no pods")


def test_where_no_spot_node_comes_a_pod_on_demand_does(tmp_path: Path) -> None:
    objects = spot_cluster()
    (wait,) = cluster_spec(find(objects, "RayJob/pretrain"))["autoscalerOptions"]["env"]
    assert wait == {"name": "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", "value": "600"}
    wait["value"] = f"{limit_s(3):.0f}"  # which the pod on demand is given, too, to join
    with PodCluster(objects, "RayJob/pretrain", num_nodes=1, without_nodes="trainers") as pods:
        watched = Watched(pods, None)
        job = pods.submit("true", num_gpus=1)
        watched.until(lambda: pods.pending)
        (waiting,) = pods.pending
        assert waiting.rpartition("-")[0] == "pretrain-trainers"
        assert watched.end_of(job) == JobStatus.SUCCEEDED, pods.jobs.get_job_info(job).message
        (running,) = pods.running
        assert running.rpartition("-")[0] == "pretrain-trainers-on-demand"


def test_a_job_that_lost_its_cluster_resumes_its_run_on_the_next(
    tmp_path: Path, pace: Pace
) -> None:
    """Shows what follows a RayJob that failed, by its `backoffLimit` or a new submission: its head
    ran the driver, so with it the whole cluster is lost."""
    objects = spot_cluster()
    config = run_config(objects, tmp_path, num_steps=NUM_FEW_STEPS)
    assert find(objects, "RayJob/pretrain")["spec"]["backoffLimit"] > 0
    entrypoint, run = entrypoint_of(objects, config, tmp_path), run_storage(config)

    def on_a_new_cluster(is_enough: Callable[[Ledger], bool]) -> JobStatus:
        """Returns the job's status once it has ended or the ledger shows enough steps; then the
        cluster is gone at once."""
        with PodCluster(objects, "RayJob/pretrain", num_nodes=1) as pods:
            jobs, job_id = pods.jobs, pods.submit(entrypoint)

            def has_done_enough() -> bool:
                assert pods.problem is None, pods.problem
                return jobs.get_job_status(job_id).is_terminal() or is_enough(Ledger.read(run))

            wait_until(
                has_done_enough,
                timeout_s=200,
                poll_s=0.1,
                why=lambda: jobs.get_job_logs(job_id)[-4000:],
            )
            return jobs.get_job_status(job_id)

    with pace.slow(STEP_S):
        status = on_a_new_cluster(lambda ledger: len(ledger.events("checkpoint")) >= 2)
        assert status == JobStatus.RUNNING
    assert on_a_new_cluster(lambda ledger: False) == JobStatus.SUCCEEDED
    ledger = Ledger.read(run)
    assert [start["step"] >= 50 for start in ledger.events("start")] == [False, True]
    assert ledger.events("checkpoint")[-1]["parameter_hash"] == hash_of_a_local_run(run)


def hash_of_a_local_run(run: Any) -> str:
    """Returns the hash of a run with the same settings, in this process alone."""
    config = recorded_config(run).model_copy(update={"run_id": "local"})
    (store,) = Path(config.storage.uri, "tokens").iterdir()
    tokenizer_json = (store / "tokenizer.json").read_bytes()
    plan = RunPlan(config, str(store), tokenizer_json, code_version="test")
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(open_storage(config.storage.uri).child("runs/local"))
    return str(ledger.events("checkpoint")[-1]["parameter_hash"])
