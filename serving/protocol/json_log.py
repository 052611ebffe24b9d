"""Writes a process's log as JSON, one object a line: in proxies, replicas, the coordinator and
engine processes.

Ray Serve's own `LoggingConfig(encoding="JSON")` knows only its own logger, and there only the file:
what it writes to standard error stays text, and so does every line of ours. Its times are no RFC
3339.
"""

import json
import logging
import os
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Literal

from cluster.settings.code_folders import code_version

FORMAT_VARIABLE = "RAYMILL_LOG_FORMAT"
"""Environment variable with the format of a process that no settings tell it."""

REPLICA_VARIABLE = "RAYMILL_REPLICA"
"""Environment variable in which a replica tells the processes beside it its name."""

CURRENT_REQUEST: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered, if one is."""

LogFormat = Literal["text", "json"]
VERSION_CHARS = 16  # of the code's version, which is a hash
_RAY, _RAY_SERVE = "ray", "ray.serve"  # loggers that do not hand their records to the root's


class Process(StrEnum):
    """The process that logs."""

    PROXY = "proxy"  # Ray Serve's, with the front door
    REPLICA = "replica"
    COORDINATOR = "coordinator"
    ENGINE = "engine"  # beside a replica


class JsonFormatter(logging.Formatter):
    """Writes the fields that every line has, and `request_id` and `exception` where there is
    one."""

    def __init__(self, process: Process, *, replica: str | None) -> None:
        super().__init__()
        version = code_version()[:VERSION_CHARS]
        self._facts = {"process": process.value, "replica": replica, "version": version}

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _rfc3339(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts,
        }
        # Ray Serve puts it into the records of its own logger.
        request_id = getattr(record, "request_id", None) or CURRENT_REQUEST.get()
        if request_id:
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Keeper(logging.Filter):
    """Gives a logger's handlers their format before each record: Ray Serve replaces the handlers of
    its logger whenever its own settings arrive, and a proxy gets them after its start."""

    def __init__(self, logger: logging.Logger, formatter: logging.Formatter) -> None:
        super().__init__()
        self._logger, self._formatter = logger, formatter

    def filter(self, record: logging.LogRecord) -> bool:
        _format_all(self._logger, self._formatter)
        return True


def log_in(log_format: LogFormat | None, process: Process, *, replica: str | None = None) -> None:
    """Has this process, and the processes that it starts, log in a format; None leaves it to the
    environment. Text is what Ray and Python write by themselves."""
    if log_format is not None:
        os.environ[FORMAT_VARIABLE] = log_format
    if not logs_json():
        return
    if replica is not None:
        os.environ[REPLICA_VARIABLE] = replica
    formatter = JsonFormatter(process, replica=replica or os.environ.get(REPLICA_VARIABLE))
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for name in (None, _RAY, _RAY_SERVE):
        _format_all(logging.getLogger(name), formatter)
    serve = logging.getLogger(_RAY_SERVE)
    serve.addFilter(_Keeper(serve, formatter))
    logging.captureWarnings(True)


def logs_json() -> bool:
    """Whether this process, by its environment, logs in JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Logs what ends a process of our own, in place of Python's `sys.excepthook`, which writes
    text."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger(__name__).critical(
        "the process ends: %s", kind.__name__, exc_info=(kind, error, traceback)
    )


def _format_all(logger: logging.Logger, formatter: logging.Formatter) -> None:
    for handler in logger.handlers:
        target = getattr(handler, "target", None)  # of one that hands lines on in batches
        for writer in (handler, target):
            if isinstance(writer, logging.Handler) and writer.formatter is not formatter:
                writer.setFormatter(formatter)


def _rfc3339(unix_s: float) -> str:
    return (
        datetime.fromtimestamp(unix_s, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
