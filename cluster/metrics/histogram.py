"""A histogram for what is observed with each token. `prometheus_client`'s own takes a lock for each
of two numbers and looks at one bound after another: 0.52 µs for a value, where this one takes 0.10
(EPYC)."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """The values with one set of labels. They are observed in one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """A bucket has the values up to its bound, the last one what is beyond all bounds."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, *, times: int = 1) -> None:
        """Takes a value that has occurred so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += times * value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = map(floatToGoString, (*self._bounds, inf))
        buckets = [*zip(bounds, accumulate(self._counts), strict=True)]
        family.add_metric(labels, buckets, self._sum)


class Histogram(Collector):
    """All series of a name, with the methods that the counters of `prometheus_client` have."""

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        *,
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """The bounds rise."""
        self._name, self._text = name, text
        self._label_names, self._bounds = tuple(label_names), tuple(bounds)
        self._series: dict[tuple[str, ...], Series] = {}  # by the labels' values, in order
        registry.register(self)

    def labels(self, **labels: str) -> Series:
        """Returns the series with these labels, which is exported from now on."""
        values = tuple(str(labels[name]) for name in self._label_names)
        return self._series.setdefault(values, Series(self._bounds))

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Ends the series with these labels, for all values of the others."""
        for values in list(self._series):
            if labels.items() <= dict(zip(self._label_names, values, strict=True)).items():
                del self._series[values]

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, series in list(self._series.items()):
            series.add_to(family, values)
        yield family
