"""The contenders of benchmarks of serving, each a tree of processes that is stopped (SIGSTOP) while
others are measured."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster.local.local_cluster import free_port
from tests.benchmarks.http_load import MODEL, BenchError, Load, loaded
from tests.benchmarks.serve_process import NUM_THREADS
from tests.repository import REPOSITORY

VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
START_TIMEOUT_S = 600.0  # vLLM compiles when it starts for the first time
ANSWER_TIMEOUT_S = 900.0  # transformers with 16 streams, while other work keeps the cores busy
STOP_TIMEOUT_S = 20.0


class Contender(ABC):
    """Starts and ends with the context. `log` holds its standard error."""

    speaks_json = True  # on its standard output, which is read; else it goes to the log

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        checkout: Path = REPOSITORY,
    ) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._log = log
        self._checkout = checkout

    def __enter__(self) -> Self:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._checkout,
                # make sets a number of threads that is none of these programs' own.
                env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
                | dict(self._environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.speaks_json else log,
                stderr=log,
                start_new_session=True,
                bufsize=0,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @abstractmethod
    def measure(
        self, prompts: list[list[int]], *, num_streams: int, is_mixed: bool = False
    ) -> Load:
        """Raises `BenchError` unless it does everything that was asked for."""

    def pause(self) -> None:
        for process in self._tree():
            process.suspend()

    def resume(self) -> None:
        for process in reversed(self._tree()):
            process.resume()

    def cpu_s(self) -> dict[str, float]:
        """Returns user and system seconds so far by command line: a process of Ray has its name
        there (`ray::ProxyActor` …)."""
        seconds: dict[str, float] = defaultdict(float)
        for process in self._tree():
            times = process.cpu_times()
            seconds[" ".join(process.cmdline())] += times.user + times.system
        return seconds

    def _wait_until_ready(self) -> None:
        self.ready = self._read_answer(START_TIMEOUT_S)

    def _read_answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[
            0
        ]:
            line = self._process.stdout.readline()
            if not line:
                raise self._failure("ended")
            if line.startswith(b"{"):  # and no line of a library
                return dict(json.loads(line))
        raise self._failure(f"said nothing for {timeout_s:.0f} s")

    def _failure(self, what: str) -> BenchError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        return BenchError(f"{self.name} {what}; its log ends with\n{tail}")

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise self._failure("ended") from None

    def _end(self) -> None:
        """Lets it end by itself once its input ends, then kills the remaining processes."""
        assert self._process.stdin is not None
        try:
            tree = self._tree()
        except BenchError:
            tree = []
        for process in tree:
            process.resume()
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in tree:
            if process.is_running():
                process.kill()


class LineContender(Contender):
    """`serve_process` in one of its roles that answer lines."""

    def __init__(self, role: str, folder: Path, *, dtype: str, log: Path) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.serve_process", role, str(folder), dtype]
        super().__init__(role, command, environment={"OMP_NUM_THREADS": str(NUM_THREADS)}, log=log)

    def measure(
        self, prompts: list[list[int]], *, num_streams: int, is_mixed: bool = False
    ) -> Load:
        assert self._process.stdin is not None
        request = {"prompts": prompts, "num_streams": num_streams, "is_mixed": is_mixed}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return Load(**self._read_answer(ANSWER_TIMEOUT_S))


class HttpContender(Contender):
    url: str

    def measure(
        self, prompts: list[list[int]], *, num_streams: int, is_mixed: bool = False
    ) -> Load:
        return loaded(self.url, prompts, num_streams=num_streams, is_mixed=is_mixed)


class Raymill(HttpContender):
    """One replica behind Ray Serve's proxy, in a Ray cluster of its own."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        dtype: str,
        log: Path,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        checkout: Path = REPOSITORY,
    ) -> None:
        """`settings` are groups of `ServeConfig`, over those of `serve_process`."""
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.serve_process",
            "endpoint",
            str(folder),
            dtype,
        ]
        command.append(json.dumps(settings or {}))
        super().__init__(name, command, environment=environment or {}, log=log, checkout=checkout)

    def _wait_until_ready(self) -> None:
        super()._wait_until_ready()
        self.url = self.ready["url"]


class Vllm(HttpContender):
    """A bare vLLM server without look-ups of prefixes that never repeat, and without a log line for
    a request."""

    speaks_json = False

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        log: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        python: Path = VLLM_PYTHON,
    ) -> None:
        """`settings` are vLLM's arguments without their hyphens."""
        if not python.exists():
            raise BenchError(
                f"vLLM is not installed in {python}; `make bench-serve` makes .venv-vllm for CPUs"
            )
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        given = {
            "model": folder,
            "served-model-name": MODEL,
            "dtype": dtype,
            "host": "127.0.0.1",
            "port": port,
        }
        command = [
            str(python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--no-enable-prefix-caching",
        ]
        command += ["--disable-uvicorn-access-log"]
        for name, value in (given | dict(settings)).items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        own = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(log.parent / "vllm-cache"),
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__("vllm", command, environment=own | dict(environment or {}), log=log)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure("ended")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise self._failure(f"was not ready after {START_TIMEOUT_S:.0f} s")

    def _end(self) -> None:
        self._process.terminate()
        super()._end()


def vllm_on_cpu(folder: Path, *, dtype: str, log: Path) -> Vllm:
    """Returns vLLM's CPU build as it is fastest: one thread for each of the processors and bound to
    it, and room for more sequences than come."""
    # GB
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    settings = {"max-model-len": 1024, "max-num-seqs": 32}
    return Vllm(folder, dtype=dtype, log=log, settings=settings, environment=environment)
