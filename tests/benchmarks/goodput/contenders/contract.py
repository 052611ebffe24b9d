"""What the benchmark asks of a contender: to train as long as a context lasts, on whatever nodes are
there, and to tell its steps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cluster.local.local_cluster import LocalCluster
from tests.benchmarks.goodput.records import Mark, Step

BATCH = 12
"""Rows of a step, which one, two, three and four workers can divide."""

SEQ_LEN = 64  # tokens of a row
VOCAB = 300
PRESET = "tiny"
MAX_NODES = 4
HASH_EVERY_STEPS = 10


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders of one replay."""

    row_s: float  # that a worker waits for each row, in place of computing a larger model
    save_every_steps: int
    has_notices: bool
    look_s: float  # between looks for newly available nodes, where a contender looks


class Contender(ABC):
    """A way to train on spot nodes. Each node has room for one worker."""

    name: ClassVar[str]

    def __init__(self, settings: Settings, folder: Path) -> None:
        """The folder, which is empty, is the contender's: logs, checkpoints, records."""
        self.settings, self.folder = settings, folder

    @classmethod
    def missing(cls) -> str:
        """Returns what has to be installed first; empty where nothing is missing."""
        return ""

    @abstractmethod
    @contextmanager
    def training(self, cluster: LocalCluster) -> Iterator[None]:
        """Trains while the context lasts, and ends every process that it started."""
        yield

    @abstractmethod
    def read(self) -> tuple[list[Step], list[Mark]]:
        """Returns all steps and marks so far, by time."""

    # What the thread that replays tells; most contenders see the nodes by themselves.

    def node_came(self, name: str) -> None: ...  # noqa: B027

    def node_warned(self, name: str, deadline_s: float) -> None: ...  # noqa: B027

    def node_went(self, name: str) -> None: ...  # noqa: B027

    def tick(self) -> None:  # noqa: B027
        """Raises where the training has ended by itself."""
