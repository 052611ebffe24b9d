"""Test files that follow each other in one process, where `make test` runs several: what they share
is made once there.

Other files are taken one by one by whichever process is free. Two lanes start clusters and
endpoints, so that never more than two of those run at a time; the third one shares a Ray. All three
are long, and therefore begin.
"""

import functools
import re

from xdist.scheduler import LoadFileScheduling

from tests.repository import REPOSITORY

LANES = {
    "serving": r"^tests/serving/(?s:.*)\bmark\.cluster\b",
    "data": r"\bray_workers\b",
    "clusters": r"\bmark\.cluster\b",
}
"""Patterns of a file's path and text; the first that matches is the lane's."""


@functools.cache
def lane_of(file: str) -> str | None:
    """Returns the lane of a file, named as in pytest's node ids."""
    text = f"{file}\n{(REPOSITORY / file).read_text(encoding='utf-8')}"
    return next((lane for lane, pattern in LANES.items() if re.search(pattern, text)), None)


def place(file: str) -> int:
    """Returns a number by which files are sorted: those of a lane first, and together."""
    return [*LANES, None].index(lane_of(file))


class LaneScheduling(LoadFileScheduling):
    """Gives whole lanes and whole files to pytest-xdist's processes."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return lane_of(file) or file
