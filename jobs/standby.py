"""Worker processes that stand by: started and loaded ahead, so that a restarted worker group need not start its own.

Most of a restart is Python starting and importing torch and Ray Train, on a busy machine 6 s of 8. Ray gives an actor
any idle process of its job and runtime environment; here each node keeps some of the training's. They are started by
a request that Ray has no public call for, and load their modules in its setup hook of a runtime environment.
"""

import importlib
import os
import threading
import time

import psutil
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.runtime_env import RuntimeEnv

LAUNCH_VARIABLE = "RAYMILL_LAUNCH"
"""Environment variable of a training worker's process, also of one that stands by: whose it is."""

# The last one is imported by the first optimizer that a process makes.
_MODULES = ("jobs.train_worker", "ray.train.torch")

_KEEP_ALIVE_S = 1 << 30  # until the job ends, and Ray its processes
_SETTLED_S = 3.0  # a new group has taken its processes and its first steps
_IDLE_S = 10.0  # a node without workers comes after those that have some
_APPEAR_S = 60.0  # a process that was asked for does not show its variables at once
_ANSWER_S = 10.0
_POLL_S = 1.0


def worker_environment(launch: str) -> dict[str, str]:
    """Variables of the training workers' runtime environment."""
    return {
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.load",
        LAUNCH_VARIABLE: launch,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # PyTorch before 2.10 refuses products in deterministic mode without it
    }


def load() -> None:
    """Imports what a training worker imports, before there is anything for it to do."""
    for name in _MODULES:
        importlib.import_module(name)


class Standby:
    """Keeps processes standing by on this node, beside the workers that train, until its process ends."""

    def __init__(self, *, launch: str, raylet_address: str, job_id: bytes) -> None:
        self._launch, self._raylet_address, self._job_id = launch, raylet_address, job_id
        self._runtime_env: str | None = None
        self._num_wanted = 0
        threading.Thread(target=self._work, name="standby", daemon=True).start()

    def want(self, number: int, runtime_env: str) -> None:
        """So many of the serialized runtime environment, which a worker's own context gave."""
        self._num_wanted, self._runtime_env = number, runtime_env

    def _work(self) -> None:
        before: set[int] | None = None
        quiet_until = asked_until = 0.0
        while True:
            time.sleep(_POLL_S)
            workers, waiting = self._processes()
            now, missing = time.monotonic(), self._num_wanted - len(waiting)
            if workers != before:
                quiet_until, before = now + (_SETTLED_S if workers else _IDLE_S), workers
            if missing <= 0:
                asked_until = 0.0
            elif self._runtime_env and now > max(quiet_until, asked_until):
                self._start(missing, self._runtime_env)
                asked_until = now + _APPEAR_S

    def _processes(self) -> tuple[set[int], set[int]]:
        """Ids of this node's processes that train for the launch, and of those that stand by."""
        workers: set[int] = set()
        waiting: set[int] = set()
        for process in psutil.Process(os.getppid()).children():
            try:
                if process.environ().get(LAUNCH_VARIABLE) == self._launch:
                    is_waiting = process.cmdline()[0] == "ray::IDLE" or "default_worker.py" in str(process.cmdline())
                    (waiting if is_waiting else workers).add(process.pid)
            except (psutil.Error, IndexError):
                continue  # it is gone
        return workers, waiting

    def _start(self, number: int, runtime_env: str) -> None:
        request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
            language=common_pb2.Language.Value("PYTHON"),  # type: ignore[attr-defined]
            job_id=self._job_id,
            num_workers=number,
            keep_alive_duration_secs=_KEEP_ALIVE_S,
        )
        request.runtime_env_info.serialized_runtime_env = runtime_env
        parsed = RuntimeEnv.deserialize(runtime_env)
        if uri := parsed.working_dir_uri():
            request.runtime_env_info.uris.working_dir_uri = uri
        request.runtime_env_info.uris.py_modules_uris[:] = parsed.py_modules_uris()
        channel = init_grpc_channel(self._raylet_address)
        with channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)
