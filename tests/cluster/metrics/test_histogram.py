"""Our histogram exports what that of prometheus_client does."""

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from cluster.metrics.histogram import Histogram as OwnHistogram

BOUNDS = (0.01, 0.5, 1.0, 1e6)
LABELS = ("model", "version")


def exported(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


@given(st.lists(st.floats(-1.0, 1e7) | st.sampled_from([*BOUNDS, math.inf]), max_size=20))
def test_a_histogram_exports_the_same_as_the_clients(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = OwnHistogram("n:s", "Seconds", LABELS, bounds=BOUNDS, registry=ours)
    other = Histogram("n:s", "Seconds", LABELS, buckets=BOUNDS, registry=theirs)
    for number, value in enumerate(values):
        version = f"v{number % 3}"
        own.labels(version=version, model="m").observe(value)
        other.labels(version=version, model="m").observe(value)
    for each in (0.0, 0.5, 8.0):  # whose sums are exact, in any order
        own.labels(version="v9", model="m").observe(each, times=3)
        for _ in range(3):
            other.labels(version="v9", model="m").observe(each)
    assert exported(ours) == exported(theirs)
    own.remove_by_labels({"version": "v1"})
    other.remove_by_labels({"version": "v1"})
    assert exported(ours) == exported(theirs)
