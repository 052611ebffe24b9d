"""Makes a run's steps last while something happens to it: the run is not over before, and what
happens gets the processors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.files.failpoints import VARIABLE


class Pace:
    """The pace of the runs on a cluster, which compute as fast as they can unless it is slow."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def slow(self, step_s: float) -> Iterator[None]:
        """Has each step, or each pass, wait for so many seconds besides, until the context ends."""
        new = self._file.with_suffix(".new")
        new.write_text(str(step_s), encoding="ascii")
        new.replace(self._file)
        try:
            yield
        finally:
            self._file.unlink()


@contextmanager
def paced(folder: Path, *, place: str = "step") -> Iterator[Pace]:
    """Gives the pace of runs on each cluster whose nodes start within the context. `place` is where
    they wait: before each "step", or in each "pass" of a micro-batch."""
    file = folder / "pace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{place}:{file}:pause")
        yield Pace(file)
